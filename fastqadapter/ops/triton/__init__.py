"""The `triton` backend: each kernel of `fastqadapter_kernels.triton` as a `torch.library` operator with its gradient.

Imported when the backend first serves a call, so that `import fastqadapter.ops` loads no Triton. The operators are
opaque to `torch.compile`, with fake kernels for its tracing. A second derivative raises, it is never silently
incomplete.
"""

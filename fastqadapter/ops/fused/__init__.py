"""The backends with kernels, `triton` and `cpu`: each kernel as a `torch.library` operator with its gradient.

Imported when such a backend first serves a call, so that `import fastqadapter.ops` loads no kernel. The operators are
opaque to `torch.compile`, with fake kernels for its tracing; they take the name of their backend, since both have the
same kernels. A second derivative raises, it is never silently incomplete.
"""

from __future__ import annotations

import importlib
from types import ModuleType

_LAUNCHERS = {"cpu": "fastqadapter_kernels.cpu", "triton": "fastqadapter_kernels.triton.launchers"}


def kernels_of(backend: str) -> ModuleType:
    """The launchers of all ops on `backend`."""
    return importlib.import_module(_LAUNCHERS[backend])

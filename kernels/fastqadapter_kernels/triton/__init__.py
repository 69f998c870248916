"""Triton kernels and their launchers, one op a file: tensors in, tensors out.

Each file has, in this order: configuration and its rule, kernels, launchers. Letters as everywhere: N rows, D hidden
size, V vocabulary. The launchers check nothing that `fastqadapter.ops` has checked.
"""

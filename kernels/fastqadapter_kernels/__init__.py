"""Kernels of fastqadapter: tensors in, tensors out. No autograd, no configuration, nothing of Hugging Face."""

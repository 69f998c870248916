"""Models: two streams over one frozen LM, their caches, the customised policy, saving and loading."""

from fastqadapter.models.model import QAdapterModel, QAdapterOutput, get_qadapter_model

__all__ = ["QAdapterModel", "QAdapterOutput", "get_qadapter_model"]

"""The vocabulary-wide mathematics of Q-Adapter: tensors in, tensors out, nothing of Hugging Face.

`hidden_q` is `d` (h_q - h_b for the `difference` head, h_q for `logits`), `hidden_b` the base stream, `weight` the
frozen LM head. Every op takes `backend="auto" | "triton" | "cpu" | "torch" | "eager"`; the environment variable
FASTQADAPTER_BACKEND sets the default. `eager` is the plain definition and the truth of all tests.
"""

from fastqadapter.ops.backends import backends
from fastqadapter.ops.preference_loss import Pairs, preference_loss
from fastqadapter.ops.residual import residual_log_probs, residual_soft_value
from fastqadapter.ops.soft_value import HeadParams, soft_value
from fastqadapter.ops.state_action_values import state_action_values
from fastqadapter.ops.taken_value import taken_value

__all__ = [
    "HeadParams",
    "Pairs",
    "backends",
    "preference_loss",
    "residual_log_probs",
    "residual_soft_value",
    "soft_value",
    "state_action_values",
    "taken_value",
]

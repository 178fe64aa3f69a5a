"""The ops: a public function each, one autograd Function, one plain reference."""

from .linear import linear
from .softmax import log_softmax, softmax

__all__ = ["linear", "log_softmax", "softmax"]

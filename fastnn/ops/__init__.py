"""The ops: a public function each, one autograd Function, one plain reference."""

from .cross_entropy import cross_entropy
from .linear import linear
from .softmax import log_softmax, softmax

__all__ = ["cross_entropy", "linear", "log_softmax", "softmax"]

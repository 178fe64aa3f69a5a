"""The ops: a public function each, one autograd Function, one plain reference."""

from .attention import scaled_dot_product_attention
from .cross_entropy import cross_entropy
from .linear import linear
from .softmax import log_softmax, softmax

__all__ = ["cross_entropy", "linear", "log_softmax", "scaled_dot_product_attention", "softmax"]

"""The ops: a public function each, one autograd Function, one plain reference."""

from .attention import scaled_dot_product_attention
from .cross_entropy import cross_entropy
from .linear import linear
from .norm import add_layer_norm, add_rms_norm, layer_norm, rms_norm
from .softmax import log_softmax, softmax

__all__ = [
    "add_layer_norm",
    "add_rms_norm",
    "cross_entropy",
    "layer_norm",
    "linear",
    "log_softmax",
    "rms_norm",
    "scaled_dot_product_attention",
    "softmax",
]

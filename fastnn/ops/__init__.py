"""The ops: a public function each, one autograd Function, one plain reference."""

from .activation import geglu, gelu, hardswish, reglu, relu, relu2, sigmoid, silu, swiglu, tanh
from .attention import scaled_dot_product_attention
from .attention_cache import attention_with_kv_cache
from .attention_varlen import attention_varlen
from .block_sparse import block_sparse_linear
from .block_sparse_int8 import block_sparse_linear_int8
from .cross_entropy import cross_entropy
from .dropout_add import dropout_add
from .embedding import embedding_groupwise
from .groups import dequantize_groups, quantize_groups
from .kv_cache import KVCache
from .linear import linear
from .linear_cross_entropy import linear_cross_entropy
from .linear_groupwise import linear_groupwise
from .linear_int8 import linear_int8, quantize_rows
from .masked_softmax import masked_softmax
from .mlp import mlp, swiglu_mlp
from .norm import add_layer_norm, add_rms_norm, layer_norm, rms_norm
from .rope import rope, rope_tables
from .softmax import log_softmax, softmax

__all__ = [
    "KVCache",
    "add_layer_norm",
    "add_rms_norm",
    "attention_varlen",
    "attention_with_kv_cache",
    "block_sparse_linear",
    "block_sparse_linear_int8",
    "cross_entropy",
    "dequantize_groups",
    "dropout_add",
    "embedding_groupwise",
    "geglu",
    "gelu",
    "hardswish",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
    "linear_groupwise",
    "linear_int8",
    "log_softmax",
    "masked_softmax",
    "mlp",
    "quantize_groups",
    "quantize_rows",
    "reglu",
    "relu",
    "relu2",
    "rms_norm",
    "rope",
    "rope_tables",
    "scaled_dot_product_attention",
    "sigmoid",
    "silu",
    "softmax",
    "swiglu",
    "swiglu_mlp",
    "tanh",
]

"""Layers with torch's names, constructors and `state_dict` keys, on fastnn's ops."""

from .activation import GELU, Hardswish, ReLU, Sigmoid, SiLU, Tanh
from .attention import MultiheadAttention
from .block_sparse import BlockSparseLinear
from .block_sparse_int8 import Int8BlockSparseLinear
from .embedding import GroupwiseEmbedding, Int4Embedding, Int8Embedding
from .linear import Linear
from .linear_groupwise import GroupwiseLinear, Int4Linear, Int8WeightOnlyLinear
from .linear_int8 import Int8Linear
from .loss import CrossEntropyLoss, LinearCrossEntropyLoss
from .mlp import MLP, QKVLinear, SwiGLU
from .norm import LayerNorm, RMSNorm
from .quantized import QuantizedLinear, QuantizedModule
from .rope import RotaryEmbedding
from .softmax import LogSoftmax, Softmax

__all__ = [
    "GELU",
    "MLP",
    "BlockSparseLinear",
    "CrossEntropyLoss",
    "GroupwiseEmbedding",
    "GroupwiseLinear",
    "Hardswish",
    "Int4Embedding",
    "Int4Linear",
    "Int8BlockSparseLinear",
    "Int8Embedding",
    "Int8Linear",
    "Int8WeightOnlyLinear",
    "LayerNorm",
    "Linear",
    "LinearCrossEntropyLoss",
    "LogSoftmax",
    "MultiheadAttention",
    "QKVLinear",
    "QuantizedLinear",
    "QuantizedModule",
    "RMSNorm",
    "ReLU",
    "RotaryEmbedding",
    "SiLU",
    "Sigmoid",
    "Softmax",
    "SwiGLU",
    "Tanh",
]

"""Layers with torch's names, constructors and `state_dict` keys, on fastnn's ops."""

from .activation import GELU, Hardswish, ReLU, Sigmoid, SiLU, Tanh
from .attention import MultiheadAttention
from .linear import Linear
from .linear_int8 import Int8Linear
from .loss import CrossEntropyLoss, LinearCrossEntropyLoss
from .mlp import MLP, QKVLinear, SwiGLU
from .norm import LayerNorm, RMSNorm
from .rope import RotaryEmbedding
from .softmax import LogSoftmax, Softmax

__all__ = [
    "GELU",
    "MLP",
    "CrossEntropyLoss",
    "Hardswish",
    "Int8Linear",
    "LayerNorm",
    "Linear",
    "LinearCrossEntropyLoss",
    "LogSoftmax",
    "MultiheadAttention",
    "QKVLinear",
    "RMSNorm",
    "ReLU",
    "RotaryEmbedding",
    "SiLU",
    "Sigmoid",
    "Softmax",
    "SwiGLU",
    "Tanh",
]

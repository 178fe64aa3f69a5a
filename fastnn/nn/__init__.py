"""Layers with torch's names, constructors and `state_dict` keys, on fastnn's ops."""

from .activation import GELU, Hardswish, ReLU, Sigmoid, SiLU, Tanh
from .attention import MultiheadAttention
from .linear import Linear
from .loss import CrossEntropyLoss
from .norm import LayerNorm, RMSNorm
from .rope import RotaryEmbedding
from .softmax import LogSoftmax, Softmax

__all__ = [
    "GELU",
    "CrossEntropyLoss",
    "Hardswish",
    "LayerNorm",
    "Linear",
    "LogSoftmax",
    "MultiheadAttention",
    "RMSNorm",
    "ReLU",
    "RotaryEmbedding",
    "SiLU",
    "Sigmoid",
    "Softmax",
    "Tanh",
]

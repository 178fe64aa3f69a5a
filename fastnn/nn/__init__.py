"""Layers with torch's names, constructors and `state_dict` keys, on fastnn's ops."""

from .attention import MultiheadAttention
from .linear import Linear
from .loss import CrossEntropyLoss
from .norm import LayerNorm, RMSNorm
from .softmax import LogSoftmax, Softmax

__all__ = ["CrossEntropyLoss", "LayerNorm", "Linear", "LogSoftmax", "MultiheadAttention", "RMSNorm", "Softmax"]

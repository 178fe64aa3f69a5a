"""Layers with torch's names, constructors and `state_dict` keys, on fastnn's ops."""

from .linear import Linear
from .softmax import LogSoftmax, Softmax

__all__ = ["Linear", "LogSoftmax", "Softmax"]

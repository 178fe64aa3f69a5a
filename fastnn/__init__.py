"""fastnn: compiled-kernel acceleration for PyTorch."""

from __future__ import annotations

from . import _extension, nn, ops
from ._dispatch import use_backend
from ._record import KernelRun, record
from .ops import cross_entropy, linear, log_softmax, softmax

__version__ = "0.1.0"

__all__ = [
    "KernelRun",
    "__version__",
    "cross_entropy",
    "linear",
    "log_softmax",
    "nn",
    "ops",
    "record",
    "softmax",
    "use_backend",
]

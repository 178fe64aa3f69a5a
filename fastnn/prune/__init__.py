"""Pruning that changes shapes: a model with fewer neurons, attention heads and channels, and nothing left of them."""

from . import products as products  # registers, with rules, how channels pass through operators
from .config import PruneError, Shrink
from .report import Entry, Report
from .shrink import resize_, shrink_

__all__ = ["Entry", "PruneError", "Report", "Shrink", "resize_", "shrink_"]

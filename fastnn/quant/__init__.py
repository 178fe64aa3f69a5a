"""Quantisation: smaller weights and quicker products, layer by layer, with a report of what it gained."""

from .config import Int8Dynamic
from .quantize import dequantize_, quantize_
from .report import Entry, Report

__all__ = ["Entry", "Int8Dynamic", "Report", "dequantize_", "quantize_"]

"""Quantisation: smaller weights and quicker products, layer by layer, with a report of what it gained."""

from .config import Int8Dynamic
from .container import FormatError
from .files import load, save
from .quantize import dequantize_, quantize_
from .report import Entry, Report

__all__ = ["Entry", "FormatError", "Int8Dynamic", "Report", "dequantize_", "load", "quantize_", "save"]

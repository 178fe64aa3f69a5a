"""Quantisation: smaller weights and quicker products, layer by layer, with a report of what it gained."""

from .config import Int4Int8Dynamic, Int4WeightOnly, Int8Dynamic, Int8WeightOnly
from .container import FormatError
from .files import load, save
from .gguf import Gguf, GgufTensor
from .gguf_models import load_gguf
from .quantize import dequantize_, quantize_
from .report import Entry, Report

__all__ = [
    "Entry",
    "FormatError",
    "Gguf",
    "GgufTensor",
    "Int4Int8Dynamic",
    "Int4WeightOnly",
    "Int8Dynamic",
    "Int8WeightOnly",
    "Report",
    "dequantize_",
    "load",
    "load_gguf",
    "quantize_",
    "save",
]

"""Quantisation: smaller weights and quicker products, layer by layer, with a report of what it gained."""

from .calibration import Calibration
from .config import Int4Int8Dynamic, Int4WeightOnly, Int8Dynamic, Int8WeightOnly
from .container import FormatError
from .files import load, save
from .gguf import Gguf, GgufTensor
from .gguf_models import load_gguf
from .gptq import Gptq
from .quantize import dequantize_, quantize_
from .report import Entry, Report
from .smooth import SmoothQuant

__all__ = [
    "Calibration",
    "Entry",
    "FormatError",
    "Gguf",
    "GgufTensor",
    "Gptq",
    "Int4Int8Dynamic",
    "Int4WeightOnly",
    "Int8Dynamic",
    "Int8WeightOnly",
    "Report",
    "SmoothQuant",
    "dequantize_",
    "load",
    "load_gguf",
    "quantize_",
    "save",
]

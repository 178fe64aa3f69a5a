"""Compression within a budget of accuracy, and the command that writes compressed models to files."""

from .judge import CompressError
from .options import CANDIDATES
from .report import Entry, Figures, Point, Report, Tried
from .verb import compress

__all__ = ["CANDIDATES", "CompressError", "Entry", "Figures", "Point", "Report", "Tried", "compress"]

"""Whole models: `accelerate` patches one in place and reversibly, `explain` says where its time goes."""

from .explain import Explanation, Part, explain
from .patch import accelerate
from .report import Entry, Report

__all__ = ["Entry", "Explanation", "Part", "Report", "accelerate", "explain"]

"""Measuring: the machine's limits, and every row against them and against the best alternative.

Example:
    >>> from fastnn import bench
    >>> limits = bench.machine_limits()
    >>> result = bench.run(bench.Options(families=("softmax",), quick=True))
    >>> result.rows()[0].name
    'softmax_fwd/fp32'
"""

from .campaign import BadOptions, Options, run
from .limits import Bound, Limits, NoLimits, machine_limits
from .results import BadResult, Result, Row, load
from .verdict import Verdict

__all__ = [
    "BadOptions",
    "BadResult",
    "Bound",
    "Limits",
    "NoLimits",
    "Options",
    "Result",
    "Row",
    "Verdict",
    "load",
    "machine_limits",
    "run",
]

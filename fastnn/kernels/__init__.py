"""The Triton kernels: GPU code in Python, one module per op, behind `torch.ops.fastnn_triton`.

Imported by the first call that may run on Triton (`fastnn._dispatch`), not by `import fastnn`. Importing registers
the operators; a kernel is compiled when it is first launched.
"""

from . import attention, cross_entropy, elementwise, linear, norm, softmax
from .library import INTERPRETED

__all__ = ["INTERPRETED", "attention", "cross_entropy", "elementwise", "linear", "norm", "softmax"]

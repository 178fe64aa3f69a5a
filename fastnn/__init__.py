"""fastnn: compiled-kernel acceleration for PyTorch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from . import memory, nn, ops, sparse
from ._dispatch import use_backend
from ._record import KernelRun, record
from .accelerate import Explanation, Report, accelerate, explain
from .info import info
from .ops import (
    KVCache,
    add_layer_norm,
    add_rms_norm,
    attention_varlen,
    attention_with_kv_cache,
    block_sparse_linear,
    block_sparse_linear_int8,
    cross_entropy,
    dropout_add,
    geglu,
    gelu,
    hardswish,
    layer_norm,
    linear,
    linear_cross_entropy,
    linear_groupwise,
    linear_int8,
    log_softmax,
    masked_softmax,
    mlp,
    reglu,
    relu,
    relu2,
    rms_norm,
    rope,
    rope_tables,
    scaled_dot_product_attention,
    sigmoid,
    silu,
    softmax,
    swiglu,
    swiglu_mlp,
    tanh,
)

if TYPE_CHECKING:
    from .compression import CompressError, compress
    from .decode import generate
    from .distill import Distiller, distillation_loss, hidden_state_loss
    from .prune import Shrink, shrink_
    from .quant import (
        Calibration,
        Gptq,
        Int4Int8Dynamic,
        Int4WeightOnly,
        Int8Dynamic,
        Int8WeightOnly,
        SmoothQuant,
        dequantize_,
        load,
        load_gguf,
        quantize_,
        save,
    )
    from .sparse import GradualSparsifier, Sparsify, sparsify_, strip_
    from .to_onnx import export

__version__ = "0.1.0"

__all__ = [
    "Calibration",
    "CompressError",
    "Distiller",
    "Explanation",
    "Gptq",
    "GradualSparsifier",
    "Int4Int8Dynamic",
    "Int4WeightOnly",
    "Int8Dynamic",
    "Int8WeightOnly",
    "KVCache",
    "KernelRun",
    "Report",
    "Shrink",
    "SmoothQuant",
    "Sparsify",
    "__version__",
    "accelerate",
    "add_layer_norm",
    "add_rms_norm",
    "attention_varlen",
    "attention_with_kv_cache",
    "block_sparse_linear",
    "block_sparse_linear_int8",
    "compress",
    "cross_entropy",
    "dequantize_",
    "distillation_loss",
    "dropout_add",
    "explain",
    "export",
    "geglu",
    "gelu",
    "generate",
    "hardswish",
    "hidden_state_loss",
    "info",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
    "linear_groupwise",
    "linear_int8",
    "load",
    "load_gguf",
    "log_softmax",
    "masked_softmax",
    "memory",
    "mlp",
    "nn",
    "ops",
    "quantize_",
    "record",
    "reglu",
    "relu",
    "relu2",
    "rms_norm",
    "rope",
    "rope_tables",
    "save",
    "scaled_dot_product_attention",
    "shrink_",
    "sigmoid",
    "silu",
    "softmax",
    "sparse",
    "sparsify_",
    "strip_",
    "swiglu",
    "swiglu_mlp",
    "tanh",
    "use_backend",
]

_LATER = {
    "compression": ("CompressError", "compress"),
    "decode": ("generate",),
    "distill": ("Distiller", "distillation_loss", "hidden_state_loss"),
    "prune": ("Shrink", "shrink_"),
    "quant": (
        "Calibration",
        "Gptq",
        "Int4Int8Dynamic",
        "Int4WeightOnly",
        "Int8Dynamic",
        "Int8WeightOnly",
        "SmoothQuant",
        "dequantize_",
        "load",
        "load_gguf",
        "quantize_",
        "save",
    ),
    "sparse": ("GradualSparsifier", "Sparsify", "sparsify_", "strip_"),
    "to_onnx": ("export",),
}
"""Module -> the public names that come from it, loaded where they are first asked for: `import fastnn` stays quick."""


def __getattr__(name: str) -> Any:
    for source, names in _LATER.items():
        if name == source or name in names:
            module = importlib.import_module(f".{source}", __name__)
            return module if name == source else getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

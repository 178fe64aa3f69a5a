"""The C interface of the linear and attention launchers, called on tensors of any device by ctypes."""

from __future__ import annotations

import ctypes
from ctypes import c_bool, c_float, c_int32, c_int64, c_uint64, c_void_p
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

DTYPE_CODE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class Matrix(ctypes.Structure):
    """Matrix of csrc/params/linear.h."""

    _fields_ = [("data", c_void_p), ("row_stride", c_int64), ("col_stride", c_int64), ("dtype", c_int32)]


class LinearParams(ctypes.Structure):
    """LinearParams of csrc/params/linear.h."""

    _fields_ = [
        *((name, c_int64) for name in ("M", "N", "K")),
        ("x", Matrix),
        ("w", Matrix),
        ("is_packed", c_bool),
        ("packed", c_void_p),
        ("bias", c_void_p),
        ("bias_stride", c_int64),
        ("activation", c_int32),
        ("y", c_void_p),
        ("pre", c_void_p),
    ]


class LinearBwdParams(ctypes.Structure):
    """LinearBwdParams of csrc/params/linear.h."""

    _fields_ = [
        *((name, c_int64) for name in ("M", "N", "K")),
        ("dy", Matrix),
        ("x", Matrix),
        ("w", Matrix),
        ("slope", c_void_p),
        ("activation", c_int32),
        *((name, c_void_p) for name in ("dx", "dw", "db")),
    ]


class Heads(ctypes.Structure):
    """Heads of csrc/params/attention.h."""

    _fields_ = [
        ("data", c_void_p),
        *((name, c_int64) for name in ("batch_stride", "head_stride", "row_stride")),
    ]


class AttentionParams(ctypes.Structure):
    """AttentionParams of csrc/params/attention.h."""

    _fields_ = [
        *((name, c_int64) for name in ("B", "H", "H_kv", "S_q", "S_k", "D", "D_v")),
        *((name, Heads) for name in ("q", "k", "v")),
        ("dtype", c_int32),
        ("scale", c_float),
        ("softcap", c_float),
        ("window_left", c_int64),
        ("window_right", c_int64),
        ("position", c_int64),
        ("mask_kind", c_int32),
        ("mask_dtype", c_int32),
        ("mask", c_void_p),
        ("mask_strides", c_int64 * 4),
        ("dropout", c_float),
        ("seed", c_uint64),
        ("first_draw", c_uint64),
        ("lse_head_stride", c_int64),
    ]


class AttentionFwdParams(ctypes.Structure):
    """AttentionFwdParams of csrc/params/attention.h."""

    _fields_ = [
        ("a", AttentionParams),
        ("out", c_void_p),
        *((name, c_int64) for name in ("out_batch_stride", "out_head_stride", "out_row_stride")),
        ("lse", c_void_p),
    ]


class AttentionBwdParams(ctypes.Structure):
    """AttentionBwdParams of csrc/params/attention.h."""

    _fields_ = [
        ("a", AttentionParams),
        ("out", Heads),
        ("d_out", Heads),
        *((name, c_void_p) for name in ("lse", "dq", "dk", "dv")),
        ("strides", c_int64 * 9),
    ]


def _pointer(t: Tensor | None) -> int | None:
    return None if t is None else t.data_ptr()


def matrix(t: Tensor) -> Matrix:
    """A 2-d tensor as the launchers take it."""
    return Matrix(t.data_ptr(), t.stride(0), t.stride(1), DTYPE_CODE[t.dtype])


def heads(t: Tensor) -> Heads:
    """A 4-d tensor (B, heads, length, features), features next to each other."""
    return Heads(t.data_ptr(), t.stride(0), t.stride(1), t.stride(2))


def poisoned(*shape: int, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Memory that shows what was not written."""
    return torch.full(shape, float("nan"), dtype=dtype or like.dtype, device=like.device)


class Launchers:
    """A library that holds launchers: kernels for a GPU, or emulated."""

    def __init__(self, path: str | Path) -> None:
        self.lib = ctypes.CDLL(str(path))

    def call(self, name: str, params: Any, device: torch.device, *flags: int) -> None:
        """Allocates the workspace, launches on the current stream and raises on a CUDA error."""
        size = getattr(self.lib, f"{name}_workspace")
        size.restype = c_int64
        workspace = torch.full((size(ctypes.byref(params)),), 255, dtype=torch.uint8, device=device)
        stream = torch.cuda.current_stream().cuda_stream if device.type == "cuda" else None
        code = getattr(self.lib, name)(ctypes.byref(params), *flags, c_void_p(_pointer(workspace)), c_void_p(stream))
        if code != 0:
            raise RuntimeError(f"{name}: CUDA error {code}")

    def linear_fwd(
        self, x: Tensor, w: Tensor, bias: Tensor | None, activation: int, save_pre: bool, tf32: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """(y, pre-activation) of x (M, K), w (N, K)."""
        (m, k), n = x.shape, w.shape[0]
        y = poisoned(m, n, like=x)
        pre = poisoned(m, n, like=x) if save_pre else None
        stride = 0 if bias is None else bias.stride(0)
        p = LinearParams(
            m, n, k, matrix(x), matrix(w), False, None, _pointer(bias), stride, activation, y.data_ptr(), _pointer(pre)
        )
        self.call("fastnn_cuda_linear_fwd", p, x.device, int(tf32))
        return y, pre

    def linear_bwd(
        self,
        dy: Tensor,
        x: Tensor,
        w: Tensor,
        slope: Tensor | None,
        activation: int,
        wanted: tuple[bool, ...],
        tf32: bool = False,
    ) -> tuple[Tensor | None, ...]:
        """(dx, dw, db), None where not wanted."""
        (m, k), n = x.shape, w.shape[0]
        shapes = ((m, k), (n, k), (n,))
        found = tuple(poisoned(*s, like=x) if want else None for s, want in zip(shapes, wanted, strict=True))
        p = LinearBwdParams(
            m, n, k, matrix(dy), matrix(x), matrix(w), _pointer(slope), activation, *(_pointer(t) for t in found)
        )
        self.call("fastnn_cuda_linear_bwd", p, x.device, int(tf32))
        return found

    def attention_params(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        seed: int,
        options: tuple[float, float, float, int, int],
    ) -> AttentionParams:
        """The parameters that forward and backward share; options as fastnn.ops.attention.AttentionOptions."""
        dropout, scale, softcap, left, right = options
        b, h, s_q, d = q.shape
        p = AttentionParams(b, h, k.shape[1], s_q, k.shape[2], d, v.shape[3], heads(q), heads(k), heads(v))
        p.dtype, p.scale, p.softcap, p.window_left, p.window_right = DTYPE_CODE[q.dtype], scale, softcap, left, right
        p.dropout, p.seed, p.lse_head_stride = dropout, seed, s_q
        if mask is not None:
            p.mask_kind = 1 if mask.dtype == torch.bool else 2
            p.mask_dtype = DTYPE_CODE.get(mask.dtype, 0)
            p.mask = mask.data_ptr()
            full = (1,) * (4 - mask.dim()) + tuple(mask.shape)
            strides = (0,) * (4 - mask.dim()) + mask.stride()
            p.mask_strides[:] = [0 if n == 1 else s for n, s in zip(full, strides, strict=True)]
        return p

    def attention_fwd(self, q: Tensor, k: Tensor, v: Tensor, **more: Any) -> tuple[Tensor, Tensor]:
        """(out, lse) of 4-d tensors; out is laid out as q is."""
        b, h, s, _ = q.shape
        d = v.shape[3]
        by_rows = q.stride(1) < q.stride(2)
        out = poisoned(b, s, h, d, like=q).transpose(1, 2) if by_rows else poisoned(b, h, s, d, like=q)
        lse = poisoned(b, h, s, like=q, dtype=torch.float32)
        a = self.attention_params(q, k, v, **more)
        p = AttentionFwdParams(a, out.data_ptr(), out.stride(0), out.stride(1), out.stride(2), lse.data_ptr())
        self.call("fastnn_cuda_attention_fwd", p, q.device)
        return out, lse

    def attention_bwd(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, **more: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(dq, dk, dv), contiguous."""
        found = tuple(poisoned(*t.shape, like=t) for t in (q, k, v))
        a = self.attention_params(q, k, v, **more)
        p = AttentionBwdParams(a, heads(out), heads(grad), lse.data_ptr(), *(t.data_ptr() for t in found))
        self.call("fastnn_cuda_attention_bwd", p, q.device)
        return found[0], found[1], found[2]

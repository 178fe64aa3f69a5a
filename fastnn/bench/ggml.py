"""One dense layer on ggml's kernels, by ctypes: llama.cpp's product of 4-bit weights, without llama.cpp's models.

The libraries are those that llama-cpp-python brings. The weight lies where llama.cpp would put it: in the buffer type
of its CPU device that repacks blocks for this machine, where that type takes it.
"""

from __future__ import annotations

import ctypes
import importlib.util
import itertools
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

BLOCK = 32
"""Columns of a block of Q4_0: a scale of 16 bits, then a byte for columns i and i + 16."""

_F32, _Q4_0 = 0, 2  # enum ggml_type
_CPU = 0  # enum ggml_backend_dev_type
_SUCCESS = 0  # enum ggml_status


class _InitParams(ctypes.Structure):
    _fields_ = (("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


class _Library:
    """The functions of ggml that a layer needs, all pointers opaque."""

    def __init__(self, folder: Path) -> None:
        def library(name: str) -> ctypes.CDLL:
            return ctypes.CDLL(str(next(folder.glob(f"lib{name}.*"))), mode=ctypes.RTLD_GLOBAL)

        base, cpu, registry = library("ggml-base"), library("ggml-cpu"), library("ggml")
        pointer, size, integer, long = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int64

        def function(owner: ctypes.CDLL, name: str, result: object, *arguments: object) -> Callable[..., Any]:
            found = getattr(owner, name)
            found.restype, found.argtypes = result, arguments
            return found

        self.init = function(base, "ggml_init", pointer, _InitParams)
        self.free = function(base, "ggml_free", None, pointer)
        self.tensor = function(base, "ggml_new_tensor_2d", pointer, pointer, integer, long, long)
        self.vector = function(base, "ggml_new_tensor_1d", pointer, pointer, integer, long)
        self.mul_mat = function(base, "ggml_mul_mat", pointer, pointer, pointer, pointer)
        self.add = function(base, "ggml_add", pointer, pointer, pointer, pointer)
        self.graph = function(base, "ggml_new_graph", pointer, pointer)
        self.expand = function(base, "ggml_build_forward_expand", None, pointer, pointer)
        self.allocate = function(base, "ggml_backend_alloc_ctx_tensors_from_buft", pointer, pointer, pointer)
        self.release = function(base, "ggml_backend_buffer_free", None, pointer)
        self.name_of = function(base, "ggml_backend_buft_name", ctypes.c_char_p, pointer)
        self.set = function(base, "ggml_backend_tensor_set", None, pointer, pointer, size, size)
        self.get = function(base, "ggml_backend_tensor_get", None, pointer, pointer, size, size)
        self.data = function(base, "ggml_get_data", pointer, pointer)
        self.compute = function(base, "ggml_backend_graph_compute", integer, pointer, pointer)
        self.close = function(base, "ggml_backend_free", None, pointer)
        self.host = function(cpu, "ggml_backend_cpu_buffer_type", pointer)
        self.backend = function(cpu, "ggml_backend_cpu_init", pointer)
        self.threads = function(cpu, "ggml_backend_cpu_set_n_threads", None, pointer, integer)
        device = function(registry, "ggml_backend_dev_by_type", pointer, integer)(_CPU)
        reg = function(base, "ggml_backend_dev_backend_reg", pointer, pointer)(device)
        address = function(base, "ggml_backend_reg_get_proc_address", pointer, pointer, ctypes.c_char_p)
        extra = address(reg, b"ggml_backend_dev_get_extra_bufts")
        types = ctypes.CFUNCTYPE(ctypes.POINTER(pointer), pointer)(extra)(device) if extra else ()
        ended = itertools.takewhile(bool, types)
        self.repacking = next((kind for kind in ended if b"REPACK" in self.name_of(kind)), None)
        self._silent = ctypes.CFUNCTYPE(None, integer, ctypes.c_char_p, pointer)(lambda *line: None)
        function(base, "ggml_log_set", None, pointer, pointer)(ctypes.cast(self._silent, pointer), None)


@cache
def _library() -> _Library:
    found = importlib.util.find_spec("llama_cpp")
    if found is None or found.origin is None:
        raise ImportError("ggml: llama_cpp is not installed")
    return _Library(Path(found.origin).parent / "lib")


def q4_0(codes: Tensor, scale: Tensor) -> Tensor:
    """The bytes of Q4_0 of codes (N, K) in 0..15 and scales (N, K / 32): a value is scale * (code - 8)."""
    n, k = codes.shape
    halves = codes.to(torch.uint8).view(n, k // BLOCK, 2, BLOCK // 2)
    scales = scale.half().contiguous().view(torch.uint8).view(n, k // BLOCK, 2)
    return torch.cat((scales, halves[:, :, 0] | halves[:, :, 1] << 4), -1).contiguous()


class Q4Layer:
    """input @ weight.T + bias in float32, the weight in Q4_0, on the CPU device of ggml."""

    def __init__(self, codes: Tensor, scale: Tensor, bias: Tensor, rows: int, threads: int) -> None:
        lib = self._lib = _library()
        (n, k), size = codes.shape, 1 << 20
        self._shape = rows, n
        weights, rest = (lib.init(_InitParams(size, None, True)) for _ in range(2))
        weight = lib.tensor(weights, _Q4_0, k, n)
        self._input, added = lib.tensor(rest, _F32, k, rows), lib.vector(rest, _F32, n)
        self._output = lib.add(rest, lib.mul_mat(rest, weight, self._input), added)
        self._graph = lib.graph(rest)
        lib.expand(self._graph, self._output)
        where = lib.repacking or lib.host()
        self._held = (weights, rest), (lib.allocate(weights, where), lib.allocate(rest, lib.host()))
        if not all(self._held[1]):
            raise MemoryError("ggml: no memory for the layer")
        self._backend = lib.backend()
        lib.threads(self._backend, threads)
        blocks, bias = q4_0(codes, scale), bias.float().contiguous()
        lib.set(weight, blocks.data_ptr(), 0, blocks.numel())
        lib.set(added, bias.data_ptr(), 0, 4 * n)

    def __call__(self, x: Tensor) -> Tensor:
        """(rows, K) in float32 to (rows, N); the result is ggml's own memory, written again by the next call."""
        ctypes.memmove(self._lib.data(self._input), x.data_ptr(), 4 * x.numel())
        status = self._lib.compute(self._backend, self._graph)
        if status != _SUCCESS:
            raise RuntimeError(f"ggml: computing failed with status {status}")
        rows, n = self._shape
        memory = (ctypes.c_float * (rows * n)).from_address(self._lib.data(self._output))
        return torch.frombuffer(memory, dtype=torch.float32).view(rows, n)

    def __del__(self) -> None:
        for buffer in self._held[1]:
            self._lib.release(buffer)
        for context in self._held[0]:
            self._lib.free(context)
        self._lib.close(self._backend)

"""Reading GGUF files: their codes into our layers as they are, without rounding anything again.

The format is the one that ggml documents: a header, metadata, a description of each tensor, and their
data. Its blocks of 32 are our groups of 32: Q4_0 is scale * (code - 8), Q4_1 scale * code + offset, Q8_0 scale * code,
scales and offsets float16.
"""

from __future__ import annotations

import mmap
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import nn
from .container import FormatError

BLOCK = 32
"""Of a row, in one block of codes."""

_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
_PLAIN = {0: ("F32", torch.float32), 1: ("F16", torch.float16), 30: ("BF16", torch.bfloat16)}
_CODES = {2: ("Q4_0", 18), 3: ("Q4_1", 20), 8: ("Q8_0", 34)}  # bytes of a block
_MOST_DIMENSIONS = 4
_MOST_NESTING = 4


@dataclass(frozen=True)
class GgufTensor:
    """One tensor of a file, not read yet."""

    name: str
    kind: str
    """F32, F16, BF16, Q4_0, Q4_1, Q8_0; of any other, its number in the format."""
    shape: tuple[int, ...]
    """As torch has it: the last dimension is the one along which neighbours lie in the file."""
    start: int
    nbytes: int
    """Where its data are in the file; 0 bytes of a kind that is not known."""


class _Reader:
    """Numbers and strings out of the file, one after the other."""

    def __init__(self, path: Path, data: memoryview) -> None:
        self.path, self.data, self.at = path, data, 0

    def fail(self, what: str) -> FormatError:
        return FormatError(f"{self.path}: no GGUF file that can be read: {what}")

    def skip(self, count: int) -> int:
        start = self.at
        if count > len(self.data) - start:
            raise self.fail(f"{count} bytes wanted at {start}, and it ends at {len(self.data)}")
        self.at = start + count
        return start

    def number(self, code: str) -> Any:
        return struct.unpack_from(code, self.data, self.skip(struct.calcsize(code)))[0]

    def string(self) -> str:
        length = self.number("<Q")
        start = self.skip(length)
        try:
            return bytes(self.data[start : start + length]).decode("utf-8")
        except UnicodeDecodeError:
            raise self.fail(f"the text at {start} is not UTF-8") from None

    def value(self, kind: int, nesting: int = 0) -> Any:
        """A value; arrays are passed over: a vocabulary takes more memory than the file."""
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY or nesting >= _MOST_NESTING:
            raise self.fail(f"a value of kind {kind} at {self.at}")
        inner, count = self.number("<I"), self.number("<Q")
        if inner in _SCALARS:
            self.skip(struct.calcsize(_SCALARS[inner]) * count)
            return None
        if count > (len(self.data) - self.at) // 8:
            raise self.fail(f"an array of {count} at {self.at}")
        for _ in range(count):
            if inner == _STRING:
                self.skip(self.number("<Q"))
            else:
                self.value(inner, nesting + 1)
        return None


class Gguf:
    """An opened GGUF file (version 2 or 3, little-endian). A context manager; reading opens no more than the file.

    Args:
        path: the file.

    Raises:
        FormatError: (a ValueError) it is truncated, or no such file.
        OSError: it cannot be read.
    """

    metadata: dict[str, Any]
    """Numbers, truth values and strings; None for an array."""
    tensors: dict[str, GgufTensor]

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        with self.path.open("rb") as file:
            if not os.fstat(file.fileno()).st_size:
                raise FormatError(f"{self.path}: no GGUF file that can be read: it is empty")
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        reader = _Reader(self.path, memoryview(self._map))
        known = False
        try:
            self._read(reader)
            known = True
        finally:
            reader.data.release()
            if not known:
                self.close()

    def __enter__(self) -> Gguf:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Lets go of the file; tensors that were read stay."""
        self._map.close()

    def _read(self, reader: _Reader) -> None:
        if reader.number("<4s") != b"GGUF":
            raise reader.fail("it does not begin with GGUF")
        version, tensors, values = reader.number("<I"), reader.number("<Q"), reader.number("<Q")
        if version not in (2, 3):
            raise reader.fail(f"version {version}; 2 and 3 are known")
        self.metadata = {}
        for _ in range(values):
            key = reader.string()
            if key in self.metadata:
                raise reader.fail(f"{key!r} occurs twice")
            self.metadata[key] = reader.value(reader.number("<I"))
        alignment = self.metadata.get("general.alignment", 32)
        if type(alignment) is not int or alignment < 8 or alignment % 8:
            raise reader.fail(f"general.alignment is {alignment!r}")
        described = [self._describe(reader) for _ in range(min(tensors, len(reader.data)))]
        begin = (reader.at + alignment - 1) // alignment * alignment
        self.tensors = {}
        end = 0
        for name, kind, shape, offset in sorted(described, key=lambda one: one[3]):
            label, nbytes = _size(reader, name, kind, shape)
            if name in self.tensors or offset % alignment or offset < end or begin + offset + nbytes > len(reader.data):
                raise reader.fail(f"the data of {name!r} lie where they cannot")
            self.tensors[name] = GgufTensor(name, label, shape, begin + offset, nbytes)
            end = offset + nbytes

    @staticmethod
    def _describe(reader: _Reader) -> tuple[str, int, tuple[int, ...], int]:
        name, dimensions = reader.string(), reader.number("<I")
        if dimensions > _MOST_DIMENSIONS:
            raise reader.fail(f"{name!r} has {dimensions} dimensions")
        shape = tuple(reader.number("<Q") for _ in range(dimensions))[::-1]
        return name, reader.number("<I"), shape, reader.number("<Q")

    def entry(self, name: str) -> GgufTensor:
        """What the file says of a tensor; KeyError where it has none of that name."""
        if name not in self.tensors:
            raise KeyError(f"{self.path} has no tensor {name!r}")
        return self.tensors[name]

    def _data(self, entry: GgufTensor) -> Tensor:
        """The bytes, in memory of their own."""
        data = bytearray(self._map[entry.start : entry.start + entry.nbytes])
        return torch.frombuffer(data, dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)

    def tensor(self, name: str) -> Tensor:
        """A floating tensor (F32, F16, BF16), bit for bit.

        Raises:
            KeyError: there is none of that name.
            TypeError: it is one of codes.
        """
        entry = self.entry(name)
        dtype = dict(_PLAIN.values()).get(entry.kind)
        if dtype is None:
            raise TypeError(f"{self.path}: {name!r} is of kind {entry.kind}, not a floating tensor")
        return self._data(entry).view(dtype).reshape(entry.shape)

    def codes(self, name: str) -> tuple[Tensor, Tensor, Tensor | None]:
        """Codes, scale and offset (or None) of a Q4_0, Q4_1 or Q8_0 tensor, as `fastnn.linear_groupwise` takes them.

        The groups are of 32. Every code, scale and offset is the file's.

        Raises:
            KeyError: there is none of that name.
            TypeError: it is of another kind or does not have two dimensions.
            FormatError: a scale that is not finite.
        """
        entry = self.entry(name)
        size = dict(_CODES.values()).get(entry.kind)
        if size is None or len(entry.shape) != 2:
            raise TypeError(
                f"{self.path}: {name!r} is {entry.kind} {entry.shape}; Q4_0, Q4_1 or Q8_0 matrices have codes"
            )
        rows, columns = entry.shape
        blocks = self._data(entry).reshape(rows, columns // BLOCK, size)
        halves = 2 if entry.kind == "Q4_1" else 1
        ends = blocks[..., : 2 * halves].contiguous().view(torch.float16)
        if not bool(ends.isfinite().all()):
            raise FormatError(f"{self.path}: {name!r} has scales that are not finite")
        scale, offset = ends[..., 0].contiguous(), ends[..., 1].contiguous() if halves == 2 else None
        data = blocks[..., 2 * halves :]
        if entry.kind == "Q8_0":
            return data.reshape(rows, columns).view(torch.int8), scale, None
        even, odd = data[..., 0::2], data[..., 1::2]  # byte j: code j low, code 16 + j high
        low, high = (even & 15) | (odd << 4), (even >> 4) | (odd & 0xF0)
        return torch.cat((low, high), -1).reshape(rows, columns // 2), scale, offset

    def linear(
        self,
        name: str,
        bias: torch.nn.Parameter | None = None,
        *,
        rows: Tensor | None = None,
        int8_input: bool = False,
    ) -> nn.GroupwiseLinear:
        """A dense layer on the codes of a tensor, its row i the file's row `rows[i]`; see `codes` for what is raised.

        `int8_input` is for codes of 4 bits; those of 8 bits multiply inputs as they are.
        """
        codes, scale, offset = self.codes(name)
        if rows is not None:  # a group lies within a row: nothing is rounded again
            codes, scale, offset = codes[rows], scale[rows], None if offset is None else offset[rows]
        outputs, columns = self.tensors[name].shape
        layer: nn.GroupwiseLinear
        if codes.dtype == torch.int8:
            layer = nn.Int8WeightOnlyLinear(columns, outputs, False, "meta", group_size=BLOCK)
        else:
            layer = nn.Int4Linear(
                columns, outputs, False, "meta", group_size=BLOCK, symmetric=offset is None, int8_input=int8_input
            )
        layer.weight, layer.weight_scale, layer.weight_offset, layer.bias = codes, scale, offset, bias
        return layer

    def embedding(self, name: str, dtype: torch.dtype = torch.float32) -> nn.GroupwiseEmbedding:
        """A table on the codes of a tensor, with results of type `dtype`; see `codes` for what is raised."""
        codes, scale, offset = self.codes(name)
        kind = nn.Int8Embedding if codes.dtype == torch.int8 else nn.Int4Embedding
        rows, columns = self.tensors[name].shape
        table = kind(rows, columns, "meta", dtype, group_size=BLOCK, symmetric=offset is None)
        table.weight, table.weight_scale, table.weight_offset = codes, scale, offset
        return table


def _size(reader: _Reader, name: str, kind: int, shape: tuple[int, ...]) -> tuple[str, int]:
    """The kind's name, and the bytes of a tensor."""
    count = 1
    for size in shape:
        count *= size
    if kind in _PLAIN:
        return _PLAIN[kind][0], count * _PLAIN[kind][1].itemsize
    if kind not in _CODES:
        return str(kind), 0
    if not shape or shape[-1] % BLOCK:
        raise reader.fail(f"{name!r} of shape {shape} has no whole blocks")
    return _CODES[kind][0], count // BLOCK * _CODES[kind][1]

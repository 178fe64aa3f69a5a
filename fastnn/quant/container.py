"""One safetensors file: a JSON header and plain tensors, with checksums; written whole or not at all, no pickle.

The format is safetensors' own, so anything that reads it reads the tensors: eight bytes of header length, the header,
the data without gaps. Its metadata has two strings of ours: `fastnn`, JSON with what the caller wants kept and a
SHA-256 of each tensor's bytes, and `digest`, the SHA-256 of the header with the digest itself as zeros.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""safetensors' names."""

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_LENGTH = struct.Struct("<Q")
_MOST_HEADER = 100 << 20
_ZEROS = "0" * 64


class FormatError(ValueError):
    """The file is not what `fastnn.save` wrote: truncated, altered, or somebody else's."""


def bytes_of(t: Tensor) -> memoryview:
    """The tensor's memory, little-endian, in row-major order."""
    flat = t.detach().cpu().contiguous().reshape(-1)
    bytes_: Any = flat.view(torch.uint8).numpy() if flat.numel() else b""
    return memoryview(bytes_)


def write(path: Path, tensors: Mapping[str, Tensor], kept: Mapping[str, Any]) -> None:
    """Writes the file, whole or not at all (`replace`).

    Args:
        path: where; its folder exists.
        tensors: dense, of the types in `DTYPES`.
        kept: whatever JSON holds, given back by `read`.

    Raises:
        TypeError: a tensor that cannot be stored.
        OSError: the file cannot be written.
    """
    header: dict[str, Any] = {}
    sums: dict[str, str] = {}
    offset = 0
    for name, t in tensors.items():
        if t.layout is not torch.strided or t.is_meta or t.dtype not in _NAMES or name == "__metadata__":
            raise TypeError(f"fastnn.save: cannot store {name!r}, a {t.layout} tensor of {t.dtype} on {t.device}")
        end = offset + t.numel() * t.element_size()
        header[name] = {"dtype": _NAMES[t.dtype], "shape": list(t.shape), "data_offsets": [offset, end]}
        sums[name], offset = hashlib.sha256(bytes_of(t)).hexdigest(), end
    ours = json.dumps({**kept, "sha256": sums})
    text = json.dumps({"__metadata__": {"format": "pt", "fastnn": ours, "digest": _ZEROS}, **header})
    raw = (text + " " * (-len(text.encode()) % 8)).encode()
    digest = hashlib.sha256(raw).hexdigest()
    raw = raw.replace(_ZEROS.encode(), digest.encode(), 1)
    if len(raw) > _MOST_HEADER:
        raise TypeError(f"fastnn.save: the names of {len(tensors)} tensors take more than {_MOST_HEADER} bytes")
    replace(path, [_LENGTH.pack(len(raw)), raw, *(bytes_of(t) for t in tensors.values())])


def replace(path: Path, parts: Sequence[bytes | memoryview]) -> None:
    """Writes a file beside `path`, syncs it to the disk and renames it: a reader sees the old or the new one, whole."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    written = False
    try:
        with os.fdopen(handle, "wb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
        written = True
    finally:
        if not written:
            os.unlink(temporary)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the name, too
    finally:
        os.close(folder)


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors, each in memory of its own, and what was kept beside them.

    Allocates no more than the file's size for the data, and runs nothing from the file.

    Raises:
        FormatError: a file that `write` did not write, or that was changed since.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        header, start = _header(path, file, size)
        ours = _ours(path, header)
        tensors = _entries(path, header, size - start)
        found = {}
        for name, (dtype, shape, count) in tensors.items():
            data = bytearray(count)
            if file.readinto(data) != count or hashlib.sha256(data).hexdigest() != ours["sha256"][name]:
                raise FormatError(f"{path}: the data of {name!r} were changed since they were written")
            flat = torch.frombuffer(data, dtype=torch.uint8) if count else torch.empty(0, dtype=torch.uint8)
            found[name] = flat.view(dtype).reshape(shape)
    del ours["sha256"]
    return found, ours


def _header(path: Path, file: BinaryIO, size: int) -> tuple[dict[str, Any], int]:
    """The header, checked against its digest, and where the data start."""
    if size < _LENGTH.size:
        raise FormatError(f"{path}: {size} bytes are no safetensors file")
    (length,) = _LENGTH.unpack(file.read(_LENGTH.size))
    if not 2 <= length <= min(_MOST_HEADER, size - _LENGTH.size):
        raise FormatError(f"{path}: {size} bytes have no header of {length}: truncated, or no safetensors file")
    raw = file.read(length)
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_no_doubles)
        digest = header["__metadata__"]["digest"]
        same = hashlib.sha256(raw.replace(digest.encode("ascii"), _ZEROS.encode(), 1)).hexdigest() == digest
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise FormatError(f"{path}: its header is not that of a file of fastnn.save ({type(error).__name__})") from None
    if not same:
        raise FormatError(f"{path}: its header was changed since it was written")
    return header, _LENGTH.size + length


def _no_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name occurs twice")
    return found


def _ours(path: Path, header: dict[str, Any]) -> dict[str, Any]:
    try:
        ours = json.loads(header.pop("__metadata__")["fastnn"])
        if not isinstance(ours, dict) or ours["sha256"].keys() != header.keys():
            raise ValueError
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise FormatError(f"{path}: its metadata are not those of fastnn.save") from None
    return ours


def _entries(path: Path, header: dict[str, Any], size: int) -> dict[str, tuple[torch.dtype, list[int], int]]:
    """Name -> (type, shape, bytes), in the order of the data, which they cover without gaps."""
    found: dict[str, tuple[torch.dtype, list[int], int]] = {}
    end = 0
    try:
        for name, entry in sorted(header.items(), key=lambda item: tuple(item[1]["data_offsets"])):
            dtype, shape, (start, stop) = DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
            if any(type(n) is not int or n < 0 for n in (*shape, start, stop)):
                raise ValueError
            if start != end or stop - start != math.prod(shape) * dtype.itemsize or stop > size:
                raise ValueError
            found[name], end = (dtype, shape, stop - start), stop
    except (ValueError, KeyError, TypeError):
        raise FormatError(f"{path}: its tensors do not cover its data") from None
    if end != size:
        raise FormatError(f"{path}: {size} bytes of data, {end} belong to tensors: truncated, or something was added")
    return found

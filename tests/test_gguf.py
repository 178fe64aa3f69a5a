"""GGUF files: every code and scale comes over as it is, and damaged files give one clear error."""

from __future__ import annotations

import random
import struct

import pytest
import torch
from torch import nn

import fastnn
from fastnn.nn import Int4Embedding, Int4Linear, Int8WeightOnlyLinear
from fastnn.quant import FormatError, Gguf, load_gguf
from fastnn.testing import same_bits

KINDS = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 8, "BF16": 30}


def text(value):
    return struct.pack("<Q", len(value.encode())) + value.encode()


def blocks_of(kind, rows, columns, seed, size=1.0):
    """Random blocks as the format has them, and the values they stand for, block by block."""
    rng = random.Random(seed)
    data, values = bytearray(), torch.empty(rows, columns, dtype=torch.float64)
    for r in range(rows):
        for first in range(0, columns, 32):
            ends = torch.tensor([rng.uniform(-size, size), rng.uniform(-size, size)]).half()
            d, m = ends.double().tolist()
            data += ends[: 2 if kind == "Q4_1" else 1].numpy().tobytes()
            q = bytes(rng.randrange(256) for _ in range(32 if kind == "Q8_0" else 16))
            data += q
            for j in range(32):
                if kind == "Q8_0":
                    w = d * struct.unpack_from("<b", q, j)[0]
                else:
                    code = q[j] & 15 if j < 16 else q[j - 16] >> 4
                    w = d * (code - 8) if kind == "Q4_0" else d * code + m
                values[r, first + j] = w
    return bytes(data), values


def make_file(path, tensors, metadata=None, version=3, alignment=32):
    """tensors: name -> (kind, shape as torch has it, bytes)."""
    parts = [b"GGUF", struct.pack("<IQQ", version, len(tensors), len(metadata or ()))]
    for key, (kind, raw) in (metadata or {}).items():
        parts += [text(key), struct.pack("<I", kind), raw]
    offset, data = 0, b""
    for name, (kind, shape, raw) in tensors.items():
        parts += [text(name), struct.pack("<I", len(shape)), *(struct.pack("<Q", n) for n in shape[::-1])]
        parts += [struct.pack("<IQ", KINDS[kind], offset)]
        data += raw + bytes(-len(raw) % alignment)
        offset = len(data)
    header = b"".join(parts)
    path.write_bytes(header + bytes(-len(header) % alignment) + data)
    return path


METADATA = {
    "general.architecture": (8, text("llama")),
    "llama.block_count": (4, struct.pack("<I", 30)),
    "llama.rope.freq_base": (6, struct.pack("<f", 1e5)),
    "tokenizer.ggml.tokens": (9, struct.pack("<IQ", 8, 2) + text("a") + text("bc")),
    "tokenizer.ggml.scores": (9, struct.pack("<IQ", 6, 3) + bytes(12)),
    "general.flag": (7, b"\x01"),
}


@pytest.fixture
def made(tmp_path):
    found, values = {}, {}
    for i, (kind, shape) in enumerate({"Q4_0": (5, 96), "Q4_1": (10, 64), "Q8_0": (3, 64)}.items()):
        raw, values[kind] = blocks_of(kind, *shape, i)
        found[kind] = (kind, shape, raw)
    vector = torch.randn(7)
    found["norm"] = ("F32", (7,), vector.numpy().tobytes())
    found["half"] = ("F16", (7,), vector.half().numpy().tobytes())
    return make_file(tmp_path / "m.gguf", found, METADATA), values, vector


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0"])
def test_codes_are_those_of_the_file(made, kind):
    path, values, _ = made
    with Gguf(path) as file:
        layer, table = file.linear(kind), file.embedding(kind)
    assert torch.equal(layer.dequantized(torch.float64), values[kind])
    assert type(layer) is (Int8WeightOnlyLinear if kind == "Q8_0" else Int4Linear)
    x = torch.randn(4, values[kind].shape[1])
    truth = x.double() @ values[kind].T
    assert ((layer(x).double() - truth).abs() <= 1e-5 * truth.abs().max()).all()
    ids = torch.tensor([2, 0, 2])
    assert same_bits(table(ids), values[kind].float()[ids])


def test_metadata_and_floating_tensors(made):
    path, _, vector = made
    with Gguf(path) as file:
        assert file.metadata["general.architecture"] == "llama" and file.metadata["llama.block_count"] == 30
        assert file.metadata["tokenizer.ggml.tokens"] is None and file.metadata["general.flag"] is True
        assert same_bits(file.tensor("norm"), vector) and same_bits(file.tensor("half"), vector.half())
        for wrong in (lambda: file.tensor("Q4_0"), lambda: file.codes("norm")):
            with pytest.raises(TypeError, match="is"):
                wrong()
        with pytest.raises(KeyError, match="no tensor 'none'"):
            file.codes("none")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(10, 64)
        self.norm = nn.LayerNorm(64, bias=False)
        self.head = nn.Linear(64, 10)

    def forward(self, ids):
        return self.head(self.norm(self.embed(ids)))


def test_a_model_takes_the_tensors(made, tmp_path):
    path, values, _ = made
    with Gguf(path) as file:
        raw = file._map[file.tensors["Q4_1"].start :][: file.tensors["Q4_1"].nbytes]
    weight = torch.randn(64)
    path = make_file(
        tmp_path / "n.gguf",
        {
            "table": ("Q4_1", (10, 64), raw),
            "norm": ("BF16", (64,), weight.bfloat16().view(torch.int16).numpy().tobytes()),
        },
        version=2,
    )
    net = Net().eval()
    load_gguf(path, net, {"embed.weight": "table", "norm.weight": "norm", "head.weight": "table"})
    assert type(net.embed) is Int4Embedding and type(net.head) is Int4Linear
    assert net.head.weight is net.embed.weight and torch.equal(net.norm.weight, weight.bfloat16().float())
    expected = nn.functional.layer_norm(values["Q4_1"].float()[:3], (64,), net.norm.weight)
    expected = expected.double() @ values["Q4_1"].T + net.head.bias.double()
    assert ((net(torch.arange(3)).double() - expected).abs() <= 1e-5 * expected.abs().max()).all()
    fastnn.dequantize_(net)
    assert type(net.head) is nn.Linear and torch.equal(net.head.weight, values["Q4_1"].float())
    assert net.head.weight is net.embed.weight
    for names, error, words in (
        ({"head.weight": "none"}, KeyError, "no tensor"),
        ({"tail.weight": "table"}, KeyError, "no parameter"),
        ({"head.bias": "table"}, RuntimeError, "in the file"),
        ({"norm.weight": "norm", "head.bias": "norm"}, RuntimeError, "in the model"),
    ):
        before = {name: t.clone() for name, t in net.state_dict().items()}
        with pytest.raises(error, match=words):
            load_gguf(path, net, names)
        assert all(same_bits(t, before[name]) for name, t in net.state_dict().items())


def test_damaged_files_give_one_clear_error(made, tmp_path):
    """Cut anywhere: refused. With bytes changed in the header: refused, or what it says now is read within bounds."""
    path, _, _ = made
    good = path.read_bytes()
    with Gguf(path) as file:
        end = max(t.start + t.nbytes for t in file.tensors.values())
    bad = tmp_path / "bad.gguf"
    rng = random.Random(0)
    for cut in [*range(0, 700, 7), *(rng.randrange(end) for _ in range(200)), end - 1]:
        bad.write_bytes(good[:cut])
        with pytest.raises(FormatError, match="no GGUF file that can be read"):
            Gguf(bad)
    refused = 0
    for _ in range(700):
        changed = bytearray(good)
        for _ in range(rng.choice((1, 1, 3))):
            changed[rng.randrange(700)] = rng.choice((0, 1, 2, 127, 255, rng.randrange(256)))
        bad.write_bytes(changed)
        try:
            with Gguf(bad) as file:
                for name, tensor in file.tensors.items():
                    if tensor.kind.startswith("Q") and len(tensor.shape) == 2:
                        file.codes(name)
        except FormatError:
            refused += 1
    assert refused > 100


@pytest.mark.parametrize(
    ("at", "value", "words"),
    [
        (0, b"GGML", "begin with GGUF"),
        (4, struct.pack("<I", 1), "version 1"),
        (8, struct.pack("<Q", 2**63), "wanted"),
        (16, struct.pack("<Q", 2**63), "wanted"),
        (24, struct.pack("<Q", 2**62), "wanted"),
    ],
)
def test_sizes_of_the_header_are_not_trusted(made, tmp_path, at, value, words):
    data = bytearray(made[0].read_bytes())
    data[at : at + len(value)] = value
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(data)
    with pytest.raises(FormatError, match=words):
        Gguf(bad)


def test_tensors_that_lie_where_they_cannot(tmp_path):
    raw, _ = blocks_of("Q4_0", 2, 32, 0)
    path = tmp_path / "bad.gguf"
    for shape in ((2, 33), (2**40, 2**40), (4, 32), (2, 32, 1, 1, 1), ()):
        make_file(path, {"w": ("Q4_0", shape, raw)})
        with pytest.raises(FormatError, match="no GGUF file"):
            Gguf(path)
    make_file(path, {"w": ("Q4_0", (2, 32), b"\x00\x7c" + raw[2:])})
    with Gguf(path) as file, pytest.raises(FormatError, match="not finite"):
        file.codes("w")
    make_file(path, {"w": ("Q4_0", (2, 32), raw)}, {"general.alignment": (4, struct.pack("<I", 0))})
    with pytest.raises(FormatError, match="alignment"):
        Gguf(path)

"""save and load: bits come back, files are whole, and damaged ones give one clear error."""

from __future__ import annotations

import json
import random
import struct
import tracemalloc

import pytest
import torch
from torch import nn

import fastnn
from fastnn.nn import Int8Linear
from fastnn.quant import FormatError, container
from fastnn.testing import same_bits

INT8 = fastnn.Int8Dynamic()


class Net(nn.Module):
    """Float and int8 layers, ties of both, buffers of several types, nothing and a scalar."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(10, 6)
        self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), fastnn.nn.Linear(6, 5, False, activation="relu")
        self.b.weight = self.a.weight
        self.head = nn.Linear(6, 10, bias=False, dtype=torch.float32)
        self.head.weight = self.embed.weight
        self.register_buffer("rounded", torch.randn(3).bfloat16())
        self.register_buffer("mask", torch.tensor([[True, False]]))
        self.register_buffer("steps", torch.tensor(7 + seed))
        self.register_buffer("nothing", torch.empty(0, 4))

    def forward(self, ids):
        x = self.b(self.a(self.embed(ids)))
        return self.head(x).sum(-1) + self.c(x).sum(-1)


IDS = torch.arange(10)


@pytest.fixture
def net(extension):
    net = Net()
    fastnn.quantize_(net, INT8)
    assert [type(m) for m in (net.a, net.c, net.head)] == [Int8Linear, Int8Linear, nn.Linear]
    return net


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.safetensors"


def test_comes_back_bit_by_bit(net, path):
    fastnn.save(net, path)
    for fresh in (Net(1), net, _quantised(Net(2))):
        loaded = fastnn.load(path, fresh)
        assert loaded is fresh and list(fresh.state_dict()) == list(net.state_dict())
        for name, t in net.state_dict().items():
            assert same_bits(fresh.state_dict()[name], t), name
        assert fresh.a.weight is fresh.b.weight and fresh.head.weight is fresh.embed.weight
        assert fresh.c.activation == "relu" and fresh.a.bias.requires_grad
        assert same_bits(fresh(IDS).detach(), net(IDS).detach())


def _quantised(model):
    fastnn.quantize_(model, INT8)
    return model


def test_without_a_model_it_is_the_state_dict(net, path):
    fastnn.save(net, path)
    state = fastnn.load(str(path))
    assert set(state) == set(net.state_dict())
    assert all(same_bits(state[name], t) for name, t in net.state_dict().items())


def test_shared_tensors_are_stored_once(net, path):
    fastnn.save(net, path)
    tensors, kept = container.read(path)
    assert set(kept["shared"]) == {"b.weight", "b.weight_scale", "head.weight"}
    assert not set(kept["shared"]) & set(tensors)


def test_safetensors_reads_it(net, path):
    safetensors = pytest.importorskip("safetensors.torch")
    fastnn.save(net, path)
    theirs, (ours, _) = safetensors.load_file(path), container.read(path)
    assert set(theirs) == set(ours) and all(same_bits(theirs[name], t) for name, t in ours.items())


def test_conv1d_and_a_lone_layer(path, extension):
    pytorch_utils = pytest.importorskip("transformers.pytorch_utils")
    for make in (lambda: pytorch_utils.Conv1D(4, 6), lambda: nn.Linear(6, 4)):
        layer, x = make(), torch.randn(3, 6)
        nn.init.normal_(layer.weight)
        fastnn.quantize_(layer, INT8)
        fastnn.save(layer, path)
        assert same_bits(fastnn.load(path, make())(x).detach(), layer(x).detach())


def test_models_that_do_not_fit_are_left_as_they_were(net, path):
    fastnn.save(net, path)
    other = Net(1)
    other.c = nn.Linear(6, 7, bias=False)
    before = {name: t.clone() for name, t in other.state_dict().items()}
    with pytest.raises(RuntimeError, match=r"c\.weight is \(5, 6\) in the file, \(7, 6\) in the model"):
        fastnn.load(path, other)
    other.c = nn.Identity()
    with pytest.raises(RuntimeError, match="c is no dense layer"):
        fastnn.load(path, other)
    fastnn.save(Net(), path)
    with pytest.raises(RuntimeError, match=r"the file lacks \w+\.weight_scale"):
        fastnn.load(path, net)
    assert type(other.a) is nn.Linear
    assert all(same_bits(t, before[name]) for name, t in other.state_dict().items() if name in before)


def test_old_file_stays_where_writing_fails(net, path, monkeypatch):
    fastnn.save(net, path)
    before = path.read_bytes()
    net.register_buffer("complex", torch.zeros(2, dtype=torch.complex64))
    with pytest.raises(TypeError, match="complex"):
        fastnn.save(net, path)
    del net.complex

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(container.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        fastnn.save(net, path)
    assert path.read_bytes() == before and [p.name for p in path.parent.iterdir()] == [path.name]


def test_wrong_calls(net, path, tmp_path):
    with pytest.raises(TypeError, match="save"):
        fastnn.save("model", path)
    with pytest.raises(FileNotFoundError):
        fastnn.save(net, tmp_path / "no" / "folder")
    with pytest.raises(FileNotFoundError):
        fastnn.load(path)
    fastnn.save(net, path)
    with pytest.raises(TypeError, match="load"):
        fastnn.load(path, "model")


def test_empty_model(path):
    fastnn.save(nn.ReLU(), path)
    assert fastnn.load(path) == {} and isinstance(fastnn.load(path, nn.ReLU()), nn.ReLU)


def _damaged(data, rng):
    """One plausible accident or attack."""
    kind, at = rng.randrange(6), rng.randrange(len(data))
    if kind == 0:
        return data[:at]
    if kind == 1:
        return data + bytes(rng.randrange(1, 9))
    if kind == 2:
        changed = bytearray(data)
        changed[at] ^= 1 << rng.randrange(8)
        return bytes(changed)
    if kind == 3:  # a length that is none
        return struct.pack("<Q", rng.choice([0, 1, 2**63, 2**64 - 1, len(data), rng.getrandbits(40)])) + data[8:]
    if kind == 4:  # a piece moved
        size = rng.randrange(1, 40)
        found = data[:at] + data[at + size :] + data[at : at + size]
        return found if found != data else data[:-1]
    return bytes(rng.getrandbits(8) for _ in range(rng.randrange(200)))


@pytest.mark.parametrize("files", [1000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_damaged_files_give_clean_errors(net, path, files):
    fastnn.save(net, path)
    data, rng = path.read_bytes(), random.Random(files)
    tracemalloc.start()
    for number in range(files):
        path.write_bytes(_damaged(data, rng))
        with pytest.raises(FormatError, match=r"model\.safetensors: "):
            fastnn.load(path)
        assert tracemalloc.get_traced_memory()[1] < 20 * len(data) + (1 << 20), number
    tracemalloc.stop()


def _forged(path, header, data=b""):
    """A file with a header of somebody's choice and a digest that is right."""
    text = json.dumps(header).replace("DIGEST", "0" * 64).encode()
    digest = container.hashlib.sha256(text).hexdigest().encode()
    text = text.replace(b"0" * 64, digest, 1)
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def test_hostile_headers(path):
    def header(entries, **kept):
        sums = {name: container.hashlib.sha256(b"").hexdigest() for name in entries}
        ours = json.dumps({"version": 1, "shared": {}, "int8": {}, "sha256": sums, **kept})
        return {"__metadata__": {"fastnn": ours, "digest": "DIGEST"}, **entries}

    def entry(dtype="U8", shape=(0,), offsets=(0, 0)):
        return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}

    _forged(path, header({"t": entry()}))
    assert fastnn.load(path)["t"].numel() == 0
    huge = 1 << 40
    for bad in (
        header({"t": entry(shape=(huge,), offsets=(0, huge))}),
        header({"t": entry(shape=(-1,))}),
        header({"t": entry(shape=(True, 0))}),
        header({"t": entry(shape=(1.0, 0))}),
        header({"t": entry("PICKLE")}),
        header({"t": entry(["U8"])}),
        header({"t": entry(offsets=(5, 5))}),
        header({"t": entry(offsets=(0,))}),
        header({"t": []}),
        header({}, version=2),
        header({}, shared=[]),
        header({}, shared={"a": "b"}),
        header({}, int8=7),
        {"__metadata__": {"fastnn": "[]", "digest": "DIGEST"}},
        {"__metadata__": {"fastnn": 3, "digest": "DIGEST"}},
        {"__metadata__": {"digest": "DIGEST"}},
    ):
        _forged(path, bad)
        with pytest.raises(FormatError):
            fastnn.load(path)
    for options in ({"activation": "swish"}, {"activation": []}, 3, {"in_features": huge}):
        _forged(path, header({}, int8={"": options}))
        with pytest.raises(FormatError):
            fastnn.load(path, nn.Linear(2, 2))
    path.write_bytes(struct.pack("<Q", 200_000) + b"[" * 200_000)
    with pytest.raises(FormatError):
        fastnn.load(path)


def test_files_of_others_are_refused(path):
    path.write_bytes(b"PK\x03\x04" + bytes(100))
    with pytest.raises(FormatError, match="header"):
        fastnn.load(path)
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_file({"x": torch.ones(3)}, path)
    with pytest.raises(FormatError, match=r"fastnn\.save"):
        fastnn.load(path)


GROUPS = (fastnn.Int8WeightOnly(4), fastnn.Int4WeightOnly(4, symmetric=False), fastnn.Int4Int8Dynamic(4))


@pytest.mark.parametrize("config", GROUPS, ids=str)
def test_codes_in_groups_come_back(path, config, extension):
    net = Net()
    fastnn.quantize_(net, config)
    assert net.head.weight is net.embed.weight
    fastnn.save(net, path)
    quantised = Net(2)
    fastnn.quantize_(quantised, config)
    for fresh in (Net(1), quantised):
        fastnn.load(path, fresh)
        assert all(same_bits(fresh.state_dict()[name], t) for name, t in net.state_dict().items())
        assert fresh.head.weight is fresh.embed.weight and type(fresh.embed) is type(net.embed)
        assert fresh.c.options() == net.c.options() and same_bits(fresh(IDS).detach(), net(IDS).detach())
    other = Net(3)
    fastnn.quantize_(other, INT8)
    before = {name: t.clone() for name, t in other.state_dict().items()}
    with pytest.raises(RuntimeError, match="is no dense layer, but the file has codes for it"):
        fastnn.load(path, other)
    assert all(same_bits(t, before[name]) for name, t in other.state_dict().items())


def test_what_a_file_says_of_groups_is_checked(path, extension):
    net = Net()
    fastnn.quantize_(net, fastnn.Int4WeightOnly(4))
    state = dict(net.state_dict())
    good = {"kind": "Int4Linear", "in_features": 6, **net.c.options()}
    stored = {"version": 2, "shared": {}, "layers": {"c": good}}
    container.write(path, state, stored)
    wrong = ({"kind": "Int5Linear"}, {"in_features": 9}, {"in_features": 2**60}, {"group_size": 0}, {"group_size": 2},
             {"symmetric": False}, {"symmetric": 1}, {"int8_input": 2}, {"activation": "swish"}, {"kind": "Int8Linear"},
             {"kind": "Int8WeightOnlyLinear"}, {"kind": ["Int4Linear"]})  # fmt: skip
    for change in wrong:
        container.write(path, state, {**stored, "layers": {"c": {**good, **change}}})
        with pytest.raises(FormatError, match="quantised layers"):
            fastnn.load(path, Net())


def test_files_of_version_1_are_read(net, path):
    state = dict(net.state_dict())
    layers = {name: {"activation": m.activation} for name, m in net.named_modules() if isinstance(m, Int8Linear)}
    container.write(path, state, {"version": 1, "shared": {}, "int8": layers})
    assert same_bits(fastnn.load(path, Net(4))(IDS).detach(), net(IDS).detach())

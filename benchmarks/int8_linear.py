"""int8 and int4 linear against eager float32, our packed float32, onnxruntime's and torch.ao's dynamic quantisation.

    python benchmarks/int8_linear.py [--threads 1] [--rounds 15] [--shapes 1x4096x4096,128x768x3072]

Every contender quantises the inputs itself. They run in turns, best and median of the rounds are shown beside each
one's error against float64, the norm of the difference over the norm of the truth: who is faster because he rounds
more coarsely shows. Weights of several layers take turns (as in a model, from memory) where one alone would stay in
a cache.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import fastnn
from fastnn import nn

ROTATED_BYTES = 128 << 20  # of float32 weights: four times a last-level cache of 32 MiB
MOST_LAYERS = 8
Call = Callable[[Tensor], Tensor]


def fastnn_fp32(weight: Tensor) -> Call:
    layer = nn.Linear(weight.shape[1], weight.shape[0], False, "meta")
    layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    return layer.freeze().eval()


def onnxruntime_int8(weight: Tensor, threads: int) -> Call:
    """DynamicQuantizeLinear and MatMulInteger, a scale per output: what its own quantize_dynamic makes."""
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    codes, scale = fastnn.ops.quantize_rows(weight)
    named = {"w": codes.t().contiguous(), "s": scale, "z": torch.zeros(weight.shape[0], dtype=torch.int8)}
    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "xs", "xz"]),
        helper.make_node("MatMulInteger", ["q", "w", "xz", "z"], ["sum"]),
        helper.make_node("Cast", ["sum"], ["f"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["xs", "s"], ["both"]),
        helper.make_node("Mul", ["f", "both"], ["y"]),
    ]
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "int8",
        [value("x", TensorProto.FLOAT, [None, weight.shape[1]])],
        [value("y", TensorProto.FLOAT, [None, weight.shape[0]])],
        [numpy_helper.from_array(t.numpy(), name) for name, t in named.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run(None, {"x": x.numpy()})[0])


def torch_ao_int8(weight: Tensor) -> Call:
    layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made: Call = torch.ao.quantization.quantize_dynamic(torch.nn.Sequential(layer), {torch.nn.Linear})
    return made


def contenders(threads: int) -> Iterator[tuple[str, Callable[[Tensor], Call]]]:
    yield "eager fp32", lambda w: lambda x: torch.nn.functional.linear(x, w)
    yield "fastnn fp32 packed", fastnn_fp32
    yield "fastnn int8", lambda w: nn.Int8Linear.from_float(w)
    yield "fastnn int8 weight", lambda w: nn.Int8WeightOnlyLinear.from_float(w)
    yield "fastnn int4 weight", lambda w: nn.Int4Linear.from_float(w)
    yield "fastnn int4 x int8", lambda w: nn.Int4Linear.from_float(w, int8_input=True)
    if importlib.util.find_spec("onnxruntime") and importlib.util.find_spec("onnx"):
        yield "onnxruntime int8", lambda w: onnxruntime_int8(w, threads)
    yield "torch.ao int8", torch_ao_int8


@torch.no_grad()
def measure(m: int, k: int, n: int, threads: int, rounds: int) -> None:
    layers = max(1, min(MOST_LAYERS, ROTATED_BYTES // (4 * k * n)))
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(n, k, generator=generator) / k**0.5 for _ in range(layers)]
    x = torch.randn(m, k, generator=generator)
    truth = x.double() @ weights[0].double().t()
    ready: dict[str, list[Call]] = {}
    errors: dict[str, float] = {}
    for name, make in contenders(threads):
        ready[name] = [make(w) for w in weights]
        found = ready[name][0](x).double()
        errors[name] = float((found - truth).norm() / truth.norm())
    times: dict[str, list[float]] = {name: [] for name in ready}
    for _ in range(rounds):
        for name, calls in ready.items():
            start = time.perf_counter()
            for call in calls:
                call(x)
            times[name].append((time.perf_counter() - start) / layers)
    for name, found_times in times.items():
        best, middle = min(found_times) * 1e3, statistics.median(found_times) * 1e3
        sys.stdout.write(
            f"{m}x{k}x{n:<6} {name:20} {best:9.3f} ms best {middle:9.3f} median  error {errors[name]:.2e}\n"
        )
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--shapes", default="1x4096x4096,16x4096x4096,32x768x3072,128x768x3072,128x4096x4096")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for shape in options.shapes.split(","):
        m, k, n = map(int, shape.split("x"))
        measure(m, k, n, options.threads, options.rounds)


if __name__ == "__main__":
    main()

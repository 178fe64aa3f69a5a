"""Contenders beside torch: onnxruntime, OpenVINO, torchao, llama.cpp. Imported only where they are installed."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from ..testing.bench_cases import BenchCase, Results
from ..testing.cases import Inputs
from .allocators import PLAIN, TUNED
from .contenders import Contender, Runner, Special, onnx_why_not, register

_OPSET = 20
"""The first with an operator for GELU."""

_ONNX_TYPES = {"fp32": "FLOAT", "bf16": "BFLOAT16", "fp16": "FLOAT16"}


def _as_numpy(t: Tensor) -> Any:
    """The tensor's memory as numpy sees it; bfloat16, which numpy lacks, as its bits."""
    t = t.contiguous()
    return t.view(torch.uint16).numpy() if t.dtype == torch.bfloat16 else t.numpy()


def _onnx_tensor(helper: Any, element: int, name: str, values: Tensor) -> Any:
    return helper.make_tensor(name, element, list(values.shape), _as_numpy(values).tobytes(), raw=True)


def onnx_model(case: BenchCase, inputs: Inputs) -> bytes:
    """The case's graph, serialised, with its constants inside."""
    if case.onnx_file is not None:
        return case.onnx_file(inputs)
    onnx = importlib.import_module("onnx")
    helper, element = onnx.helper, getattr(onnx.TensorProto, _ONNX_TYPES[case.dtype])
    current: dict[str, str] = {name: name for name in inputs}
    nodes = []
    for i, node in enumerate(case.onnx):
        output = f"{node.output}_{i}"
        names = [current[name] for name in node.inputs]
        attributes = {
            key: _onnx_tensor(helper, element, output, value()) if callable(value) else value
            for key, value in node.attributes.items()
        }
        nodes.append(helper.make_node(node.operator, names, [output], **attributes))
        current[node.output] = output
    last = nodes[-1].output[0]
    variables = [name for name in inputs if name not in case.constants]
    (result,) = case.run(case.torch_call, inputs)
    graph = helper.make_graph(
        nodes,
        case.name,
        [helper.make_tensor_value_info(name, element, list(inputs[name].shape)) for name in variables],
        [helper.make_tensor_value_info(last, element, list(result.shape))],
        [_onnx_tensor(helper, element, name, inputs[name]) for name in case.constants],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", _OPSET)], ir_version=10)
    serialised: bytes = model.SerializeToString()
    return serialised


def _variables(case: BenchCase, inputs: Inputs) -> list[Tensor]:
    """What a run is given, in the graph's order."""
    return [t for name, t in inputs.items() if name not in case.constants]


@register
class OnnxRuntime(Contender):
    """onnxruntime on the CPU; with the tuned allocator it also writes to the same result each time."""

    name, packages, install, frozen = "onnxruntime", ("onnxruntime", "onnx"), "pip install onnxruntime onnx", True

    def why_not(self, case: BenchCase) -> str:
        """Its CPU kernels are float32."""
        return onnx_why_not(case) or ("" if case.dtype == "fp32" else "has no CPU kernels for half precision")

    def prepare(self, case: BenchCase, inputs: Inputs, threads: int, setting: str) -> Runner:
        """A session on the case's graph."""
        ort = importlib.import_module("onnxruntime")
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.log_severity_level = 3
        session = ort.InferenceSession(onnx_model(case, inputs), options, providers=["CPUExecutionProvider"])
        given = zip(session.get_inputs(), _variables(case, inputs), strict=True)
        feeds = {node.name: _as_numpy(values) for node, values in given}

        def results() -> Results:
            return (torch.from_numpy(session.run(None, feeds)[0]),)

        if setting == PLAIN:
            return Runner(lambda: session.run(None, feeds), results)
        output = session.get_outputs()[0].name
        out = torch.from_numpy(session.run(None, feeds)[0]).clone()
        binding = session.io_binding()
        for name, values in feeds.items():
            binding.bind_cpu_input(name, values)
        binding.bind_output(output, "cpu", 0, values.dtype, tuple(out.shape), out.data_ptr())

        def reused() -> Results:
            session.run_with_iobinding(binding)
            return (out,)

        return Runner(lambda: session.run_with_iobinding(binding), reused, "reused")


@register
class OpenVino(Contender):
    """OpenVINO's CPU plugin in the case's precision; its results are always written to the same memory."""

    name, packages, install, frozen = "openvino", ("openvino", "onnx"), "pip install openvino onnx", True
    settings = (PLAIN,)

    def why_not(self, case: BenchCase) -> str:
        """Forward rows only."""
        return onnx_why_not(case)

    def prepare(self, case: BenchCase, inputs: Inputs, threads: int, setting: str) -> Runner:
        """A compiled model with its inputs set once."""
        ov = importlib.import_module("openvino")
        core = ov.Core()
        config = {
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": "1",
            "INFERENCE_NUM_THREADS": str(threads),
            "INFERENCE_PRECISION_HINT": {"fp32": "f32", "bf16": "bf16", "fp16": "f16"}[case.dtype],
        }
        model = core.compile_model(core.read_model(onnx_model(case, inputs), b""), "CPU", config)
        request = model.create_infer_request()
        kept = []  # the tensors share their memory: it must live as long as the request
        for port, tensor in zip(model.inputs, _variables(case, inputs), strict=True):
            values = _as_numpy(tensor)
            kept.append(values)
            if case.dtype == "bf16":
                request.set_tensor(port, ov.Tensor(values, list(values.shape), ov.Type.bf16))
            else:
                request.set_tensor(port, ov.Tensor(values, shared_memory=True))

        def results() -> Results:
            request.infer()
            found = request.get_output_tensor()
            if found.get_element_type() == ov.Type.bf16:
                return (torch.from_numpy(found.data.view("int16").copy()).view(torch.bfloat16),)
            return (torch.from_numpy(found.data.copy()),)

        return Runner(lambda: (request.infer(), kept)[0], results, "reused")


@register
class TorchQuantized(Special):
    """The quantised operators that torch itself has."""

    name, native, frozen = "torch.ao", True, True


@register
class TorchCsr(Special):
    """torch's sparse product with compressed rows."""

    name, native, frozen = "torch.csr", True, True


@register
class TorchBsr(Special):
    """torch's sparse product with square blocks."""

    name, native, frozen = "torch.bsr", True, True


@register
class PackedDense(Special):
    """Our own dense layer, packed, in rows that ask whether leaving weights out pays."""

    name, native, frozen = "packed dense", True, True


@register
class Scipy(Special):
    """scipy's sparse product with compressed rows; on one thread, whatever is allowed."""

    name, packages, install, frozen = "scipy", ("scipy",), "pip install scipy", True


@register
class TorchAo(Special):
    """torchao, for quantised rows."""

    name, packages, install, frozen = "torchao", ("torchao",), "pip install --no-deps torchao", True
    settings = (PLAIN, TUNED)


@register
class LlamaCpp(Special):
    """llama.cpp's ggml kernels, for quantised rows."""

    name, packages, install, frozen = "llama.cpp", ("llama_cpp",), "pip install llama-cpp-python", True
    settings = (PLAIN,)

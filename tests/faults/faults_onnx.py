"""Faults in exports to ONNX and in the command that compresses."""

from __future__ import annotations

from fault import Fault

EXPORT, COMMAND, NODES = "fastnn/to_onnx.py", "fastnn/compression/command.py", "tests/test_onnx_nodes.py"
COMPRESS = "tests/test_compress.py"
INT8 = (f"{NODES}::test_int8_has_the_bits_of_the_layer",)
GROUPS = (f"{NODES}::test_groups_have_the_numbers_of_the_layer",)
NONE = (f"{NODES}::test_what_has_no_operator",)
ONNX_FAULTS = [
    Fault(
        "export: all rows are rounded with one scale",
        EXPORT,
        "x.abs().amax(-1, keepdim=True)",
        "x.abs().amax((-2, -1), keepdim=True)",
        INT8,
    ),
    Fault(
        "export: the zero of int8 inputs is not taken off",
        EXPORT,
        "(rounded, self.codes, self.zero)",
        "(rounded, self.codes, self.zero * 0)",
        INT8,
    ),
    Fault("export: a layer loses its activation", EXPORT, "return self.activation(found if", "return (found if", INT8),
    Fault(
        "export: codes of 8 bits keep their sign bit",
        EXPORT,
        "layer.weight.view(torch.uint8) ^ 128",
        "layer.weight.view(torch.uint8)",
        GROUPS,
    ),
    Fault(
        "export: offsets of groups are left out",
        EXPORT,
        "return _Groups(layer, codes, -offset / scale.where(scale != 0, 1.0))",
        "return _Groups(layer, codes, None)",
        GROUPS,
    ),
    Fault(
        "export: a group of one value has a zero point",
        EXPORT,
        "if bool(((scale == 0) & (offset != 0)).any()):",
        "if bool((scale < 0).any()):",
        NONE,
    ),
    Fault(
        "export: rows that end within a group are cut into whole ones",
        EXPORT,
        " or layer.in_features % size:",
        ":",
        NONE,
    ),
    Fault(
        "export: inputs that the layer rounds to int8 stay as they are",
        EXPORT,
        "if layer.int8_input else {}",
        "if layer.bias is None and False else {}",
        (f"{NODES}::test_int8_inputs_are_asked_for",),
    ),
    Fault(
        "export: NaN counts as the right number",
        EXPORT,
        'float("inf") if bool(share.isnan()) else float(share)',
        "float(share)",
        (f"{NODES}::test_differences_are_seen",),
    ),
    Fault(
        "compress: weights that came back otherwise count as the same",
        COMMAND,
        "name not in other or not torch.equal(t, other[name])",
        "name not in other",
        (f"{COMPRESS}::test_a_file_that_gives_another_model_fails",),
    ),
    Fault(
        "compress: codes of a GGUF file are rounded again",
        COMMAND,
        "if is_gguf and (arguments.int8 or arguments.int4 or searches):",
        "if is_gguf and searches:",
        (f"{COMPRESS}::test_a_gguf_keeps_its_codes",),
    ),
    Fault(
        "compress: a missing ONNX file is a success",
        COMMAND,
        'no ONNX file was written: {error}\\n")\n            return 1',
        'no ONNX file was written: {error}\\n")\n            return 0',
        (f"{COMPRESS}::test_what_is_exported",),
    ),
    Fault(
        "compress: an export sees no row that ends early",
        COMMAND,
        'example["attention_mask"][1, ids.shape[1] // 2 + 1 :] = 0',
        'example["attention_mask"][1, ids.shape[1] // 2 + 1 :] = 1',
        (f"{COMPRESS}::test_what_is_exported",),
    ),
]

"""Faults in making models sparse."""

from __future__ import annotations

from fault import Fault

SPARSE, TESTS = "fastnn/sparse/", "tests/test_sparsify.py"
LAYERS, SELECT, MASKS = f"{SPARSE}layers.py", f"{SPARSE}select.py", f"{SPARSE}masks.py"


def test(name: str) -> tuple[str, ...]:
    return (f"{TESTS}::test_{name}",)


SPARSIFY_FAULTS = [
    Fault(
        "sparsify: the strongest units go",
        SELECT,
        "rows.topk(count, 1, largest=False, sorted=False)",
        "rows.topk(count, 1, largest=True, sorted=False)",
        test("the_weakest_blocks_go[4]"),
    ),
    Fault(
        "sparsify: a layer may be left with nothing",
        SELECT,
        "        flat[flat.argmax()] = torch.inf  # no layer is left with nothing\n",
        "",
        test("global_ranks_layers_together_and_leaves_each_something"),
    ),
    Fault(
        "sparsify: Wanda takes squared norms of the inputs",
        SELECT,
        "found *= energy.sqrt().float()",
        "found *= energy.float()",
        test("wanda_ranks_by_weight_and_input"),
    ),
    Fault(
        "sparsify: Wanda sees the last calibration input alone",
        SELECT,
        "found[module] = found[module] + energy if module in found else energy",
        "found[module] = energy",
        test("wanda_ranks_by_weight_and_input"),
    ),
    Fault(
        "sparsify: the model stays in evaluation after the calibration",
        SELECT,
        "    with isolated(model):\n",
        "    if True:\n",
        test("wanda_ranks_by_weight_and_input"),
    ),
    Fault(
        "sparsify: what a mask has taken comes back",
        SELECT,
        "    kept = rows != _GONE\n",
        "    kept = torch.ones_like(rows, dtype=torch.bool)\n",
        test("masks_of_torchs_are_read"),
    ),
    Fault(
        "sparsify: units that a mask has taken do not count",
        SELECT,
        "_GONE = -1.0\n",
        "_GONE = 1e30\n",
        test("sparsity_grows_by_the_cubic_schedule[weight]"),
    ),
    Fault(
        "sparsify: a masked layer's own weight goes into the blocks",
        MASKS,
        "    found = weight if hook is None else hook.apply_mask(module)",
        "    found = weight if hook is None else parameter_of(module)",
        test("masks_of_torchs_are_read"),
    ),
    Fault(
        "sparsify: layers that would be slower are changed",
        LAYERS,
        "if after / before > max_slowdown:",
        "if before / after > max_slowdown:",
        test("a_layer_that_would_be_slower_stays"),
    ),
    Fault(
        "sparsify: zeros in a dense weight are reported smaller",
        LAYERS,
        "after += parameter.nbytes if",
        "after -= parameter.nbytes // 2 if",
        test("single_weights_are_those_that_torch_takes[layer]"),
    ),
    Fault(
        "sparsify: tied layers get values of their own",
        LAYERS,
        "    if first is not None:\n        for name in",
        "    if first is not None and False:\n        for name in",
        test("tied_layers_share_what_becomes_of_them"),
    ),
    Fault(
        "sparsify: a tied head loses its table without being named",
        LAYERS,
        "elif keeping and not named:",
        "elif keeping and named:",
        test("every_layer_is_named"),
    ),
    Fault(
        "sparsify: the activation of a layer is lost",
        LAYERS,
        "from_dense(weight, bias, kept, depth=depth, activation=activation)",
        "from_dense(weight, bias, kept, depth=depth)",
        test("every_layer_is_named"),
    ),
    Fault(
        "sparsify: stripping a mask writes zeros into a tied table",
        MASKS,
        "        if alone:\n",
        "        if alone or True:\n",
        test("tied_head_stripped_of_its_mask_leaves_the_table"),
    ),
    Fault(
        "sparsify: the hook of a mask stays",
        MASKS,
        "            del module._forward_pre_hooks[key]\n",
        "            pass\n",
        test("masks_of_torchs_are_read"),
    ),
    Fault(
        "sparsify: the schedule is linear",
        f"{SPARSE}schedule.py",
        "return 1.0 - (1.0 - part) ** 3",
        "return part",
        test("sparsity_grows_by_the_cubic_schedule[block]"),
    ),
    Fault(
        "sparsify: a schedule stopped early takes all out",
        f"{SPARSE}schedule.py",
        "layers = self._layers(self._now(of_masks=True))",
        "layers = self._layers(self._config)",
        test("a_schedule_goes_on_after_a_stop"),
    ),
    Fault(
        "sparsify: torch's encoder layer reads a weight that is gone",
        "fastnn/quant/encoder.py",
        "isinstance(layer, QuantizedModule | BlockSparseLinear)",
        "isinstance(layer, QuantizedModule)",
        test("torchs_encoder_layer_runs"),
    ),
    Fault(
        "sparsify: files do not say which layers are sparse",
        "fastnn/quant/files.py",
        "        if isinstance(m, nn.QuantizedModule | nn.BlockSparseLinear)\n    }",
        "        if isinstance(m, nn.QuantizedModule)\n    }",
        test("files_keep_blocks"),
    ),
    Fault(
        "advise: packed dense layers are not among the rivals",
        f"{SPARSE}breakeven.py",
        "self.ms_sparse < min(self.ms_packed, self.ms_torch)",
        "self.ms_sparse < self.ms_torch",
        test("advice_says_what_was_measured"),
    ),
    Fault(
        "advise: a density beyond one that lost is claimed",
        f"{SPARSE}breakeven.py",
        "            if not point.pays:\n                break\n            found",
        "            if not point.pays:\n                continue\n            found",
        test("advice_says_what_was_measured"),
    ),
]

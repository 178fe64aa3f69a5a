"""Cases of attention; those over sequences, and the invalid calls, are in modules beside this folder."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...ops.attention import AttentionOptions, attention_reference
from ...ops.attention import scaled_dot_product_attention as typed_attention
from ..attention_sequences import cache_cases, varlen_cases
from ..cases import Case, Inputs
from ..inputs import Fill, arrange, expanded, fill
from ..invalid_attention import INVALID_ATTENTION
from ..invalid_sequences import INVALID_SEQUENCES

Arrange = Callable[[Tensor], Tensor]

attention: Callable[..., Tensor] = typed_attention  # with options from a case


@dataclass(frozen=True)
class _Shape:
    """What the tensors of a case look like: query (b, h, sq, d), key (b, hk, sk, d), value (b, hk, sk, dv), a mask.

    Every query sees several keys in nearly all cases: of one key the gradients of query and key are zero, and there
    would be nothing but rounding noise to compare.
    """

    sq: int = 20
    sk: int = 24
    d: int = 16
    dv: int = -1
    """As d unless given."""
    b: int = 2
    h: int = 2
    hk: int = -1
    """As h unless given."""
    mask: str = ""
    """bool, additive or blocked (additive with -inf here and there); none unless given."""
    mask_shape: tuple[int, ...] = ()
    """(sq, sk) unless given."""
    value_kind: Fill = "normal"
    memory: str | Arrange = "contiguous"
    """Of query, key and value."""
    mask_memory: str | Arrange = "contiguous"

    def make(self, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
        hk, dv = self.h if self.hk < 0 else self.hk, self.d if self.dv < 0 else self.dv
        shapes = {
            "query": (self.b, self.h, self.sq, self.d),
            "key": (self.b, hk, self.sk, self.d),
            "value": (self.b, hk, self.sk, dv),
        }
        found = {}
        for name, shape in shapes.items():
            kind = self.value_kind if name == "value" else "normal"
            found[name] = _arranged(fill(shape, dtype, generator, kind), self.memory)
        if self.mask:
            mask = self._mask(dtype, generator)
            found["attn_mask"] = _arranged(mask, self.mask_memory)
        return found

    def _mask(self, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
        shape = self.mask_shape or (self.sq, self.sk)
        visible = torch.rand(shape, generator=generator) < 0.7
        if self.mask == "bool":
            return visible
        values = torch.randn(shape, generator=generator).to(dtype)
        return values if self.mask == "additive" else values.masked_fill(~visible, -math.inf)


def _arranged(t: Tensor, memory: str | Arrange) -> Tensor:
    return arrange(t, memory) if isinstance(memory, str) else memory(t)


@dataclass(frozen=True)
class _Call:
    """How a case calls the op, and its counterparts."""

    causal: bool = False
    scale: float | None = None
    dropout: float = 0.0
    window: tuple[int, int] | None = None
    softcap: float = 0.0
    seed: int = 5
    """Of torch's generator, before a call with dropout."""

    def ours(self, inputs: Inputs) -> Tensor:
        options: dict[str, Any] = {"is_causal": self.causal, "scale": self.scale, "enable_gqa": _grouped(inputs)}
        with torch.random.fork_rng(devices=[], enabled=self.dropout > 0):
            if self.dropout > 0:
                torch.manual_seed(self.seed)
            return attention(
                *_operands(inputs), dropout_p=self.dropout, window=self.window, softcap=self.softcap, **options
            )

    def reference(self, inputs: Inputs) -> Tensor:
        query, key, value, mask = _operands(inputs)
        left, right = self.window or (-1, -1)
        scale = 1 / math.sqrt(max(query.shape[-1], 1)) if self.scale is None else self.scale
        options = AttentionOptions(self.dropout, scale, self.softcap, left, 0 if self.causal else right)
        q, k, v = (_four_dimensional(t) for t in (query, key, value))
        k, v = (t.expand(q.shape[0], *t.shape[1:]) for t in (k, v))
        if mask is not None and query.dim() > 4:
            mask = mask.expand(*query.shape[:-3], *mask.shape[-3:]).flatten(0, -4)
        out, _ = attention_reference(q, k, v, mask, self.drawn_seed(), options)
        return out.reshape(*query.shape[:-1], value.shape[-1])

    def drawn_seed(self) -> Tensor | None:
        """What the public function draws."""
        if not self.dropout:
            return None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return torch.randint(0, 2**62, ())

    def torchs(self, inputs: Inputs) -> Tensor:
        query, key, value, mask = _operands(inputs)
        gqa = _grouped(inputs)
        return F.scaled_dot_product_attention(
            query, key, value, mask, is_causal=self.causal, scale=self.scale, enable_gqa=gqa
        )

    @property
    def plain(self) -> bool:
        """Whether torch has it too."""
        return not self.dropout and self.window is None and not self.softcap


def _operands(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    return inputs["query"], inputs["key"], inputs["value"], inputs.get("attn_mask")


def _grouped(inputs: Inputs) -> bool:
    query, key = inputs["query"], inputs["key"]
    return query.dim() > 2 and query.shape[-3] != key.shape[-3]


def _four_dimensional(t: Tensor) -> Tensor:
    return t.flatten(0, -4) if t.dim() > 3 else t.reshape((1,) * (4 - t.dim()) + t.shape)


def _case(
    name: str,
    layout: str,
    shape: _Shape,
    call: _Call | None = None,
    *,
    make: Callable[[torch.dtype, torch.Generator], Inputs] | None = None,
    differentiable: tuple[str, ...] = ("query", "key", "value"),
    wide: bool = False,
    bites: bool = True,
    with_torch: bool = True,
) -> Case:
    call = call or _Call()
    masked_and_causal = bool(shape.mask) and call.causal  # which torch refuses
    return Case(
        op="attention",
        name=name,
        layout=layout,
        make=make or shape.make,
        call=call.ours,
        reference=call.reference,
        rival=call.torchs if call.plain and with_torch and not masked_and_causal else None,
        forward_kernel="attention_fwd",
        backward_kernel="attention_bwd",
        differentiable=differentiable,
        wide=wide,
        bites=bites,
    )


def _heads_inside(t: Tensor) -> Tensor:
    """(B, H, S, D) laid out as (B, S, H, D): what a projection gives."""
    return t.transpose(1, 2).contiguous().transpose(1, 2) if t.dim() == 4 else t


def _reshaped(shape: _Shape, change: Callable[[Tensor], Tensor]) -> Callable[[torch.dtype, torch.Generator], Inputs]:
    def make(dtype: torch.dtype, generator: torch.Generator) -> Inputs:
        return {name: change(t) if name != "attn_mask" else t for name, t in shape.make(dtype, generator).items()}

    return make


def _two_batches(t: Tensor) -> Tensor:
    return t.reshape(2, 3, *t.shape[1:])


def _first_batch(shape: _Shape, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    """Keys and values of one batch entry for all queries."""
    inputs = shape.make(dtype, generator)
    return {**inputs, "key": inputs["key"][:1].clone(), "value": inputs["value"][:1].clone()}


def _large(dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    """Scores around +3e3 for some queries and around -3e3 for others: exp overflows unless a maximum is subtracted."""
    inputs = _Shape(20, 130, mask="additive").make(dtype, generator)
    offset = torch.tensor([3e3, -3e3, 0.0, 100.0]).repeat(5)[:, None]
    return {**inputs, "attn_mask": (offset + 2 * inputs["attn_mask"].float()).to(dtype)}


def _rising(dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    """The running maximum changes in every block of keys: what was summed before must be scaled again."""
    inputs = _Shape(20, 400, mask="additive").make(dtype, generator)
    rise = torch.arange(400) * 0.02
    return {**inputs, "attn_mask": (inputs["attn_mask"].float() * 0.1 + rise).to(dtype)}


def _nonfinite(dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    """NaN and infinities in queries, keys, values and mask, each in a head of its own; one head without any."""
    inputs = _Shape(21, 37, 17, b=3, h=2, mask="additive", mask_shape=(3, 2, 21, 37)).make(dtype, generator)
    query, key, value, mask = (inputs[name] for name in ("query", "key", "value", "attn_mask"))
    nan, inf = float("nan"), float("inf")
    query[0, 0, 0, 0] = query[0, 0, 20, 16] = nan
    query[0, 0, 3, 5] = inf
    key[0, 1, 36, 16] = nan
    value[1, 0, 4, 2], value[1, 0, 36, 16] = nan, inf
    key[1, 1, 5, 3] = -inf
    mask[2, 0, 0], mask[2, 0, 1, :30], mask[2, 0, 2, 36] = -inf, -inf, nan
    mask[2, 0, 3, 0], mask[2, 0, 4] = inf, torch.finfo(dtype).min
    return inputs


def _option_cases() -> Iterator[Case]:
    """Every option by itself and in combination, over more than one tile of queries and more than one block of keys."""
    here, far = "contiguous", _Shape(50, 200)
    yield _case("plain", here, far)
    yield _case("causal", here, far, _Call(causal=True))
    yield _case("causal_tall", here, _Shape(120, 60), _Call(causal=True))
    yield _case("scale", here, _Shape(), _Call(scale=0.5))
    yield _case("value_features", here, _Shape(dv=33))
    yield _case("grouped", here, _Shape(50, 60, h=6, hk=2))
    yield _case("grouped_causal", here, _Shape(60, 60, h=4, hk=1), _Call(causal=True))
    yield _case("value_outliers", here, _Shape(value_kind="outliers"))
    for mask in ("bool", "additive", "blocked"):
        yield _case(f"{mask}_queries", here, _Shape(50, 100, mask=mask))
        yield _case(f"{mask}_full", here, _Shape(30, 40, mask=mask, mask_shape=(2, 2, 30, 40)))
        yield _case(f"{mask}_keys", here, _Shape(50, 100, mask=mask, mask_shape=(2, 1, 1, 100)))
    yield _case("bool_heads", here, _Shape(mask="bool", mask_shape=(1, 2, 20, 24)))
    yield _case("bool_rows", here, _Shape(mask="bool", mask_shape=(2, 1, 20, 1)))
    yield _case("mask_and_causal", here, _Shape(50, 60, mask="blocked"), _Call(causal=True))
    for name, window in (("both", (9, 7)), ("left", (20, -1)), ("right", (-1, 5)), ("far", (130, 100))):
        yield _case(f"window_{name}", here, far, _Call(window=window))
    yield _case("window_causal", here, _Shape(130, 130), _Call(window=(16, -1), causal=True))
    yield _case("softcap", here, far, _Call(softcap=2.0))
    yield _case("softcap_masked", here, _Shape(mask="blocked"), _Call(softcap=2.0, causal=True))
    yield _case("dropout", here, far, _Call(dropout=0.3))
    everything = _Call(dropout=0.2, softcap=3.0, window=(40, 30), scale=0.4)
    yield _case("everything", here, _Shape(50, 100, h=4, hk=2, mask="blocked"), everything)
    # Few queries, which decoding takes: more than one block of keys; keys in parts.
    yield _case("few", here, _Shape(3, 300, h=6, hk=2))
    yield _case("few_bool", here, _Shape(3, 300, mask="bool"))
    yield _case("few_blocked_keys", here, _Shape(3, 300, mask="blocked", mask_shape=(2, 1, 1, 300)))
    yield _case("few_window", here, _Shape(8, 30), _Call(window=(9, 12)))
    few = _Call(dropout=0.2, softcap=3.0, window=(-1, 270), scale=0.4)
    yield _case("few_everything", here, _Shape(3, 300, h=6, hk=2, mask="blocked"), few)
    yield _case("few_in_parts", here, _Shape(2, 1100, d=8, b=1))


def _matrix_cases() -> Iterator[Case]:
    yield from _option_cases()
    yield _case("features_2_apart", "strided", _Shape(memory="strided"))
    yield _case("mask_2_apart", "strided", _Shape(mask="bool", mask_memory="strided", memory="strided"))
    yield _case("additive_2_apart", "strided", _Shape(mask="additive", mask_memory="strided"), _Call(softcap=5.0))
    yield _case("rows_2_apart", "strided", _Shape(memory=lambda t: t.repeat_interleave(2, 2)[:, :, ::2]))
    yield _case("batch_stride_0", "expanded", _Shape(memory="expanded"))
    yield _case("heads_stride_0", "expanded", _Shape(memory=partial(expanded, dim=1)))
    rows = _Shape(mask="blocked", mask_shape=(2, 2, 20, 24), mask_memory=partial(expanded, dim=2))
    yield _case("mask_rows_stride_0", "expanded", rows)
    batches = _Shape(mask="bool", mask_shape=(2, 2, 20, 24), mask_memory="expanded")
    yield _case("mask_batch_stride_0", "expanded", batches)
    yield _case("unaligned", "offset", _Shape(21, 35, 17, memory="offset"))
    yield _case("mask_unaligned", "offset", _Shape(mask="additive", memory="offset", mask_memory="offset"))
    nothing = {"b": _Shape(b=0), "h": _Shape(h=0), "sq": _Shape(sq=0), "sk": _Shape(sk=0), "dv": _Shape(dv=0)}
    # Without torch: its own op divides by zero there (2.11, a crash), or gives no gradient.
    for name, shape in nothing.items():
        yield _case(f"{name}0", "empty", shape, bites=False, with_torch=False)
    yield _case("d0", "empty", _Shape(d=0, dv=16), with_torch=False)
    yield _case("sk0_causal", "empty", _Shape(sk=0), _Call(causal=True), bites=False, with_torch=False)
    yield _case("sq0_masked", "empty", _Shape(sq=0, mask="bool"), bites=False, with_torch=False)
    for sq, sk, d in ((1, 2, 3), (3, 5, 2), (7, 17, 15), (15, 31, 33), (17, 33, 9), (47, 95, 16), (49, 97, 17)):
        yield _case(f"{sq}x{sk}x{d}", "tail", _Shape(sq, sk, d))
        yield _case(f"{sq}x{sk}x{d}_masked", "tail", _Shape(sq, sk + 3, d, d + 1, mask="additive"))
    yield _case("one_feature", "tail", _Shape(9, 20, 1))
    yield _case("97_causal", "tail", _Shape(97, 97, 5), _Call(causal=True))
    yield _case("dropout_97", "tail", _Shape(49, 97, 5), _Call(dropout=0.5))
    yield _case("dropout_129", "tail", _Shape(49, 129, 5), _Call(dropout=0.5))
    yield _case("one_key", "one_row", _Shape(9, 1), differentiable=("value",))
    yield _case("rows_apart", "padded_rows", _Shape(memory="padded_rows", mask="bool", mask_memory="padded_rows"))
    yield _case("heads_inside", "transposed", _Shape(50, 60, 17, memory=_heads_inside))
    yield _case("features_first", "transposed", _Shape(memory="transposed"))
    yield _case("mask_transposed", "transposed", _Shape(mask="blocked", mask_memory="transposed"))
    inside = _Shape(60, 60, h=4, hk=2, memory=_heads_inside)
    yield _case("heads_inside_grouped", "transposed", inside, _Call(causal=True))
    yield _case("two_dims", "leading_dims", _Shape(), make=_reshaped(_Shape(), lambda t: t[0, 0]))
    yield _case("three_dims", "leading_dims", _Shape(), make=_reshaped(_Shape(), lambda t: t[0]))
    five = _Shape(b=6)
    yield _case("five_dims", "leading_dims", five, make=_reshaped(five, _two_batches))
    five = _Shape(b=6, mask="blocked", mask_shape=(3, 1, 20, 24))
    yield _case("five_dims_masked", "leading_dims", five, make=_reshaped(five, _two_batches), with_torch=False)
    yield _case("shared_keys", "leading_dims", _Shape(), make=partial(_first_batch, _Shape()))
    yield _case("one_query", "one_row", _Shape(1, 130))
    yield _case("one_head", "one_row", _Shape(30, 33, b=1, h=1))
    yield _case("offset_3000", "large_magnitude", _Shape(20, 130, mask="additive"), make=_large)
    yield _case("rising", "large_magnitude", _Shape(20, 400, mask="additive"), make=_rising)
    yield _case("specials", "nonfinite", _Shape(21, 37, mask="additive"), make=_nonfinite, bites=False)


def _wide_cases() -> Iterator[Case]:
    for d in (1, 2, 4, 8, 15, 16, 17, 31, 32, 33, 48, 64, 65, 80, 96, 128, 200, 256):
        yield _case(f"wide_d{d}", "tail", _Shape(51, 70, d), wide=True)
    for sq in (2, 8, 16, 32, 33, 48, 64, 96, 97, 145):
        yield _case(f"wide_sq{sq}", "tail", _Shape(sq, 50, 24), wide=True)
    for sk in (2, 3, 8, 16, 33, 64, 96, 192, 193, 300):
        yield _case(f"wide_sk{sk}", "tail", _Shape(50, sk, 24), wide=True)
    yield _case("wide_heads", "transposed", _Shape(131, 131, 20, b=3, h=5, memory=_heads_inside), wide=True)
    yield _case("wide_causal", "contiguous", _Shape(301, 301, 32, b=1, h=5), _Call(causal=True), wide=True)
    yield _case("wide_dropout", "contiguous", _Shape(131, 140, 16, h=3), _Call(dropout=0.2), wide=True)
    grouped = _Shape(131, 140, 16, h=6, hk=3, mask="blocked")
    yield _case("wide_grouped", "contiguous", grouped, _Call(window=(50, 20), softcap=3.0), wide=True)


CASES: tuple[Case, ...] = (*_matrix_cases(), *varlen_cases(), *cache_cases(), *_wide_cases())

INVALID = (*INVALID_ATTENTION, *INVALID_SEQUENCES)

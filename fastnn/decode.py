"""Greedy decoding of Llama-shaped models by a loop of our own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, overload

import torch
from torch import Tensor
from torch.nn import Module

from . import _dispatch, _extension
from .decoder import WHERE, Decoder, check_kind, decoder_of


def _prompts(ids: object) -> list[Tensor]:
    if isinstance(ids, Tensor) and ids.dim() == 1:
        ids = ids[None]
    if not isinstance(ids, (Tensor, list, tuple)):
        raise TypeError(f"{WHERE}: ids must be a Tensor (batch, length) or a list of prompts, got {type(ids).__name__}")
    rows = [row if isinstance(row, Tensor) else torch.tensor(row) for row in ids]
    for row in rows:
        if row.dtype not in (torch.int32, torch.int64) or row.dim() != 1 or not len(row):
            raise ValueError(
                f"{WHERE}: ids must be (batch, length) of int64, or a list of prompts (length,), none of them empty; "
                f"got one of {row.dtype} and shape {tuple(row.shape)}"
            )
    return [row.detach().cpu().long() for row in rows]


def _ends(model: Any, eos: int | Sequence[int] | None) -> frozenset[int]:
    if eos is None:
        for holder in (getattr(model, "generation_config", None), model.config):
            eos = getattr(holder, "eos_token_id", None)
            if eos is not None:
                break
    found = [] if eos is None else [eos] if isinstance(eos, int) else list(eos)
    if any(isinstance(one, bool) or not isinstance(one, int) for one in found):
        raise TypeError(f"{WHERE}: eos must be an int, a sequence of ints, or None, got {eos!r}")
    return frozenset(found)


def _check_call(model: object, prompts: list[Tensor], max_new_tokens: object) -> None:
    if not isinstance(model, Module):
        raise TypeError(f"{WHERE}: model must be a Module, got {type(model).__name__}")
    if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, int) or max_new_tokens < 0:
        raise ValueError(f"{WHERE}: max_new_tokens must be an int of 0 or more, got {max_new_tokens!r}")
    if _extension.missing or _dispatch.backend_in_force() not in (None, "cpu"):
        forced = _dispatch.backend_in_force()
        why = _extension.missing or f"backend {forced!r} is asked for"
        raise NotImplementedError(f"{WHERE}: it runs on the CPU kernels alone: {why}")
    check_kind(model)
    config: Any = model.config
    words, most = config.vocab_size, config.max_position_embeddings
    longest = max((len(row) for row in prompts), default=0) + max_new_tokens
    if longest > most:
        raise ValueError(f"{WHERE}: {longest} positions are wanted, and the model knows {most}")
    for row in prompts:
        if int(row.min()) < 0 or int(row.max()) >= words:
            raise IndexError(f"{WHERE}: ids must be in 0 .. {words - 1}, got {int(row.min())} .. {int(row.max())}")


def _steps(decoder: Decoder, prompts: list[Tensor], most: int, ends: frozenset[int]) -> list[list[int]]:
    """The new tokens of each prompt, the one that ended it included."""
    batch, lengths = len(prompts), torch.tensor([len(row) for row in prompts])
    found: list[list[int]] = [[] for _ in prompts]
    if not batch or not most:
        return found
    caches = decoder.caches(batch, int(lengths.max()) + most)
    # What stands behind a shorter prompt is seen by no query of it, and its rows are written over.
    padded = torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True)
    hidden = decoder.run(padded, caches, torch.zeros(batch, dtype=torch.int64))
    hidden = hidden[torch.arange(batch), lengths - 1]
    going = list(range(batch))
    for step in range(most):
        tokens = decoder.logits(hidden).argmax(-1)
        for i, token in zip(going, tokens.tolist(), strict=True):
            found[i].append(token)
        if step + 1 == most:
            break
        staying = [j for j, i in enumerate(going) if found[i][-1] not in ends]
        if not staying:
            break
        if len(staying) < len(going):
            index = torch.tensor(staying)
            going, tokens, lengths = [going[j] for j in staying], tokens[index], lengths[index]
            caches.keep(index, int(lengths.max()))
        hidden = decoder.run(tokens[:, None], caches, lengths)[:, 0]
        lengths = lengths + 1
    return found


@overload
def generate(
    model: Module, ids: Tensor, *, max_new_tokens: int, eos: int | Sequence[int] | None = None, pad: int | None = None
) -> Tensor: ...
@overload
def generate(
    model: Module,
    ids: Sequence[Any],
    *,
    max_new_tokens: int,
    eos: int | Sequence[int] | None = None,
    pad: int | None = None,
) -> list[Tensor]: ...
def generate(
    model: Module,
    ids: Tensor | Sequence[Any],
    *,
    max_new_tokens: int,
    eos: int | Sequence[int] | None = None,
    pad: int | None = None,
) -> Tensor | list[Tensor]:
    """Continues prompts by the most likely token, again and again: what `model.generate(ids, do_sample=False)` does.

    The model's layers may be floating or quantised (`fastnn.quantize_`, `fastnn.load_gguf`), of mixed kinds too. Its
    weights are read once into packed copies, which are kept beside them until one is changed (made anew for each call
    where dense layers hold parameters that require a gradient: `model.requires_grad_(False)` keeps them). Tokens are
    those of the model itself but where two are as likely up to rounding.

    Args:
        model: transformers' LlamaForCausalLM or MistralForCausalLM without a window, in float32, bfloat16 or float16
            on the CPU; the rotation's frequencies fixed (default, linear, llama3, yarn). No hooks.
        ids: (batch, length) or (length,), int64; or a list of prompts of any lengths, tensors or lists of ints, which
            run together, each with as many keys and values as it has.
        max_new_tokens: how many at most.
        eos: the token or tokens that end a sequence; None for the model's own (`generation_config`, `config`), () for
            none.
        pad: what follows the end of a sequence in a batch; None for the model's own, or the first of `eos`.

    Returns:
        (batch, length + new) of prompts and tokens, padded behind the end of a sequence, as transformers gives; of a
        list of prompts, a list of tensors without padding.

    Raises:
        NotImplementedError: a model that is not Llama-shaped, or with what the loop would pass by, said by name; no
            CPU kernels.
        ValueError: a prompt that is empty or no integers, more positions than the model knows.
        IndexError: an id that is no token.
        TypeError: arguments of a wrong type.
    """
    prompts = _prompts(ids)
    _check_call(model, prompts, max_new_tokens)
    ends = _ends(model, eos)
    with torch.no_grad():
        decoder = decoder_of(model)
        with torch.inference_mode():
            new = _steps(decoder, prompts, max_new_tokens, ends)
    joined = [
        torch.cat((row, torch.tensor(tokens, dtype=torch.int64))) for row, tokens in zip(prompts, new, strict=True)
    ]
    if not isinstance(ids, Tensor):
        return joined
    if not joined:
        return ids.clone()
    return torch.nn.utils.rnn.pad_sequence(joined, batch_first=True, padding_value=_pad(model, pad, ends))


def _pad(model: Any, pad: int | None, ends: frozenset[int]) -> int:
    if pad is None:
        for holder in (getattr(model, "generation_config", None), model.config):
            pad = getattr(holder, "pad_token_id", None)
            if pad is not None:
                return int(pad)
        return min(ends, default=0)
    return pad

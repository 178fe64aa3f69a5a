"""A training step of GPT-2 small (124 million weights): ours, eager and compiled torch, in turns.

    python benchmarks/gpt2_step.py [--dtype float32] [--batch 4] [--length 256] [--threads 1] [--rounds 3]

The demo's model (fastnn/demo/language.py) in GPT-2's size, its head tied to the embedding: forward, loss, backward and
AdamW's step on random tokens; bfloat16 is autocast. The ops differ, everything else is the same code. Every contender
takes one step to warm up (torch.compile its compilation) and then one in every round, in turns; a ratio is the median
of the rounds' own. The losses of the last step, after equal steps from equal weights, stand beside the times.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastnn.demo.language import CharacterModel

VOCABULARY, WIDTH, LAYERS, HEADS = 50257, 768, 12, 12


def loss_of(name: str, length: int) -> tuple[nn.Module, Callable[[Tensor, Tensor], Tensor]]:
    """A model, the same weights for every contender, and its loss."""
    torch.manual_seed(0)
    kind = "fastnn" if name == "fastnn" else "torch"
    model = CharacterModel(kind, False, VOCABULARY, length, WIDTH, LAYERS, HEADS)
    nn.init.normal_(model.tokens.weight, std=0.02)
    model.head.weight = model.tokens.weight

    def loss(x: Tensor, y: Tensor) -> Tensor:
        return model.loss(model(x), y)

    return model, torch.compile(loss) if name == "compile" else loss


def step_of(name: str, length: int, dtype: torch.dtype) -> Callable[[Tensor, Tensor], float]:
    """One training step, which returns its loss."""
    model, loss = loss_of(name, length)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    half = dtype != torch.float32

    def step(x: Tensor, y: Tensor) -> float:
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype) if half else contextlib.nullcontext():
            found = loss(x, y)
        found.backward()
        optimizer.step()
        return found.item()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--with", dest="names", default="fastnn,eager,compile")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    names = given.names.split(",")
    tokens = torch.randint(VOCABULARY, (given.batch, given.length + 1), generator=torch.Generator().manual_seed(1))
    x, y = tokens[:, :-1], tokens[:, 1:].reshape(-1)
    steps = {name: step_of(name, given.length, getattr(torch, given.dtype)) for name in names}
    shape = f"{given.batch} x {given.length}"
    print(f"torch {torch.__version__}, {given.dtype}, {shape}, {given.threads} thread(s)", flush=True)
    for name, step in steps.items():
        start = time.perf_counter()
        step(x, y)
        print(f"{name:8} first step {time.perf_counter() - start:6.1f} s", flush=True)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    losses = dict.fromkeys(names, 0.0)
    for _ in range(given.rounds):
        for name, step in steps.items():
            start = time.perf_counter()
            losses[name] = step(x, y)
            seconds[name].append(time.perf_counter() - start)
        print("  ".join(f"{name} {taken[-1]:.2f}" for name, taken in seconds.items()), flush=True)
    for name, taken in seconds.items():
        ratio = statistics.median(t / ours for t, ours in zip(taken, seconds[names[0]], strict=True))
        print(f"{name:8} {statistics.median(taken):7.3f} s   {ratio:5.2f} of {names[0]}'s   loss {losses[name]:.4f}")


if __name__ == "__main__":
    main()

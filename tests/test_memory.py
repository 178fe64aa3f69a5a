"""What is saved for backward, that nothing leaks, threads and forks."""

from __future__ import annotations

import gc
import os
import resource
import subprocess
import sys
import threading
import weakref

import pytest
import torch

import fastnn
from fastnn import (
    add_layer_norm,
    add_rms_norm,
    cross_entropy,
    layer_norm,
    linear,
    linear_cross_entropy,
    log_softmax,
    rms_norm,
    rope,
    scaled_dot_product_attention,
    softmax,
    testing,
)
from fastnn.ops.linear import ACTIVATIONS, linear_reference
from fastnn.testing import find_case, same_bits


def saved_bytes(call, parameters=()):
    """Bytes that a call keeps for backward, each storage once, those of parameters (which live on anyway) aside."""
    storages = {}
    ours = {parameter.untyped_storage().data_ptr() for parameter in parameters}

    def pack(tensor):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = call()
    del output
    return sum(size for pointer, size in storages.items() if pointer not in ours)


@pytest.mark.parametrize("wanted", ["input weight bias", "input", "weight", "input bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_linear_saves_no_more_than_torch(activation, dtype, wanted):
    def operands():
        shapes = {"input": (40, 50), "weight": (60, 50), "bias": (60,)}
        return [torch.randn(shape).to(dtype).requires_grad_(name in wanted) for name, shape in shapes.items()]

    x, w, b = operands()
    ours = saved_bytes(lambda: linear(x, w, b, activation=activation), (w, b))
    theirs = saved_bytes(lambda: linear_reference(x, w, b, activation), (w, b))
    assert ours <= theirs


@pytest.mark.parametrize("function", [softmax, log_softmax])
def test_softmax_saves_its_output_only(function):
    x = torch.randn(40, 50, requires_grad=True)
    assert saved_bytes(lambda: function(x, -1)) == x.nbytes
    assert saved_bytes(lambda: function(x.t(), -1)) == x.nbytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_save_eight_bytes_a_row(dtype):
    """Beside their arguments, which live on anyway, or the sum, which is a result: not the normalized rows."""
    x, w = torch.randn(40, 50).to(dtype).requires_grad_(), torch.randn(50).to(dtype).requires_grad_()
    assert saved_bytes(lambda: layer_norm(x, (50,), w, w), (x, w)) == 40 * 8
    assert saved_bytes(lambda: rms_norm(x, (50,), w), (x, w)) == 40 * 8
    assert saved_bytes(lambda: add_layer_norm(x, x, w, w)[0], (x, w)) == 40 * 8 + x.nbytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cross_entropy_saves_eight_bytes_a_row(dtype):
    """Beside its arguments, which live on anyway: no probabilities, no gradient."""
    x, target = torch.randn(40, 500).to(dtype).requires_grad_(), torch.arange(40)
    weight = torch.rand(500).to(dtype)
    divisors = 8
    for given in (target, torch.softmax(x.detach(), 1)):
        arguments = (x, given, weight)
        ours = saved_bytes(lambda arguments=arguments: cross_entropy(*arguments, label_smoothing=0.1), arguments)
        assert ours == 40 * 8 + divisors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_saves_its_output_and_four_bytes_a_query(dtype):
    arguments = [torch.randn(2, 3, 200, 8).to(dtype).requires_grad_() for _ in range(3)]
    mask = torch.rand(200, 200) < 0.9
    dropped = saved_bytes(lambda: scaled_dot_product_attention(*arguments, mask, 0.1), (*arguments, mask))
    output = arguments[0].nbytes
    assert dropped == output + 2 * 3 * 200 * 4 + 8  # and the seed


LONG = """
import resource, sys, warnings
warnings.simplefilter("ignore")
import torch, fastnn
torch.set_num_threads(2)
def attend(length):
    leaves = [torch.randn(1, 1, length, 16, requires_grad=True) for _ in range(3)]
    out = fastnn.scaled_dot_product_attention(*leaves, dropout_p=float(sys.argv[1]), is_causal=sys.argv[2] == "causal")
    out.sum().backward()
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
attend(64)
before = peak()
attend(8192)
print(peak() - before)
"""


@pytest.mark.parametrize("options", [("0.0", "full"), ("0.1", "causal")])
def test_attention_has_no_buffer_of_length_times_length(options, extension):
    """Forward and backward of 8192 x 8192: one such float32 buffer would be 268 MB, one of bytes 67 MB."""
    done = subprocess.run([sys.executable, "-c", LONG, *options], capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) < 30e6


def test_without_gradient_nothing_is_saved():
    x, w = torch.randn(40, 50), torch.randn(60, 50)
    assert saved_bytes(lambda: linear(x, w, activation="gelu")) == 0
    with torch.no_grad():
        assert saved_bytes(lambda: softmax(x.requires_grad_(), -1)) == 0


STEPS = {
    "softmax": lambda x, w, b: softmax(x, -1),
    "log_softmax": lambda x, w, b: log_softmax(x, 0),
    "linear": lambda x, w, b: linear(x, w, b, activation="gelu"),
    "linear_relu": lambda x, w, b: linear(x, w, b, activation="relu"),
    "layer_norm": lambda x, w, b: layer_norm(x, x.shape[-1:], w[0], w[1]),
    "add_rms_norm": lambda x, w, b: add_rms_norm(x, x, w[0])[0],
    "cross_entropy": lambda x, w, b: cross_entropy(x, torch.zeros(len(x), dtype=torch.long), z_loss=0.1),
    "linear_cross_entropy": lambda x, w, b: linear_cross_entropy(x, w, torch.arange(len(x)) % len(w), linear_bias=b),
    "linear_cross_entropy_none": lambda x, w, b: linear_cross_entropy(
        x, w, torch.arange(len(x)) % len(w), reduction="none"
    ),
    "rope": lambda x, w, b: rope(x[None, None, :, :4], None, x.detach()[:, :4], x.detach()[:, 1:5])[0],
    "attention": lambda x, w, b: scaled_dot_product_attention(x[None, None], w[None, None], w[None, None], None, 0.1),
}


@pytest.mark.parametrize("step", STEPS)
def test_graph_is_freed_by_reference_counts(step):
    """No cycle: everything goes when the last reference goes, without the garbage collector."""
    x, w, b = (torch.randn(shape, requires_grad=True) for shape in ((4, 5), (6, 5), (6,)))
    gc.collect()
    gc.disable()
    try:
        output = STEPS[step](x, w, b)
        alive = weakref.ref(output)
        node = weakref.ref(output.grad_fn)
        output.sum().backward(create_graph=False)
        del output
        assert alive() is None and node() is None
    finally:
        gc.enable()


def rss_bytes():
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * resource.getpagesize()


def invalid(raw):
    try:
        raw()
    except (TypeError, ValueError, IndexError, NotImplementedError, RuntimeError):
        return
    raise AssertionError("the call is valid")


def one_round(x, w, b):
    for step in STEPS.values():
        step(x, w, b).sum().backward()
    x.grad = w.grad = b.grad = None
    with torch.no_grad():
        layer = fastnn.nn.Linear(w.shape[1], w.shape[0]).freeze().eval()
        layer(x)
        if "fastnn" in torch.ops._dir and testing.best().isa:  # errors in the bindings must not leak either
            invalid(lambda: torch.ops.fastnn.linear_fwd(x, w, b[1:], 0, True, True))
            invalid(lambda: torch.ops.fastnn.linear_bwd(x, x, w, None, 0, list(x.shape), [True] * 3, True))
            invalid(lambda: torch.ops.fastnn.softmax_bwd(x, w, 0, False, torch.float32, True))
            invalid(lambda: cross_entropy(x, torch.full((len(x),), x.shape[1])))
            invalid(lambda: linear_cross_entropy(x, w, torch.full((len(x),), len(w))))
            heads = [t[None, None] for t in (x, w, w)]
            invalid(lambda: torch.ops.fastnn.attention_fwd(*heads, b[1:], None, 0.0, 1.0, 0.0, -1, -1, True))


def test_repeated_calls_do_not_leak():
    """10 MB of tensors a round: one forgotten per round is 100 times the bound."""
    x, w, b = torch.randn(1000, 600), torch.randn(700, 600), torch.randn(700)
    x, w, b = x.requires_grad_(), w.requires_grad_(), b.requires_grad_()
    for _ in range(5):
        one_round(x, w, b)
    before = rss_bytes()
    for _ in range(40):
        one_round(x, w, b)
    assert rss_bytes() - before < 20e6


def test_small_calls_do_not_leak():
    x, w, b = (torch.randn(shape, requires_grad=True) for shape in ((4, 5), (6, 5), (6,)))
    for _ in range(300):
        one_round(x, w, b)
    before = rss_bytes()
    for _ in range(2000):
        one_round(x, w, b)
    assert rss_bytes() - before < 4e6


def test_calls_from_many_threads():
    """Forward and backward of everything at once, from threads of their own, give what one thread gives."""
    work = [("softmax", "rows"), ("softmax", "log_columns"), ("linear", "gelu_bias"), ("linear", "packed_rows")]
    work += [("cross_entropy", "everything_mean"), ("attention", "softcap_masked")]

    def results(op, name):
        case = find_case(op, name)
        inputs = case.inputs(torch.float32)
        leaves = {key: t.detach().requires_grad_(key in case.differentiable) for key, t in inputs.items()}
        with torch.set_grad_enabled(bool(case.differentiable)):
            output = case.call(leaves)
        if not case.differentiable:
            return [output]
        wanted = [leaves[key] for key in case.differentiable]
        return [output, *torch.autograd.grad(output, wanted, torch.ones_like(output))]

    expected = {key: results(*key) for key in work}
    wrong = []

    def worker(start):
        for i in range(60):
            key = work[(start + i) % len(work)]
            if not all(same_bits(a, b) for a, b in zip(results(*key), expected[key], strict=True)):
                wrong.append(key)

    threads = [threading.Thread(target=worker, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


FORK = """
import os, signal, sys, warnings
warnings.simplefilter("ignore")
import torch, fastnn
torch.set_num_threads(2)
x, w = torch.randn(600, 500), torch.randn(700, 500)
def work():
    y = fastnn.linear(x.requires_grad_(), w.requires_grad_(), activation="gelu")
    y = fastnn.softmax(y, -1)
    return y.detach().numpy().tobytes()  # torch's own parallel operations, equal() among them, do hang in a child
before = work()
child = os.fork()
if child == 0:
    signal.alarm(40)
    os._exit(0 if work() == before else 3)
_, status = os.waitpid(child, 0)
print("child", os.waitstatus_to_exitcode(status))
assert work() == before
"""


def test_a_forked_child_does_not_hang(extension):
    """After the parent has used its threads. Forward only: after a fork autograd's backward is torch's business."""
    done = subprocess.run([sys.executable, "-c", FORK], capture_output=True, text=True, timeout=90)
    assert done.stdout.strip() == "child 0", done.stderr[-2000:]


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 6

    def __getitem__(self, index):
        x = torch.full((40, 50), float(index))
        return linear(softmax(x, -1), torch.ones(60, 50), activation="relu")


def test_in_data_loader_workers():
    torch.set_num_threads(2)
    try:
        linear(torch.randn(600, 500), torch.randn(700, 500))
        loaded = list(torch.utils.data.DataLoader(Rows(), batch_size=3, num_workers=2, timeout=60))
    finally:
        torch.set_num_threads(1)
    assert len(loaded) == 2 and all(batch.shape == (3, 40, 60) for batch in loaded)
    assert all(((batch - 1).abs() < 1e-5).all() for batch in loaded)


THREADS = """
import os, warnings
warnings.simplefilter("ignore")
import numpy, torch, fastnn
torch.set_num_threads({threads})
x, w = (torch.from_numpy(numpy.ones((n, 500), numpy.float32)) for n in (600, 700))  # torch.ones would start threads
before = len(os.listdir("/proc/self/task"))
{call}
print(len(os.listdir("/proc/self/task")) - before, torch.get_num_threads(), fastnn._extension._C.threads())
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="counts threads in /proc")
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("call", ["fastnn.softmax(x, -1)", "fastnn.linear(x, w)"])
def test_as_many_threads_as_torch_says(call, threads, extension):
    """One set: no call starts another, the kernels have no pool of their own. Two set: a large call uses both."""
    code = THREADS.format(threads=threads, call=call)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=90)
    assert done.stdout.split() == [str(threads - 1), str(threads), str(threads)], done.stderr[-2000:]


def available_bytes():
    with open("/proc/meminfo") as meminfo:
        return next(int(line.split()[1]) * 1024 for line in meminfo if line.startswith("MemAvailable"))


@pytest.mark.slow
@pytest.mark.parametrize("function", [softmax, log_softmax, lambda x, _: linear(x, torch.ones(64, 64, dtype=x.dtype))])
def test_more_elements_than_32_bits_count(function):
    """The input is one row, expanded; the output has 2^31 + 192 elements of its own."""
    if available_bytes() < 6 * 2**30:
        pytest.skip(f"needs 6 GB of free memory, there are {available_bytes() / 2**30:.1f}")
    row = torch.randn(1, 64).bfloat16()
    output = function(row.expand(2**25 + 3, 64), 1)
    assert output.numel() > 2**31 and output.is_contiguous()
    expected = function(row.expand(200, 64), 1)
    for start in (0, 2**24 - 100, 2**25 - 197):
        assert same_bits(output[start : start + 200], expected)


@pytest.mark.parametrize("function", [softmax, log_softmax])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("target", [target for target in testing.targets() if target.isa], ids=str)
def test_results_written_past_the_caches_have_the_same_bits(target, dtype, function):
    """A result of 24 MiB is streamed, its first rows by themselves are not."""
    cols = (24 << 20) // 1024 // dtype.itemsize

    def both_ways(rows):
        x = torch.randn(1024, cols, generator=torch.Generator().manual_seed(0)).to(dtype)[:rows].requires_grad_()
        y = function(x, -1)
        (dx,) = torch.autograd.grad(y, x, torch.linspace(-1, 1, cols).to(dtype).expand_as(y))
        return y.detach(), dx

    with target.forced():
        for large, small in zip(both_ways(1024), both_ways(8), strict=True):
            assert same_bits(large[:8], small)

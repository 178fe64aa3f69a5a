"""Faults in models from GGUF files and in generating."""

from __future__ import annotations

from fault import Fault

MODELS, DECODER = "fastnn/quant/gguf_models.py", "fastnn/decoder.py"
A_LLAMA = ("tests/test_gguf_models.py::test_a_llama_computes_what_its_codes_stand_for[Q4_1-True]",)
HIDDEN = ("tests/test_generate.py::test_hidden_states_are_those_of_the_model[scalar-dtype0]",)
FOLLOWS = ("tests/test_generate.py::test_follows_its_weights",)
GENERATE_FAULTS = [
    Fault(
        "gguf: rows of queries and keys stay as llama.cpp turned them",
        MODELS,
        "rows // heads // 2, 2).transpose(1, 2).reshape(-1)",
        "rows // heads // 2, 2).reshape(-1)",
        A_LLAMA,
    ),
    Fault(
        "gguf: scales stay where they were while codes are turned",
        "fastnn/quant/gguf.py",
        "codes[rows], scale[rows]",
        "codes[rows], scale",
        A_LLAMA,
    ),
    Fault(
        "gguf: a tensor that nothing takes is left out without a word",
        MODELS,
        "    if left:\n",
        "    if left and False:\n",
        ("tests/test_gguf_models.py::test_nothing_of_the_file_is_left_out",),
    ),
    Fault(
        "generate: positions count from the step's first token",
        "csrc/cpu/decoder.cpp",
        "positions.push_back(step.lengths[b] + i)",
        "positions.push_back(i)",
        HIDDEN,
    ),
    Fault(
        "generate: the gate is its own factor",
        "csrc/cpu/decoder.cpp",
        "a.factor = at.both + s.hidden * element_bytes(s.dtype);",
        "a.factor = at.both;",
        HIDDEN,
    ),
    Fault(
        "generate: sequences that go on take the rows of those that ended",
        DECODER,
        "cache.reorder(index)",
        "cache.reorder(torch.arange(len(index)))",
        ("tests/test_generate.py::test_a_sequence_ends_and_the_others_go_on",),
    ),
    Fault(
        "generate: a short prompt goes on behind its padding",
        "fastnn/decode.py",
        "hidden = hidden[torch.arange(batch), lengths - 1]",
        "hidden = hidden[:, -1]",
        ("tests/test_generate.py::test_prompts_of_any_lengths_run_together",),
    ),
    Fault(
        "generate: copies of weights that train are kept",
        DECODER,
        "decoder is None or decoder.may_change_unseen or ",
        "decoder is None or ",
        FOLLOWS,
    ),
    Fault(
        "generate: a weight that was written to is not packed again",
        DECODER,
        "*(state_of(t) for t in tensors)",
        "*(t.data_ptr() for t in tensors)",
        FOLLOWS,
    ),
]

"""Explain and accelerate a transformer from the transformers library (random weights, nothing is downloaded)."""

import torch
from transformers import BertConfig, BertModel

import fastnn

torch.manual_seed(0)
model = BertModel(
    BertConfig(hidden_size=256, num_hidden_layers=4, num_attention_heads=8, intermediate_size=1024)
).eval()
inputs = {"input_ids": torch.randint(1000, 20000, (8, 64)), "attention_mask": torch.ones(8, 64, dtype=torch.long)}

print(fastnn.explain(model, example_inputs=inputs))
print()
report = fastnn.accelerate(model, example_inputs=inputs, freeze=True)
print(report)

with torch.no_grad(), fastnn.record() as runs:
    model(**inputs)
print(f"\n{len(runs)} kernels ran: {sorted(set(runs))}")

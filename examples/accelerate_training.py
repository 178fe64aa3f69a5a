"""Train a small network on fastnn's kernels: the same losses as torch, and the model is plain torch afterwards."""

import copy

import torch
import torch.nn.functional as F
from torch import nn

import fastnn


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(20, 128)
        self.second = nn.Linear(128, 128)
        self.head = nn.Linear(128, 3)

    def forward(self, x):
        x = F.gelu(self.first(x))
        x = F.dropout(F.relu(self.second(x)), 0.1, self.training)
        return self.head(x)


def train(model, x, target, steps=50):
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = F.cross_entropy(model(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


torch.manual_seed(0)
x = torch.randn(256, 20)
target = (x[:, :3] @ torch.randn(3, 3)).argmax(-1)
plain = Classifier()
ours = copy.deepcopy(plain)

with fastnn.accelerate(ours, example_inputs=x) as report:
    print(report)
    ours_losses = train(ours, x, target)
plain_losses = train(plain, x, target)

print(f"\nloss after 50 steps: torch {plain_losses[-1]:.5f}, fastnn {ours_losses[-1]:.5f}")
print(f"largest difference on the way: {max(abs(a - b) for a, b in zip(plain_losses, ours_losses, strict=True)):.1e}")
print(f"afterwards the layers are {type(ours.first).__module__}.{type(ours.first).__name__} again")

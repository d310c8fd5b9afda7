"""A run that is stopped and goes on draws what it would have drawn."""

import io

import torch

import fastmix

x, y = torch.randn(8, 3, 8, 8), torch.arange(8)
mixup = fastmix.Mixup(0.2, seed=0)
mixup(x, y)  # the first batch

file = io.BytesIO()  # or a path
torch.save({"mixup": mixup.state_dict()}, file)
expected, _ = mixup(x, y)  # the second

file.seek(0)
again = fastmix.Mixup(0.2, seed=0)
again.load_state_dict(torch.load(file)["mixup"])
mixed, _ = again(x, y)
assert torch.equal(mixed, expected)

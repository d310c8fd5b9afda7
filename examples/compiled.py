"""A whole step in one program of torch.compile, sampler included."""

import torch

import fastmix

classes = 4
x, y = torch.randn(16, 3, 8, 8), torch.arange(16) % classes
model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, classes))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
mixup = fastmix.Mixup(0.2, seed=0)


def step(x, y):
    mixed, target = mixup(x, y)
    return fastmix.soft_cross_entropy(model(mixed), target)


# on a GPU leave the backend out; "aot_eager" needs no compiler
compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
for _ in range(2):
    loss = compiled(x, y)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()

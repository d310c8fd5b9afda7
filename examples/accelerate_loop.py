"""Mixing after the loader of accelerate."""

import torch
from accelerate import Accelerator

import fastmix

classes = 4
dataset = [(torch.rand(3, 8, 8), i % classes) for i in range(16)]

accelerator = Accelerator(gradient_accumulation_steps=2)
model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 8 * 8, classes))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
loader = torch.utils.data.DataLoader(dataset, batch_size=4)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
mixup = fastmix.Mixup(0.2, seed=0)

for x, y in loader:
    with accelerator.accumulate(model):
        x, target = mixup(x, y)
        logits = model(x)
        loss = fastmix.soft_cross_entropy(logits, target)
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()

logits, parts = accelerator.gather((logits.detach(), target.parts()))
accuracy = fastmix.mixed_accuracy(logits, parts)

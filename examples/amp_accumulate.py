"""Autocast, GradScaler and accumulated gradients in one loop."""

import torch

import fastmix

device = "cuda" if torch.cuda.is_available() else "cpu"
classes = 4
x, y = torch.randn(16, 3, 8, 8, device=device), torch.arange(16, device=device) % classes
model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, classes)).to(device)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
scaler = torch.amp.GradScaler(device, enabled=device == "cuda")
mixup = fastmix.Mixup(0.2, seed=0)
parts = 2

for part_x, part_y in zip(x.chunk(parts), y.chunk(parts), strict=True):
    mixed, target = mixup(part_x, part_y)  # float32 images; the model casts them
    with torch.autocast(device, dtype=torch.float16 if device == "cuda" else torch.bfloat16):
        logits = model(mixed)
    loss = fastmix.soft_cross_entropy(logits, target) / parts  # half precision logits are fine: the loss is float32
    scaler.scale(loss).backward()
scaler.step(optimizer)
scaler.update()
optimizer.zero_grad()

"""A first training loop: mixed batches to learn from, plain ones to validate."""

import torch

import fastmix

torch.manual_seed(0)
images, labels = torch.randn(256, 3, 8, 8), torch.randint(0, 4, (256,))
images[torch.arange(256), 0, labels] += 2  # a bright line tells the class
train, held_out = (images[:192], labels[:192]), (images[192:], labels[192:])

model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 64), torch.nn.ReLU(), torch.nn.Linear(64, 4))
optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
mixup = fastmix.Mixup(alpha=0.2, seed=0)
criterion = fastmix.SoftCrossEntropyLoss(label_smoothing=0.1)
validation = fastmix.SoftCrossEntropyLoss()  # without smoothing

for _epoch in range(5):
    for x, y in zip(train[0].split(32), train[1].split(32), strict=True):
        mixed, target = mixup(x, y)
        loss = criterion(model(mixed), target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        logits = model(held_out[0])
        print(f"loss {validation(logits, held_out[1]):.3f}, accuracy {fastmix.mixed_accuracy(logits, held_out[1]):.2f}")

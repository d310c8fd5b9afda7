"""timm's Mixup by a changed import."""

import torch

from fastmix.compat.timm import Mixup, SoftTargetCrossEntropy

classes = 4
dataset = [(torch.rand(3, 8, 8), i % classes) for i in range(16)]

mixup = Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, label_smoothing=0.1, num_classes=classes)
criterion = SoftTargetCrossEntropy()
model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.LazyLinear(classes))

for x, y in torch.utils.data.DataLoader(dataset, batch_size=4):
    x, target = mixup(x, y)
    criterion(model(x), target).backward()

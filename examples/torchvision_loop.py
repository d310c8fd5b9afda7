"""torchvision's MixUp and CutMix by a changed import."""

import torch
from torchvision.transforms import v2

from fastmix.compat.torchvision import CutMix, MixUp

classes = 4
dataset = [(torch.rand(3, 8, 8), i % classes) for i in range(16)]

mix = v2.RandomChoice([MixUp(alpha=0.2, num_classes=classes), CutMix(num_classes=classes)])
criterion = torch.nn.CrossEntropyLoss(label_smoothing=0.1)
model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.LazyLinear(classes))


def collate(batch):
    return mix(*torch.utils.data.default_collate(batch))


for image, target in torch.utils.data.DataLoader(dataset, batch_size=4, collate_fn=collate):
    output = model(image)
    criterion(output, target).backward()
    correct = output.argmax(1) == target.max(dim=1)[1]

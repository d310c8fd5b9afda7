"""Metrics of mixed batches."""

import torch
import torchmetrics

import fastmix

classes = 4
dataset = [(torch.rand(3, 8, 8), i % classes) for i in range(16)]

mixed = torchmetrics.MeanMetric()
plain = torchmetrics.Accuracy(task="multiclass", num_classes=classes)
mixup = fastmix.Mixup(0.2)

for x, y in torch.utils.data.DataLoader(dataset, batch_size=4):
    x, target = mixup(x, y)
    logits = torch.randn(len(x), classes)
    mixed.update(fastmix.mixed_accuracy(logits, target), weight=len(target))
    plain.update(logits, target.argmax())
accuracies = mixed.compute(), plain.compute()

"""Mixing in Lightning by a callback."""

import lightning
import torch

import fastmix
from fastmix.compat.lightning import MixCallback

classes = 4
dataset = [(torch.rand(3, 8, 8), i % classes) for i in range(16)]


class Classifier(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 8 * 8, classes))

    def training_step(self, batch, batch_idx):
        x, y = batch
        return torch.nn.functional.cross_entropy(self.model(x), y)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


callback = MixCallback(fastmix.Mixup(0.2, seed=0), until_epoch=90)
trainer = lightning.Trainer(max_epochs=1, accelerator="cpu", callbacks=[callback], logger=False, enable_checkpointing=False)
trainer.fit(Classifier(), torch.utils.data.DataLoader(dataset, batch_size=4))

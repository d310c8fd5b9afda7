"""Mixing in fastai by a callback."""

import torch
from fastai.callback.core import Callback
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner

import fastmix

classes = 4
dataset = [(torch.rand(3, 8, 8), i % classes) for i in range(16)]


class MixCallback(Callback):
    def before_batch(self):
        if self.learn.training:
            x, target = mixup(self.learn.xb[0], self.learn.yb[0])
            self.learn.xb, self.learn.yb = (x,), (target,)


mixup = fastmix.Mixup(0.2, seed=0)
loaders = DataLoaders(DataLoader(dataset, bs=4), DataLoader(dataset, bs=4))
model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 8 * 8, classes))
learner = Learner(loaders, model, loss_func=fastmix.SoftCrossEntropyLoss(), cbs=MixCallback())
learner.fit(1)

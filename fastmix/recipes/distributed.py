"""mixup in several processes, by DistributedDataParallel:

    torchrun --nproc-per-node 2 -m fastmix.recipes.distributed --epochs 4

A small network learns scikit-learn's digits. What a training script of your own needs is all here:

    data        DistributedSampler gives each process rows of its own; `set_epoch` shuffles anew
    mixing      `Mixup(seed=0)`, the same line in each process: the stream is the seed's and the rank's
    steps       gradients of `--accumulate` batches are added up under `no_sync`, and exchanged at the last one
    resume      rank 0 writes model, optimiser, sampler and epoch; every process reads that file and goes on along its own stream.
                A run that was stopped ends with the same bits as one that was not

Without torchrun it is one process. On a machine with a GPU for each process it uses them.
"""

import argparse
import contextlib
import os
import pathlib
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import fastmix


def digits():
    """(images [N, 64] in [0, 1], labels [N]), of scikit-learn."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    return TensorDataset(torch.tensor(x / 16, dtype=torch.float32), torch.tensor(y))


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))


class Training:
    """Model, optimiser, sampler and data of one process. `epoch` is the number of those that are done."""

    def __init__(self, data, *, batch=32, accumulate=2, seed=0, device="cpu"):
        rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self.device, self.accumulate, self.rank, self.epoch = torch.device(device), accumulate, rank, 0
        model = network(seed).to(self.device)
        self.model = DistributedDataParallel(model) if dist.is_initialized() else model
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        self.mixup = fastmix.Mixup(alpha=0.4, seed=seed)
        self.rows = DistributedSampler(data, world, rank, seed=seed, drop_last=True)
        self.loader = DataLoader(data, batch, sampler=self.rows, drop_last=True)

    def run_epoch(self):
        """One epoch; returns the mean loss of this process."""
        self.rows.set_epoch(self.epoch)
        total, count = torch.zeros((), device=self.device), len(self.loader) // self.accumulate * self.accumulate
        for number, (x, y) in zip(range(1, count + 1), self.loader, strict=False):
            x, target = self.mixup(x.to(self.device), y.to(self.device))
            last = number % self.accumulate == 0
            alone = contextlib.nullcontext() if last or not dist.is_initialized() else self.model.no_sync()
            with alone:
                loss = nn.functional.cross_entropy(self.model(x), target)
                (loss / self.accumulate).backward()
            total += loss.detach()
            if last:
                self.optimizer.step()
                self.optimizer.zero_grad()
        self.epoch += 1
        return float(total / count)

    def save(self, path):
        """Written by rank 0, in one step: a file is whole or not there."""
        if self.rank == 0:
            model = self.model.module if dist.is_initialized() else self.model
            parts = {"model": model, "optimizer": self.optimizer, "mixup": self.mixup}
            state = {name: part.state_dict() for name, part in parts.items()}
            torch.save({**state, "epoch": self.epoch}, f"{path}.part")
            os.replace(f"{path}.part", path)
        if dist.is_initialized():
            dist.barrier()

    def load(self, path):
        """Read by every process."""
        state = torch.load(path, map_location=self.device, weights_only=True)
        (self.model.module if dist.is_initialized() else self.model).load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.mixup.load_state_dict(state["mixup"])
        self.epoch = state["epoch"]


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m fastmix.recipes.distributed", description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=4, help="(default: %(default)s)")
    parser.add_argument("--accumulate", type=int, default=2, help="batches a step (default: %(default)s)")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("fastmix-distributed"), help="(default: %(default)s)")
    options = parser.parse_args(argv)
    if options.epochs < 1 or options.accumulate < 1:
        parser.error("--epochs, --accumulate: expected numbers of at least 1")
    device = "cpu"
    if "RANK" in os.environ:  # torchrun
        here = int(os.environ["LOCAL_RANK"])
        if torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"]):
            device = f"cuda:{here}"
            torch.cuda.set_device(here)
        dist.init_process_group("gloo" if device == "cpu" else "nccl")
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / "checkpoint.pt"
    training = Training(digits(), accumulate=options.accumulate, device=device)
    if file.exists():
        training.load(file)
    while training.epoch < options.epochs:
        loss = training.run_epoch()
        training.save(file)
        if training.rank == 0:
            print(f"epoch {training.epoch}: loss {loss:.4f}", flush=True)
    del training  # before the group: torch can hang where a model holds the last reference to it
    if dist.is_initialized():
        dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())

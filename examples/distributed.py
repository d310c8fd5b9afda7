"""DDP or FSDP: the same line on every rank, torchrun --nproc-per-node 2 examples/distributed.py. Without torchrun it is one process."""

import os
import sys
import tempfile

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import fastmix

alone = "RANK" not in os.environ
place = {"init_method": f"file://{tempfile.mkdtemp()}/store", "rank": 0, "world_size": 1} if alone else {}
dist.init_process_group("gloo", **place)  # "nccl" on GPUs
try:
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 4))
    if "--fsdp" in sys.argv:
        fully_shard(model)
    else:
        model = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    mixup = fastmix.Mixup(0.2, seed=0)  # the rank is part of the stream: each draws its own mixes
    x, y = torch.randn(8, 3, 8, 8), torch.arange(8) % 4
    mixed, target = mixup(x, y)
    fastmix.soft_cross_entropy(model(mixed), target).backward()
    optimizer.step()
    state = mixup.state_dict()  # rank 0's serves all
finally:
    dist.destroy_process_group()

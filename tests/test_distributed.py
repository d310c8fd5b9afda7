"""The recipe for several processes: ranks draw their own, learn what one process would, and go on from rank 0's file."""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.testing import assert_close as same
from torch.utils.data import TensorDataset

from fastmix.recipes import distributed
from fastmix.recipes.distributed import Training
from fastmix.sampling import draws

WORLD, EPOCHS = 2, 2
pytestmark = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available(), reason="needs torch.distributed with gloo"
)


def data():
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(torch.rand(128, 64, generator=generator), torch.randint(0, 10, (128,), generator=generator))


def parameters(training):
    model = getattr(training.model, "module", training.model)
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def recorded(training):
    """The lambdas that a training draws from now on, batch by batch."""
    drawn, sample = [], training.mixup._sample

    def record(*arguments):
        found = sample(*arguments)
        drawn.append(found[0].lam.clone())
        return found

    training.mixup.__dict__["_sample"] = record
    return drawn


def run(rank, folder):
    """What a process does: whole runs, and one that is stopped and begun again, from the file that rank 0 wrote."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD)
    found = {}
    for name in ("whole", "stopped"):
        training = Training(data(), batch=16)
        drawn = recorded(training)
        for epoch in range(EPOCHS):
            if name == "stopped" and epoch == 1:
                training.save(f"{folder}/checkpoint.pt")
                training = Training(data(), batch=16)
                training.load(f"{folder}/checkpoint.pt")
                later = recorded(training)
                training.run_epoch()
                drawn += later
                continue
            training.run_epoch()
        found[name] = {"drawn": torch.stack(drawn), "parameters": parameters(training)}
    torch.save(found, f"{folder}/found{rank}.pt")
    dist.barrier()
    os._exit(
        0
    )  # torch can hang where the last reference to gloo's group, a model's, ends while a thread of gloo waits for Python's lock


@pytest.mark.slow
def test_two_processes(tmp_path, monkeypatch):
    mp.spawn(run, (str(tmp_path),), WORLD)
    found = [torch.load(tmp_path / f"found{rank}.pt") for rank in range(WORLD)]
    first, second = (each["whole"]["drawn"] for each in found)
    assert first.shape == second.shape == (EPOCHS * 4, 16)
    assert not torch.equal(first, second)  # ranks draw their own
    same(found[0]["whole"]["parameters"], found[1]["whole"]["parameters"], rtol=0, atol=0)
    for each in found:  # resumed to the same bits, on both
        assert torch.equal(each["stopped"]["drawn"], each["whole"]["drawn"])
        same(each["stopped"]["parameters"], each["whole"]["parameters"], rtol=0, atol=0)
    # one process that computes what both would
    ranks = []
    for rank in range(WORLD):
        monkeypatch.setattr(draws, "process", lambda rank=rank: (None, rank))
        training = Training(data(), batch=16)
        training.rows.num_replicas, training.rows.rank = WORLD, rank
        training.rows.num_samples, training.rows.total_size = 128 // WORLD, 128
        batches = []
        for epoch in range(EPOCHS):
            training.rows.set_epoch(epoch)
            batches += [training.mixup(x, y) for x, y in training.loader]
        ranks.append(batches)
    alone = Training(data(), batch=16)
    for step in range(0, EPOCHS * 4, alone.accumulate):
        for batches in ranks:
            for x, target in batches[step : step + alone.accumulate]:
                loss = torch.nn.functional.cross_entropy(alone.model(x), target)
                (loss / (alone.accumulate * WORLD)).backward()
        alone.optimizer.step()
        alone.optimizer.zero_grad()
    same(parameters(alone), found[0]["whole"]["parameters"], rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_the_command_goes_on(tmp_path, capsys):
    if importlib.util.find_spec("sklearn") is None:
        pytest.skip("needs scikit-learn, matplotlib and rich")
    out = ["--out", str(tmp_path / "out")]
    assert distributed.main(["--epochs", "1", *out]) == 0
    assert distributed.main(["--epochs", "2", *out]) == 0
    said = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in said] == ["epoch 1", "epoch 2"]
    assert distributed.main(["--epochs", "2", "--out", str(tmp_path / "whole")]) == 0
    assert capsys.readouterr().out.splitlines() == said
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--master-port",
        "0",
        "--rdzv-backend",
        "c10d",
    ]
    command += [
        "--rdzv-endpoint",
        "localhost:0",
        "-m",
        "fastmix.recipes.distributed",
        "--epochs",
        "1",
        "--out",
        str(tmp_path / "two"),
    ]
    ran = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()}
    )
    assert ran.returncode == 0, ran.stderr
    assert "epoch 1: loss" in ran.stdout

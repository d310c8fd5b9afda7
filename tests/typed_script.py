"""A script of a user who runs `mypy --strict`: `make check` checks it, and tests/test_packaging.py runs it."""

import torch
from torch import nn

import fastmix
from fastmix import functional


def targets(logits: torch.Tensor) -> torch.Tensor:
    target = fastmix.SoftTarget(torch.tensor([[0, 1], [1, 2]]), torch.tensor([[0.7, 0.3], [0.5, 0.5]]))
    rows = fastmix.MixedRows(torch.eye(3)[:2], 0.5, torch.tensor([1, 0]))
    dense: torch.Tensor = target.to("cpu").dense(3) + rows.cpu().dense()
    total = fastmix.soft_cross_entropy(logits, target, label_smoothing=0.1) + fastmix.soft_cross_entropy(logits, dense / 2)
    total = total + fastmix.soft_binary_cross_entropy(logits, rows, class_reduction="sum")
    count: int = len(target) + target.numel()
    best: torch.Tensor = target.argmax()
    return total + fastmix.mixed_accuracy(logits, target) + count + best.sum()


def mixing(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    plan: fastmix.Mix = fastmix.RandomMix(fastmix.Mixup(0.2), fastmix.CutMix(minmax=(0.3, 0.7)), weights=[1, 2]).sample(x)
    mixed: torch.Tensor = plan.apply(x)
    by_hand = fastmix.Mix(0.7, plan.index, box=torch.tensor([[0, 0, 2, 2]] * len(x)))
    masked = fastmix.mix_masked(x, torch.rand(len(x), 2, 2), plan.index)
    several = fastmix.convex_combination([x, mixed, masked], fastmix.dirichlet(len(x), 3))
    for sampler in (
        fastmix.FMix(seed=1),
        fastmix.SmoothMix(),
        fastmix.GridMix(grid=2),
        fastmix.ResizeMix(),
        fastmix.BetaMask(0.2),
    ):
        mixed = mixed + sampler.sample(x, y).apply(x)
    mixed = mixed + fastmix.SaliencyMix().sample(x, x.abs().sum(1)).apply(x)
    return functional.mix(several, plan.lam, plan.index) + by_hand.apply(x) + mixed


def training(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.ReLU(), nn.Linear(8, 3))
    criterion = fastmix.SoftCrossEntropyLoss(label_smoothing=0.1)
    mixup = fastmix.Mixup(0.2, partner="any", seed=0)
    mixed, target = mixup(x, y)
    loss: torch.Tensor = criterion(model(mixed), target)
    lam = mixup.sample(x).lam
    index = torch.arange(len(x)).roll(1)

    def losses(lam: torch.Tensor) -> torch.Tensor:
        pair = fastmix.SoftTarget(torch.stack((y, y[index]), 1), torch.stack((lam, 1 - lam), 1))
        return fastmix.soft_cross_entropy(model(fastmix.mix(x, lam, index)), pair, reduction="none")

    loss = loss + fastmix.adversarial_mixing_loss(losses, lam, step_size=0.01, reweight=fastmix.MovingAverageReweight())
    with fastmix.mix_hidden(model[1], 0.5, index), fastmix.debug():
        loss = loss + criterion(model(x), y)
    with fastmix.backend("torch"):
        loss = loss + fastmix.js_divergence(torch.stack((model(x), model(x), model(x))))
    gradient: torch.Tensor = fastmix.input_gradient(model, x, y)
    state: dict[str, object] = mixup.state_dict()
    mixup.load_state_dict(state)
    return loss + fastmix.saliency(gradient).mean()


def main() -> None:
    x, y = torch.rand(4, 3, 8, 8), torch.tensor([0, 1, 2, 0])
    training(x, y)
    images = torch.randint(256, (4, 3, 8, 8), dtype=torch.uint8)
    batches = fastmix.ImagePipeline(fastmix.CutMix(), [0.5] * 3, [0.25] * 3, device="cpu")([(images, y)])
    for batch, _ in batches:
        mixing(batch, y)
    clean, *views = fastmix.AugMix(mean=0.5, std=0.25)(images)
    fastmix.augmix_loss(torch.rand(12, 3), y)
    targets(torch.rand(2, 3))
    assert clean.shape == views[0].shape


if __name__ == "__main__":
    main()

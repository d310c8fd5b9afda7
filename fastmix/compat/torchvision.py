"""Stand-ins for `torchvision.transforms.v2.MixUp` and `CutMix`. One changed import gives their draws and checks, with the mixing
and the targets of fastmix:

    from fastmix.compat.torchvision import CutMix, MixUp

Both are subclasses of torchvision's and override `transform` alone, so torch's random stream, `make_params`, dicts, `labels_getter`,
`RandomChoice` and `Compose` are torchvision's. Row i's partner is row i-1. Written for torchvision 0.28.
"""

from typing import Any

import torch
from torchvision import tv_tensors
from torchvision.transforms import v2

from .. import Mix, SoftTarget, _check

__all__ = ["CutMix", "MixUp", "get_mixup_cutmix"]


def _checked_classes(name: str, value: Any) -> Any:
    return None if value is None else _check.integer(name, value, 1, "None or an int of at least 1")


def _checked_alpha(name: str, value: Any) -> Any:
    if _check.number(name, value) <= 0:
        raise _check.wrong(ValueError, name, "a positive float", value)
    return float(value)


class _Mixing(_check.Checked):
    """What both transforms share: a plan made of the drawn parameters mixes images, videos and labels."""

    _options = {"alpha": _checked_alpha, "num_classes": _checked_classes, "dense": _check.flag}
    num_classes: int | None
    alpha: float
    _check_image_or_video: Any  # these three are torchvision's or the subclass's
    _mixed_images: Any
    _mix: Any

    def __setattr__(self, name: str, value: Any) -> None:
        """Checks an option; the distribution follows its alpha."""
        super().__setattr__(name, value)
        if name == "alpha":
            self._dist = torch.distributions.Beta(torch.tensor([self.alpha]), torch.tensor([self.alpha]))

    def __init__(
        self, *, alpha: float = 1.0, num_classes: Any = None, labels_getter: Any = "default", dense: Any = False
    ) -> None:
        options: Any = {"alpha": alpha, "num_classes": num_classes, "labels_getter": labels_getter}
        super().__init__(**options)
        self.dense = dense

    def transform(self, inpt: Any, params: Any) -> Any:
        if inpt is params["labels"]:
            return self._mixed_labels(inpt, params)
        typed = isinstance(inpt, (tv_tensors.Image, tv_tensors.Video))
        if not typed and (not isinstance(inpt, torch.Tensor) or isinstance(inpt, tv_tensors.TVTensor)):
            return inpt
        self._check_image_or_video(inpt, batch_size=params["batch_size"])
        mixed = self._mixed_images(inpt.as_subclass(torch.Tensor), params)
        return tv_tensors.wrap(mixed, like=inpt) if typed else mixed

    def _mixed_labels(self, labels: torch.Tensor, params: Any) -> Any:
        labels = labels.as_subclass(torch.Tensor)
        if labels.dim() == 1:
            if labels.is_floating_point() or labels.is_complex():
                raise _check.wrong(TypeError, "labels", "integer class indices [N], or rows [N, C]", labels)
            labels = labels.long()
            _check.in_range("labels", labels, self.num_classes, "a class")
        elif not labels.is_floating_point():
            _check.multi_hot("labels", labels)
            labels = labels.float()
        target = self._mix(labels, params).target(labels)
        if isinstance(target, SoftTarget):
            target.num_classes = self.num_classes
        return target.dense() if self.dense else target


def _partners(x: torch.Tensor) -> Any:
    """Returns each row's partner, the row before it."""
    return torch.arange(len(x), device=x.device).roll(1)


class MixUp(_Mixing, v2.MixUp):
    """torchvision's `MixUp`: one lam ~ Beta(alpha, alpha) for a batch, in one launch of `fastmix.mix`.

    Args:
        alpha: of the Beta distribution.
        num_classes: C; needed for class indices.
        labels_getter: which input the labels are, as of torchvision's.
        dense: returns torchvision's rows `[N, C]` in place of a `SoftTarget` (for indices `[N]`) or `MixedRows` (for rows).

    Raises:
        TypeError, ValueError: as torchvision's; an option that is wrong, also when it is set later; images that are not floating; on the CPU a label out of
            range, or integer rows that hold other numbers than 0 and 1.

    Source: arXiv:1710.09412.

    >>> import torch
    >>> from fastmix.compat.torchvision import MixUp
    >>> images, target = MixUp(num_classes=3)(torch.rand(2, 3, 4, 4), torch.tensor([0, 2]))
    >>> target.classes, target.num_classes
    (tensor([[0, 2],
            [2, 0]]), 3)
    """

    def _mix(self, x: torch.Tensor, params: Any) -> Any:
        return Mix(params["lam"], _partners(x))

    def _mixed_images(self, x: torch.Tensor, params: Any) -> Any:
        return self._mix(x, params).apply(x)


class CutMix(_Mixing, v2.CutMix):
    """torchvision's `CutMix`: one box for a batch, in one launch of `fastmix.mix`; integer images are cut as they are.

    Args, errors: as of `MixUp`, but for the dtype of images.

    Source: arXiv:1905.04899.

    >>> import torch
    >>> from fastmix.compat.torchvision import CutMix
    >>> images, target = CutMix(num_classes=3, dense=True)(torch.rand(2, 3, 4, 4), torch.tensor([0, 2]))
    >>> target.sum(1)
    tensor([1., 1.])
    """

    def _mix(self, x: torch.Tensor, params: Any) -> Any:
        x0, y0, x1, y1 = params["box"]
        box = torch.tensor([[y0, x0, y1, x1]]).to(x.device, non_blocking=True).expand(len(x), 4)
        return Mix(1.0, _partners(x), params["lam_adjusted"], box)

    def _mixed_images(self, x: torch.Tensor, params: Any) -> Any:
        if x.is_floating_point():
            return self._mix(x, params).apply(x)
        x0, y0, x1, y1 = params["box"]
        mixed = x.clone()
        mixed[..., y0:y1, x0:x1] = x[..., y0:y1, x0:x1].roll(1, 0)
        return mixed


def get_mixup_cutmix(*, mixup_alpha: Any, cutmix_alpha: Any, num_classes: Any, use_v2: Any = True, dense: Any = False) -> Any:
    """The function of that name in torchvision's classification references: one of the two, chosen for each batch, or None.

    Args:
        mixup_alpha: of `MixUp`; 0 leaves it out.
        cutmix_alpha: of `CutMix`; 0 leaves it out. (The references pass `mixup_alpha` to both.)
        num_classes: C.
        use_v2: taken for the references' sake; both are transforms of v2.
        dense: as of `MixUp`.

    >>> from fastmix.compat.torchvision import get_mixup_cutmix
    >>> len(get_mixup_cutmix(mixup_alpha=0.2, cutmix_alpha=1.0, num_classes=10).transforms)
    2
    """
    alphas = ((MixUp, mixup_alpha), (CutMix, cutmix_alpha))
    chosen = [transform(alpha=alpha, num_classes=num_classes, dense=dense) for transform, alpha in alphas if alpha > 0]
    return v2.RandomChoice(chosen) if chosen else None

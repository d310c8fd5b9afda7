"""Mixing in the Trainer of Hugging Face's transformers:

    trainer = MixTrainer(model, args, train_dataset=..., mixer=fastmix.Mixup(0.2))

A collate function is no place to mix: the Trainer collates evaluation batches with the same one. Written for transformers 5.24.
"""

import functools
from collections.abc import Mapping
from typing import Any

import torch
from transformers import Trainer

from .. import AttentiveCutMix, ManifoldMixup, MixedRows, PuzzleMix, SaliencyMix, _check, soft_cross_entropy

__all__ = ["MixTrainer", "soft_loss"]


def soft_loss(
    outputs: torch.Tensor, labels: torch.Tensor, num_items_in_batch: Any = None, *, label_smoothing: float = 0.0
) -> Any:
    """The Trainer's `compute_loss_func` for mixed labels: `fastmix.soft_cross_entropy`, scaled as the Trainer expects it to be.

    Args:
        outputs: what the model returned: a mapping with `"logits"`, or a sequence that begins with them; `[N, C]` or
            `[N, L, C]`.
        labels: a `SoftTarget` (or its `parts()`), or class indices; -100 is ignored. From a collator give the `SoftTarget` itself:
            the Trainer counts labels by `ne`, which a dict has not, and would accumulate a mean for each micro-batch.
        num_items_in_batch: how many labels all micro-batches of this step have; the loss is their sum over this number. None:
            the mean over this batch, which the Trainer does not scale.
        label_smoothing: e, in [0, 1].

    Raises:
        TypeError, ValueError: a wrong argument; rows of labels, for which a `compute_loss_func` of your own says what loss they are for.

    >>> import torch
    >>> from fastmix.compat.transformers import soft_loss
    >>> soft_loss({"logits": torch.zeros(2, 4)}, torch.tensor([0, 3]), num_items_in_batch=4)
    tensor(0.6931)
    """
    if isinstance(labels, MixedRows) or (isinstance(labels, torch.Tensor) and labels.is_floating_point()):
        expected = "a SoftTarget or class indices (pass a compute_loss_func of your own for rows of labels)"
        raise _check.wrong(TypeError, "labels", expected, labels)
    logits = outputs["logits"] if isinstance(outputs, Mapping) else outputs[0]
    logits = logits.movedim(-1, 1) if logits.dim() > 2 else logits
    if num_items_in_batch is None:
        return soft_cross_entropy(logits, labels, label_smoothing=label_smoothing)
    if isinstance(num_items_in_batch, torch.Tensor):
        num_items_in_batch = num_items_in_batch.to(logits.device)
    return soft_cross_entropy(logits, labels, label_smoothing=label_smoothing, reduction="sum") / num_items_in_batch


def _checked_mixer(name: str, value: Any) -> Any:
    if not callable(value) or isinstance(value, (ManifoldMixup, PuzzleMix, SaliencyMix, AttentiveCutMix)):
        expected = "a sampler of fastmix that needs inputs and labels alone, or another function of (inputs, labels)"
        raise _check.wrong(TypeError, name, expected, value)
    return value


def _checked_key(name: str, value: Any) -> Any:
    if not isinstance(value, str):
        raise _check.wrong(TypeError, name, "a key of the batch, a str", value)
    return value


class MixTrainer(_check.Checked, Trainer):
    """transformers' `Trainer` that mixes each training batch on the device, in `training_step`. Evaluation and prediction see
    batches as they are.

    Args:
        args, kwargs: the Trainer's. `compute_loss_func` is `soft_loss` by default, with `args.label_smoothing_factor`.
        mixer: takes `(inputs, labels)` and returns both mixed: a sampler such as `fastmix.Mixup`. One without a seed draws from
            torch's global generators, whose states the Trainer's checkpoints hold.
        inputs: the batch's key of what is mixed; the attribute `mixed_inputs`.

    Raises:
        TypeError: a mixer that cannot be called or needs more than inputs and labels, or `inputs` that is no str, also when it is set later; KeyError: a batch without
            `inputs` or labels.

    Labels are the batch's "labels", or where it has none what the one name of `args.label_names` says; the loss gets them, the model
    does not. With gradient accumulation the Trainer counts the labels of all micro-batches before they are mixed, and `soft_loss` divides
    by that number: the gradient is that of one batch.
    """

    compute_loss_func: Any
    _options = {"mixer": _checked_mixer, "mixed_inputs": _checked_key}

    def __init__(self, *args: Any, mixer: Any, inputs: Any = "pixel_values", **kwargs: Any) -> None:
        _checked_mixer("mixer", mixer)
        _checked_key("inputs", inputs)
        super().__init__(*args, **kwargs)
        self.mixer = mixer
        self.mixed_inputs = inputs
        if self.compute_loss_func is None:
            self.compute_loss_func = functools.partial(soft_loss, label_smoothing=self.args.label_smoothing_factor)

    def _named(self, batch: Any) -> Any:
        """Returns a batch whose labels are its "labels", the one name that the Trainer gives to a `compute_loss_func`."""
        found = [name for name in self.label_names if name in batch]
        if "labels" in batch or len(found) != 1:
            return batch
        return {"labels" if key == found[0] else key: value for key, value in batch.items()}

    def _get_num_items_in_batch(self, batch_samples: Any, device: torch.device) -> Any:
        return super()._get_num_items_in_batch([self._named(batch) for batch in batch_samples], device)

    def compute_loss(self, model: torch.nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        return super().compute_loss(model, self._named(inputs), *args, **kwargs)

    def training_step(self, model: torch.nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Any:
        inputs = self._named(self._prepare_inputs(inputs))
        for name, key in (("inputs", self.mixed_inputs), ("labels", "labels")):
            if key not in inputs:
                raise KeyError(f"{name}: expected a key of the batch, one of {list(inputs)}, got {key!r}")
        mixed, target = self.mixer(inputs[self.mixed_inputs], inputs["labels"])
        inputs = {**inputs, self.mixed_inputs: mixed, "labels": target}
        return super().training_step(model, inputs, num_items_in_batch)

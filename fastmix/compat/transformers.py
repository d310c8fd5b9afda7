"""Mixing in the Trainer of Hugging Face's transformers:

    trainer = MixTrainer(model, args, train_dataset=..., mixer=fastmix.Mixup(0.2))

A collate function is no place to mix: the Trainer collates evaluation batches with the same one. Written for transformers 5.24.
"""

import functools
from collections.abc import Mapping

import torch
from transformers import Trainer

from .. import MixedRows, _check, soft_cross_entropy

__all__ = ["MixTrainer", "soft_loss"]


def soft_loss(outputs, labels, num_items_in_batch=None, *, label_smoothing=0.0):
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


class MixTrainer(Trainer):
    """transformers' `Trainer` that mixes each training batch on the device, in `training_step`. Evaluation and prediction see
    batches as they are.

    Args:
        args, kwargs: the Trainer's. `compute_loss_func` is `soft_loss` by default, with `args.label_smoothing_factor`.
        mixer: takes `(inputs, labels)` and returns both mixed: a sampler such as `fastmix.Mixup`. One without a seed draws from
            torch's global generators, whose states the Trainer's checkpoints hold.
        inputs: the batch's key of what is mixed.

    Raises:
        TypeError: a mixer that cannot be called; KeyError: a batch without `inputs` or labels.

    With gradient accumulation the Trainer counts the labels of all micro-batches before they are mixed, and `soft_loss` divides
    by that number: the gradient is that of one batch.
    """

    def __init__(self, *args, mixer, inputs="pixel_values", **kwargs):
        if not callable(mixer):
            raise _check.wrong(TypeError, "mixer", "a sampler of fastmix, or another function of (inputs, labels)", mixer)
        super().__init__(*args, **kwargs)
        self.mixer = mixer
        self.mixed_inputs = inputs
        if self.compute_loss_func is None:
            self.compute_loss_func = functools.partial(soft_loss, label_smoothing=self.args.label_smoothing_factor)

    def training_step(self, model, inputs, num_items_in_batch=None):
        inputs = self._prepare_inputs(inputs)
        for name, key in (("inputs", self.mixed_inputs), ("labels", "labels")):
            if key not in inputs:
                raise KeyError(f"{name}: expected a key of the batch, one of {list(inputs)}, got {key!r}")
        mixed, target = self.mixer(inputs[self.mixed_inputs], inputs["labels"])
        inputs = {**inputs, self.mixed_inputs: mixed, "labels": target}
        return super().training_step(model, inputs, num_items_in_batch)

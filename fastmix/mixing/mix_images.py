"""The op under `fastmix.mix_images`: bytes of images, normalised and mixed in one pass.

    x[i]   = images[i]*factor[c] + shift[c]        factor = scale/std, shift = -mean/std; mirrored where flip[i]
    out[i] = mix(x, lam, index, box) or mix_masked(x, mask, index, plan, partner_plan), rounded once to dtype

The gradients to lam and mask are those of the two ops. Only the bytes are saved for them: the backward normalises once more.
"""

from typing import Any, NamedTuple

import torch
from torch.autograd import Function
from torch.library import custom_op

from .. import _backend, _check, _dispatch
from .._torch.mix import mix_dlam_formula
from .._torch.mix_images import in_layout, mix_images_formula, normalized
from .._torch.mix_masked import mix_masked_dmask_formula


class Pairing(NamedTuple):
    """How rows are mixed with their partners: by lam [] or [N] and box, or by mask [N, h, w] and plans. index None: not at all."""

    lam: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    index: torch.Tensor | None = None  # type: ignore[assignment]  # not tuple.index
    box: torch.Tensor | None = None
    plan: torch.Tensor | None = None
    partner_plan: torch.Tensor | None = None


def _launch(images: torch.Tensor, *rest: Any) -> torch.Tensor:
    return _backend.of(images).mix_images_fwd(images, *rest)


def _function(
    images: torch.Tensor,
    factor: torch.Tensor,
    shift: torch.Tensor,
    flip: torch.Tensor | None,
    pairing: Pairing,
    *rest: Any,
) -> torch.Tensor:
    return _dispatch.recorder(MixImagesFunction)(images, factor, shift, flip, *pairing, *rest)


def _operator(
    images: torch.Tensor,
    factor: torch.Tensor,
    shift: torch.Tensor,
    flip: torch.Tensor | None,
    pairing: Pairing,
    *rest: Any,
) -> torch.Tensor:
    return _mix_images_op(images, factor, shift, flip, *pairing, *rest)


class MixImagesFunction(Function):
    """(images [N, C, d1, ...] uint8, factor and shift [C], flip [N], lam [] or [N], mask [N, h, w], index [N], box, plan and
    partner_plan, each or None, dtype, channels_last) -> mixed batch. Gradients to lam and mask."""

    @staticmethod
    def forward(
        ctx: Any,
        images: torch.Tensor,
        factor: torch.Tensor,
        shift: torch.Tensor,
        flip: torch.Tensor | None,
        lam: torch.Tensor,
        mask: torch.Tensor,
        index: torch.Tensor,
        box: torch.Tensor | None,
        plan: Any,
        partner_plan: torch.Tensor | None,
        dtype: torch.dtype,
        channels_last: bool,
    ) -> Any:
        ctx.backend = _backend.of(images)
        ctx.save_for_backward(images, factor, shift, flip, lam, mask, index, box, plan, partner_plan)
        pairing = Pairing(lam, mask, index, box, plan, partner_plan)
        return ctx.backend.mix_images_fwd(images, factor, shift, flip, pairing, dtype, channels_last)

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> Any:
        images, factor, shift, flip, lam, mask, index, box, plan, partner_plan = ctx.saved_tensors
        grad_output = grad_output.to(torch.float32)
        dlam = dmask = None
        if torch.is_grad_enabled() or _check.batched(grad_output):
            x = normalized(images, factor, shift, flip)
            if mask is None:
                dlam = mix_dlam_formula(grad_output, x, lam, index, box)
            else:
                dmask = mix_masked_dmask_formula(grad_output, x, mask, index, plan, partner_plan)
        else:
            x = ctx.backend.mix_images_fwd(images, factor, shift, flip, Pairing(), torch.float32, False)
            if mask is None:
                dlam = ctx.backend.mix_bwd(grad_output, x, lam, index, box, x.stride(), False, True)[1]
            else:
                backward = ctx.backend.mix_masked_bwd
                dmask = backward(grad_output, x, mask, index, plan, partner_plan, x.stride(), False, True)[1]
        dlam = None if dlam is None else _dispatch.shaped_as(lam, dlam)
        return None, None, None, None, dlam, dmask, None, None, None, None, None, None


@custom_op("fastmix::mix_images", mutates_args=())
def _mix_images_op(
    images: torch.Tensor,
    factor: torch.Tensor,
    shift: torch.Tensor,
    flip: torch.Tensor | None,
    lam: torch.Tensor | None,
    mask: torch.Tensor | None,
    index: torch.Tensor | None,
    box: torch.Tensor | None,
    plan: torch.Tensor | None,
    partner_plan: torch.Tensor | None,
    dtype: torch.dtype,
    channels_last: bool,
    backend: str,
) -> torch.Tensor:
    if index is not None:
        _check.partners_and_blocks(images.shape[0], index, plan, partner_plan)  # no value could be read while tracing
    pairing = Pairing(lam, mask, index, box, plan, partner_plan)
    return _backend.module(backend).mix_images_fwd(images, factor, shift, flip, pairing, dtype, channels_last)


@_mix_images_op.register_fake
def _(
    images: torch.Tensor,
    factor: torch.Tensor,
    shift: torch.Tensor,
    flip: torch.Tensor | None,
    lam: torch.Tensor,
    mask: torch.Tensor,
    index: torch.Tensor,
    box: torch.Tensor | None,
    plan: Any,
    partner_plan: torch.Tensor | None,
    dtype: torch.dtype,
    channels_last: bool,
    backend: str,
) -> Any:
    return in_layout(images.new_empty(images.shape, dtype=dtype), channels_last)


def _op_setup(ctx: Any, inputs: Any, output: torch.Tensor | tuple[torch.Tensor, torch.Tensor]) -> None:
    *saved, _, _, ctx.backend = inputs
    ctx.save_for_backward(*saved)


def _op_gradients(ctx: Any, grad_output: torch.Tensor) -> Any:
    images, factor, shift, flip, lam, mask, index, box, plan, partner_plan = ctx.saved_tensors
    dlam = dmask = None
    grad_output = grad_output.to(torch.float32)
    x = _mix_images_op(images, factor, shift, flip, *Pairing(), torch.float32, False, ctx.backend)
    if mask is not None:
        dmask = torch.ops.fastmix.mix_masked_backward(
            grad_output, x, mask, index, plan, partner_plan, False, True, ctx.backend
        )[1]
    elif lam is not None:
        dlam = _dispatch.shaped_as(
            lam, torch.ops.fastmix.mix_backward(grad_output, x, lam, index, box, False, True, ctx.backend)[1]
        )
    return None, None, None, None, dlam, dmask, None, None, None, None, None, None, None


_mix_images_op.register_autograd(_op_gradients, setup_context=_op_setup)

OP = _dispatch.Op(mix_images_formula, _operator, _function, _launch)

"""Targets as kernels take them: K-hot ones (class indices and weights) and dense ones (probabilities, MixedRows)."""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ._class_tiles import RowPtrs, Strided, _locate, _tile_cols, _tile_ptrs
from ._launch import FEW_COMPONENTS, constants


class KHotTarget(NamedTuple):
    """Class indices and weights (None: 1) of K components of each row. FEW: they are loaded all at once, since a loop would
    carry a tile in another layout than that of the logits. HELD: registers hold the few from the loss to the gradient."""

    classes: Strided
    weights: Strided | None
    K: tl.constexpr
    FEW: tl.constexpr
    HELD: tl.constexpr
    SMOOTHING: tl.constexpr


class Component(NamedTuple):
    """A component of the rows [ROWS]: its class, 0 if ignored or out of range; a_k, 0 if ignored; w[c_k]; whether it is not
    ignored; and whether its class is out of range."""

    c: tl.tensor
    a: tl.tensor
    w: tl.tensor
    counted: tl.tensor
    out_of_range: tl.tensor


class DenseTarget(NamedTuple):
    """Target probabilities; or the values of MixedRows with lam and index. IMAGES: rows of one outer index share lam."""

    probs: Strided
    lam: torch.Tensor | None
    partner_ptr: torch.Tensor | None
    IMAGES: tl.constexpr
    SMOOTHING: tl.constexpr


class TargetRows(NamedTuple):
    """Where the rows of a dense target and their partners lie, and the rows' lam [ROWS], NaN for a partner out of range."""

    own: RowPtrs
    partner: RowPtrs
    lam: tl.tensor


@triton.jit
def _component_ptrs(tensor, k, rows):
    """Returns pointers to component k of the rows [ROWS]."""
    k = rows.o * 0 + k  # int64, as addresses are
    return tensor.ptr + rows.o * tensor.outer + rows.i * tensor.inner + k * tensor.column


@triton.jit
def _load_component(k, target, class_weight_ptr, ignore_index, rows, C: tl.constexpr, DTYPE: tl.constexpr):
    """Returns Component k of the rows."""
    c = tl.load(_component_ptrs(target.classes, k, rows), mask=rows.mask, other=0)
    counted = rows.mask & (c != ignore_index)
    known = (c >= 0) & (c < C)
    # class 0 in place of a class that has no logit and no weight to load; int32 as columns are, which a known class fits
    c = tl.where(counted & known, c, 0).to(tl.int32)
    if target.weights is not None:
        a = tl.load(_component_ptrs(target.weights, k, rows), mask=counted, other=0).to(DTYPE)
    else:
        a = counted.to(DTYPE)
    if class_weight_ptr is not None:
        w = tl.load(class_weight_ptr + c, mask=rows.mask, other=0).to(DTYPE)
    else:
        w = rows.mask.to(DTYPE)
    return Component(c, a, w, counted, counted & (known == 0))


@triton.jit
def _few_components(target, class_weight_ptr, ignore_index, rows, C: tl.constexpr, DTYPE: tl.constexpr):
    """Returns the Components of the rows if they are few, else none."""
    components = ()
    if target.FEW:
        for k in tl.static_range(target.K):
            component = _load_component(k, target, class_weight_ptr, ignore_index, rows, C, DTYPE)
            components = components + (component,)  # type: ignore[assignment]
    return components


@triton.jit
def _component(components, k: tl.constexpr):
    """Returns Component k of few ones. Triton 3.6 forgets the names of a tuple's fields where it lies in another tuple."""
    one = components[k]
    return Component(one[0], one[1], one[2], one[3], one[4])


@triton.jit
def _locate_target(target, o, i, row_mask, lam_stride, N, tile, DTYPE: tl.constexpr):
    """Returns the TargetRows of a dense target. (Ask a flag whether there is one: Triton 3.6 cannot compare a tuple that holds None,
    as an unmixed target does, with None.)"""
    own = _locate(target.probs, o, i, tile)
    partner, lam = own, row_mask
    if target.lam is not None:
        n = o + i * 0 if target.IMAGES else i
        lam = tl.load(target.lam + n * lam_stride, mask=row_mask, other=1).to(DTYPE)
        partner_index = tl.load(target.partner_ptr + n, mask=row_mask, other=0)
        known = (partner_index >= 0) & (partner_index < N)
        lam = tl.where(known, lam, float("nan"))
        partner_index = tl.where(known, partner_index, 0)
        if target.IMAGES:
            partner = _locate(target.probs, partner_index, i, tile)
        else:
            partner = _locate(target.probs, o, partner_index, tile)
    return TargetRows(own, partner, lam)


@triton.jit
def _load_target(target, t_rows, rows, first, tile, DTYPE: tl.constexpr):
    """Loads a tile of a dense target. MixedRows are mixed here, and values of weight 0 are not loaded."""
    _, _, mask = _tile_cols(rows, first, tile)
    ptrs = _tile_ptrs(t_rows.own, rows, first, tile)
    if target.lam is not None:
        lam = t_rows.lam[:, None]
        t = lam * tl.load(ptrs, mask=mask & (lam != 0), other=0).to(DTYPE)
        ptrs = _tile_ptrs(t_rows.partner, rows, first, tile, False)
        t += (1 - lam) * tl.load(ptrs, mask=mask & (lam != 1), other=0).to(DTYPE)
    else:
        t = tl.load(ptrs, mask=mask, other=0).to(DTYPE)
    return t


def component_strides(t: torch.Tensor) -> tuple[int, int, int]:
    """Strides of contiguous classes or weights [N, K] or [N, K, d1, ...] over outer, component and inner."""
    if t.dim() == 2:
        return 0, t.stride(1), t.stride(0)
    inner = math.prod(t.shape[2:])  # not its strides: a dimension of size 1 has any
    return t.shape[1] * inner, inner, 1


def k_hot_target(classes, weights, smoothing, few=True, held=True) -> KHotTarget:
    """The target as kernels take it, its components taken as `few`, and `held`, or not. Weights of [N, K] are the same for all inner rows of
    an outer one."""
    K = classes.shape[1]
    few = few and K <= FEW_COMPONENTS
    options = constants(K, few, few and held, float(smoothing))
    classes = classes.contiguous()
    strides = component_strides(classes)
    strided = Strided(classes, *strides)
    if weights is None:
        return KHotTarget(strided, None, *options)
    weights = weights.resolve_neg()
    if weights.dim() == 2 and classes.dim() > 2:
        return KHotTarget(strided, Strided(weights, weights.stride(0), weights.stride(1), 0), *options)
    return KHotTarget(strided, Strided(weights.contiguous(), *strides), *options)


def dense_target(probs, lam, index, images, smoothing):
    """(the target as kernels take it, lam's stride: an argument of its own, because Triton would specialise a stride of 1)."""
    images, smoothing = constants(images, smoothing)
    if lam is None:
        return DenseTarget(probs, None, None, images, smoothing), 0
    lam_stride = lam.stride(0) if lam.dim() else 0
    return DenseTarget(probs, lam.resolve_neg(), index.contiguous(), images, smoothing), lam_stride

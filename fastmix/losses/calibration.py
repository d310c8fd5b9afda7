"""How far a model's confidence can be trusted. Nothing here waits for the device."""

import torch

from .. import _check


@torch.no_grad()
def expected_calibration_error(logits: torch.Tensor, y: torch.Tensor, *, bins: int = 15) -> torch.Tensor:
    """Expected calibration error: the average distance between how sure a model is and how often it is right.

        ECE = sum over bins b of |B_b|/N * |accuracy(B_b) - confidence(B_b)|

    A row's confidence is its largest probability, and B_b the rows whose confidence lies in (b/bins, (b+1)/bins].

    Args:
        logits: `[N, C]` floating, before the softmax.
        y: `[N]` int64 class indices.
        bins: how many bins of equal width.

    Returns:
        A float64 0-d tensor in [0, 1] on the logits' device; NaN for N = 0.

    Raises:
        TypeError, ValueError: a wrong argument.

    Source: arXiv:1706.04599, equation 3.

    >>> import torch
    >>> logits = torch.log(torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.2, 0.8]]))
    >>> expected_calibration_error(logits, torch.tensor([0, 1, 1]))  # 2/3 * |0.5 - 0.9| + 1/3 * |1 - 0.8|
    tensor(0.3333, dtype=torch.float64)
    """
    _check.float_tensor("logits", logits, 2, "[N, C]")
    if logits.dim() != 2 or logits.shape[1] == 0:
        raise _check.wrong(ValueError, "logits", "shape [N, C] with at least one class", logits)
    _check.integer_tensor("y", y, (logits.shape[0],), logits)
    bins = _check.integer("bins", bins, 1, "an int of at least 1")
    confidence, guess = logits.double().softmax(1).max(1)
    right = (guess == y).double()
    at = (confidence * bins).ceil().clamp(1, bins).sub(1)  # the bin's number
    members = (
        at.unsqueeze(1) == torch.arange(bins, device=at.device)
    ).double()  # sums in a fixed order: the same bits every run
    return ((right - confidence) @ members).abs().sum() / logits.shape[0]


@torch.no_grad()
def auroc(scores: torch.Tensor, positive: torch.Tensor) -> torch.Tensor:
    """Area under the ROC curve: the chance that a positive row has a higher score than a negative one, a tie counting half.

        AUROC = (sum of the positives' ranks - P*(P+1)/2) / (P * (N-P)),        equal scores share their mean rank

    Args:
        scores: `[N]` floating.
        positive: `[N]` bool, or integers of which 1 is positive.

    Returns:
        A float64 0-d tensor in [0, 1]; NaN where one kind is missing, or where a score is NaN.

    Raises:
        TypeError, ValueError: a wrong argument.

    >>> import torch
    >>> auroc(torch.tensor([0.1, 0.4, 0.35, 0.8]), torch.tensor([0, 0, 1, 1]))
    tensor(0.7500, dtype=torch.float64)
    """
    _check.float_tensor("scores", scores, 1, "[N]")
    if scores.dim() != 1:
        raise _check.wrong(ValueError, "scores", "shape [N]", scores)
    if not isinstance(positive, torch.Tensor) or positive.is_floating_point() or positive.is_complex():
        raise _check.wrong(TypeError, "positive", "a bool or integer tensor [N]", positive)
    if positive.shape != scores.shape:
        raise _check.wrong(ValueError, "positive", f"shape {list(scores.shape)}", positive)
    _check.same_device("positive", positive, scores)
    positive = positive == 1
    ordered = scores.sort().values
    below, until = (torch.searchsorted(ordered, scores, right=right).double() for right in (False, True))
    rank = (below + until + 1) / 2
    count = positive.sum().double()
    area = (torch.where(positive, rank, 0).sum() - count * (count + 1) / 2) / (count * (scores.numel() - count))
    return torch.where(scores.isnan().any(), torch.nan, area)

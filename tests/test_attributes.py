"""Every public attribute of every module is checked and normalised when it is set, as in the constructor, or it is read-only."""

import numpy as np
import pytest
import torch
from torch import nn

import fastmix

MADE = {
    "Mixup": lambda: fastmix.Mixup(0.2),
    "CutMix": lambda: fastmix.CutMix(),
    "BetaMask": lambda: fastmix.BetaMask(1.0),
    "RandomMix": lambda: fastmix.RandomMix(fastmix.Mixup(0.2), fastmix.CutMix()),
    "ManifoldMixup": lambda: fastmix.ManifoldMixup([None, nn.Linear(2, 2)], 1.0),
    "PuzzleMix": lambda: fastmix.PuzzleMix(mean=0.5, std=0.25),
    "FMix": lambda: fastmix.FMix(),
    "SmoothMix": lambda: fastmix.SmoothMix(),
    "GridMix": lambda: fastmix.GridMix(),
    "ResizeMix": lambda: fastmix.ResizeMix(),
    "SaliencyMix": lambda: fastmix.SaliencyMix(),
    "AttentiveCutMix": lambda: fastmix.AttentiveCutMix(),
    "AugMix": lambda: fastmix.AugMix(mean=0.5, std=0.25),
    "ImagePipeline": lambda: fastmix.ImagePipeline(None, [0.5], [0.25], device="cpu"),
    "SoftCrossEntropyLoss": lambda: fastmix.SoftCrossEntropyLoss(),
    "SoftBinaryCrossEntropyLoss": lambda: fastmix.SoftBinaryCrossEntropyLoss(),
    "MovingAverageReweight": lambda: fastmix.MovingAverageReweight(),
}
NOT_MODULES = {"Mix", "MixedRows", "SoftTarget", "PuzzleNoise"}  # data, which is checked where it is used


def attributes(made):
    """Returns the names of the public attributes that are the class's own: those of the object, and properties."""
    properties = {name for name in dir(type(made)) if isinstance(getattr(type(made), name, None), property)}
    theirs = set(dir(nn.Module())) if isinstance(made, nn.Module) else set()
    return sorted(name for name in (set(vars(made)) | properties) - theirs if not name.startswith("_"))


def test_no_module_is_left_out():
    classes = {name for name in fastmix.__all__ if isinstance(getattr(fastmix, name), type)}
    callables = {name for name in classes if name.islower()}  # contexts, named as functions are
    assert classes - callables - NOT_MODULES <= MADE.keys()


@pytest.mark.trap("attributes-past-the-constructor")
@pytest.mark.parametrize("name", MADE)
def test_nonsense_is_refused_and_changes_nothing(name):
    made = MADE[name]()
    found = attributes(made)
    assert found
    for attribute in found:
        before = getattr(made, attribute)
        for wrong in ("nonsense", object()):
            with pytest.raises((TypeError, ValueError, AttributeError), match=attribute):
                setattr(made, attribute, wrong)
        assert getattr(made, attribute) is before


@pytest.mark.trap("attributes-past-the-constructor")
@pytest.mark.parametrize(
    ("name", "attribute", "value", "kind"),
    [
        ("PuzzleMix", "beta", -0.5, ValueError),
        ("PuzzleMix", "gamma", 1.0, ValueError),
        ("PuzzleMix", "levels", 5, ValueError),
        ("PuzzleMix", "blocks", (), ValueError),
        ("PuzzleMix", "std", 0.0, ValueError),
        ("PuzzleMix", "t_eps", -1, ValueError),
        ("PuzzleMix", "prob", 2.0, ValueError),
        ("ImagePipeline", "flip", 1.5, ValueError),
        ("ImagePipeline", "seed", -1, ValueError),
        ("ImagePipeline", "layout", "CHWN", ValueError),
        ("ImagePipeline", "sampler", fastmix.SaliencyMix(), TypeError),
        ("SmoothMix", "alpha", 0.2, AttributeError),
        ("ResizeMix", "alpha", 0.2, AttributeError),
        ("AttentiveCutMix", "alpha", 0.2, AttributeError),
        ("AttentiveCutMix", "grid", 2, ValueError),
        ("AttentiveCutMix", "cells", 50, ValueError),
    ],
)
def test_values_out_of_range(name, attribute, value, kind):
    with pytest.raises(kind, match=attribute):
        setattr(MADE[name](), attribute, value)


def test_attributes_are_normalised_and_used():
    """A value that is set draws what one given to the constructor does."""
    puzzle = fastmix.PuzzleMix(mean=0.5, std=0.25, blocks=4, seed=0)
    puzzle.blocks, puzzle.alpha, puzzle.prob = 2, 0.5, 0.0
    assert (puzzle.blocks, puzzle.alpha, puzzle.mixup.prob) == ((2,), (0.5, 0.5), 0.0)
    x, saliency = torch.rand(4, 3, 8, 8), torch.rand(4, 8, 8)
    assert torch.equal(puzzle(x, torch.arange(4), saliency)[0], x)  # nothing is mixed at prob 0
    resize = fastmix.ResizeMix(seed=0)
    resize.scale = [0.5, 0.5]
    box = resize.sample(torch.rand(64, 3, 16, 24)).box
    whole = (box[:, 0] > 0) & (box[:, 1] > 0) & (box[:, 2] < 16) & (box[:, 3] < 24)
    assert whole.any()
    sides = torch.from_numpy(np.floor(0.5 * np.array([16.0, 24.0]))).long()
    assert torch.equal((box[:, 2:] - box[:, :2])[whole], sides.expand(int(whole.sum()), 2))
    pipeline = fastmix.ImagePipeline(None, [0.5] * 3, [0.25] * 3, flip=0.0, device="cpu")
    pipeline.layout = "NHWC"
    images = torch.randint(0, 256, (2, 4, 5, 3), dtype=torch.uint8)
    ((made, _),) = pipeline([(images, torch.arange(2))])
    want = (images.double() / 255 - 0.5) / 0.25
    torch.testing.assert_close(made.double(), want.movedim(-1, 1), rtol=0, atol=1e-6)


def _steps(step, numbers):
    """Returns how many programs torch.compile makes of a step for these numbers, each result compared with eager code."""
    programs = []

    def count(graph, inputs):
        programs.append(graph)
        return graph

    torch._dynamo.reset()
    fast = torch.compile(step, backend=count, fullgraph=True)
    for number in numbers:
        torch.testing.assert_close(fast(number), step(number))
    return len(programs)


@pytest.mark.slow
@pytest.mark.trap("schedules-under-compile")
def test_a_price_of_moves_may_change_in_a_program():
    mask, saliency = (torch.rand(2, 4, 4) > 0.5).float(), torch.rand(2, 4, 4)
    saliency /= saliency.sum((1, 2), keepdim=True)
    numbers = [0.05 * k for k in range(1, 12)]
    assert len({tuple(fastmix.transport_plan(mask, saliency, t).flatten().tolist()) for t in numbers}) > 1
    assert _steps(lambda t: fastmix.transport_plan(mask, saliency, t), numbers) <= 2


@pytest.mark.slow
@pytest.mark.trap("schedules-under-compile")
@pytest.mark.parametrize(
    ("make", "attribute", "values", "maps"),
    [
        (fastmix.SmoothMix, "scale", [(k / 20, 0.9) for k in range(10)], False),
        (fastmix.ResizeMix, "scale", [(k / 20, 0.9) for k in range(10)], False),
        (lambda: fastmix.AttentiveCutMix(grid=4), "cells", range(10), True),
    ],
)
def test_options_may_change_in_a_program(make, attribute, values, maps):
    programs = []

    def count(graph, inputs):
        programs.append(graph)
        return graph

    torch._dynamo.reset()
    x, y = torch.rand(4, 3, 8, 8), torch.arange(4)
    more = (torch.rand(4, 4, 4),) if maps else ()
    mixer = make()
    step = torch.compile(lambda x, y: mixer(x, y, *more)[0], backend=count, fullgraph=True)
    for value in values:
        setattr(mixer, attribute, value)
        torch.manual_seed(0)
        got = step(x, y)
        torch.manual_seed(0)
        torch.testing.assert_close(got, mixer(x, y, *more)[0])
    assert len(programs) <= 2

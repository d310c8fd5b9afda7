"""What every method does to the same real images: `python -m fastmix.recipes.gallery`.

METHOD.png        for each method a pair of photographs and a pair of digits: own image, partner, what stays of the own, and the mixed
                  image with its labels and their weights
manifold.png      the same for manifold mixup: a hidden map of either image, and the mixed map
adversarial.png   the same for the Adversarial Mixing Policy: mixed with lam, and with the lam that raises the loss
augmix_views.png  AugMix: a photograph and a digit with three views of each
methods.png       the photograph, and what each method of images makes of it, beside each other
spectrogram.png   two sounds, mixed and with an interval of time swapped
sentence.png      two sentences as words, mixed word by word
bytes.png         a loader's bytes, and the batches that ImagePipeline makes of them
segmentation.png  the same with label maps
extents.png       padded images of different sizes, mixed within their extents
labels.json       the labels and weights under every picture

The photographs and digits are scikit-learn's own. What is salient is the size of the image's own gradient, which needs no model.
It takes some seconds on a CPU, and draws the same pictures every time.
"""

import torch
import torch.nn.functional as F

import fastmix
from fastmix.recipes._training import environment, one_thread, parsed, parser, repeatable, write

SIDE = 96
MEAN, STD = (0.5,), (0.25,)
METHODS = {
    "mixup": lambda: fastmix.Mixup((4.0, 4.0), seed=4),
    "CutMix": lambda: fastmix.CutMix((4.0, 4.0), seed=3),
    "BetaMask": lambda: fastmix.BetaMask(0.4, seed=0),
    "FMix": lambda: fastmix.FMix(seed=2),
    "SmoothMix": lambda: fastmix.SmoothMix(seed=2),
    "GridMix": lambda: fastmix.GridMix(grid=4, seed=2),
    "ResizeMix": lambda: fastmix.ResizeMix(scale=(0.4, 0.8), seed=2),
    "SaliencyMix": lambda: fastmix.SaliencyMix((4.0, 4.0), seed=2),
    "AttentiveCutMix": lambda: fastmix.AttentiveCutMix(cells=12, grid=8, seed=2),
    "PuzzleMix": lambda: fastmix.PuzzleMix(mean=MEAN, std=STD, blocks=8, t_eps=0.02, seed=2),
}
MAPS = (fastmix.SaliencyMix, fastmix.AttentiveCutMix, fastmix.PuzzleMix)


def photographs():
    """Returns two photographs [2, 3, SIDE, SIDE] in [0, 1], and their names."""
    from sklearn.datasets import load_sample_images

    images = torch.stack([torch.tensor(image).movedim(-1, 0) / 255 for image in load_sample_images().images])
    height = images.shape[2]
    left = (images.shape[3] - height) // 2
    square = images[..., left : left + height]
    return F.interpolate(square, (SIDE, SIDE), mode="bilinear", antialias=True).clamp(0, 1), ("temple", "flower")


def digits():
    """Returns two digits [2, 3, SIDE, SIDE] in [0, 1], dark on white, and their names."""
    from sklearn.datasets import load_digits

    found = load_digits()
    x = 1 - torch.tensor(found.images[[3, 8]], dtype=torch.float32)[:, None] / 16
    x = F.interpolate(x, (SIDE, SIDE), mode="bilinear", align_corners=False).clamp(0, 1)
    return x.expand(-1, 3, -1, -1).contiguous(), tuple(str(name) for name in found.target[[3, 8]])


def edges(x):
    """Returns where the images [N, 3, H, W] change, [N, H, W]: a saliency that needs no model."""
    gradient = torch.stack(torch.gradient(x.mean(1), dim=(1, 2))).square().sum(0).sqrt()
    return F.avg_pool2d(gradient[:, None], 9, 1, 4)[:, 0]


def mixed(sampler, x, y):
    """Returns the mixed images, what stays of the own ones, and the target."""
    mix = sampler.sample(x, edges(x)) if isinstance(sampler, MAPS) else sampler.sample(x)
    stays = mix.apply(torch.ones_like(x), partner=torch.zeros_like(x)) if mix.plan is None else None
    if stays is None:  # blocks that are moved: the mask itself
        stays = F.interpolate(mix.mask[:, None], x.shape[2:]).expand_as(x)
    return mix.apply(x), stays, mix.target(y)


def label(target, row, names):
    """Returns "0.62 temple + 0.38 flower"."""
    pairs = zip(target.classes[row].tolist(), target.weights[row].tolist(), strict=True)
    return " + ".join(f"{weight:.2f} {names[c]}" for c, weight in sorted(pairs))


def _figure(rows, columns, width, height):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    figure.get_layout_engine().set(h_pad=0.12)
    return figure, figure.subplots(rows, columns, squeeze=False)


def _save(figure, path):
    """Writes a picture of 128 colours: a quarter of the bytes of a full one."""
    from PIL import Image

    figure.savefig(path, dpi=75)
    Image.open(path).convert("RGB").quantize(128, dither=Image.Dither.NONE).save(path, optimize=True)


def _image(at, x, title="", below="", **options):
    at.imshow(x, interpolation="nearest", **options)
    at.set_title(title, fontsize=9)
    at.set_xlabel(below, fontsize=9)
    at.set(xticks=[], yticks=[])


def draw_methods(out):
    """Draws METHOD.png of each method and methods.png; returns {method: labels}."""
    pairs, labels, all_mixed = (photographs(), digits()), {}, []
    for name, make in METHODS.items():
        figure, axes = _figure(2, 4, 7.2, 4.1)
        labels[name] = []
        for line, (x, names) in zip(axes, pairs, strict=True):
            image, stays, target = mixed(make(), x, torch.arange(2))
            text = label(target, 0, names)
            labels[name].append(text)
            channels = [tile[0].movedim(0, -1).clamp(0, 1).numpy() for tile in (x, x.flip(0), stays, image)]
            _image(line[0], channels[0], "own", names[0])
            _image(line[1], channels[1], "partner", names[1])
            _image(
                line[2], channels[2].mean(-1), "weight of the own", "yellow: own, blue: partner", cmap="viridis", vmin=0, vmax=1
            )
            _image(line[3], channels[3], "mixed", text)
            if x is pairs[0][0]:
                all_mixed.append((name, channels[3], text))
        _save(figure, out / f"{name.lower()}.png")
    labels["AugMix"], view = draw_views(out)
    own, names = pairs[0]
    tiles = [("own image", own[0].movedim(0, -1).numpy(), names[0]), *all_mixed, ("AugMix", view, labels["AugMix"][0])]
    figure, axes = _figure(3, 4, 7.2, 6.4)
    for at, (name, image, text) in zip(axes.flat, tiles, strict=True):
        _image(at, image, name, text)
    _save(figure, out / "methods.png")
    return labels


def draw_views(out):
    """Draws a photograph and a digit with three AugMix views of each; returns their labels, and a view of the photograph."""
    figure, axes = _figure(2, 4, 7.2, 4.1)
    labels, shown = [], []
    for line, (x, names) in zip(axes, (photographs(), digits()), strict=True):
        augmix = fastmix.AugMix(mean=MEAN[0], std=STD[0], severity=5.0, views=3, seed=5)
        images = _seen(augmix.stack((255 * x[:1]).round().to(torch.uint8)).flatten(0, 1))
        labels.append(f"1.00 {names[0]}")
        for at, image, title in zip(line, images, ("clean", "first view", "second view", "third view"), strict=True):
            _image(at, image, title, labels[-1])
        shown.append(images[1])
    _save(figure, out / "augmix_views.png")
    return labels, shown[0]


def draw_manifold(out):
    """Draws hidden maps of two images and the map that manifold mixup makes of them; returns the labels.

    The layers below the mixed one are fixed: the size of the image's horizontal changes, a quarter as many pixels each way.
    """
    below = torch.nn.Conv2d(1, 1, 3, padding=1, padding_mode="replicate", bias=False)
    with torch.no_grad():
        below.weight.copy_(torch.tensor([[-1.0, 0, 1], [-2, 0, 2], [-1, 0, 1]]))
    mixed_layer = torch.nn.Identity()
    model = torch.nn.Sequential(below, torch.nn.ReLU(), torch.nn.AvgPool2d(4), mixed_layer)
    manifold, labels = fastmix.ManifoldMixup([mixed_layer], (4.0, 4.0), seed=4), []
    figure, axes = _figure(2, 4, 7.2, 4.1)
    for line, (x, names) in zip(axes, (photographs(), digits()), strict=True):
        grey = x.mean(1, keepdim=True)
        with torch.no_grad():
            own, partner = model(grey)[:, 0].numpy()
            with manifold(grey, torch.arange(2)) as (inputs, target):
                both = model(inputs)[0, 0].numpy()
        labels.append(label(target, 0, names))
        scale = {"cmap": "viridis", "vmin": 0, "vmax": max(own.max(), partner.max())}
        _image(line[0], x[0].movedim(0, -1).numpy(), "own", names[0])
        _image(line[1], own, "its hidden map", names[0], **scale)
        _image(line[2], partner, "the partner's", names[1], **scale)
        _image(line[3], both, "mixed", labels[-1], **scale)
    _save(figure, out / "manifold.png")
    return labels


def draw_adversarial(out):
    """Draws images mixed with lam and with the lam of AMP's step, under a linear model of the two; returns the labels."""
    figure, axes = _figure(2, 4, 7.2, 4.1)
    labels, index = [], torch.tensor([1, 0])
    for line, (x, names) in zip(axes, (photographs(), digits()), strict=True):
        model = torch.nn.Sequential(torch.nn.AvgPool2d(12), torch.nn.Flatten(), torch.nn.Linear(3 * 64, 2))
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for _ in range(40):
            optimizer.zero_grad()
            fastmix.soft_cross_entropy(model(x), torch.arange(2)).backward()
            optimizer.step()
        lam = torch.full((2,), 0.6, requires_grad=True)
        target = fastmix.Mix(lam.detach(), index).target(torch.arange(2))

        def losses(lam, x=x, model=model, target=target):
            return fastmix.soft_cross_entropy(model(fastmix.mix(x, lam, index)), target, reduction="none")

        (slope,) = torch.autograd.grad(losses(lam).sum(), lam)
        moved = (lam + (2.0 * slope).clamp(-0.2, 0.2)).detach()
        labels.append(label(target, 0, names))
        _image(line[0], x[0].movedim(0, -1).numpy(), "own", names[0])
        _image(line[1], x[1].movedim(0, -1).numpy(), "partner", names[1])
        for at, weight in zip(line[2:], (lam.detach(), moved), strict=True):
            title = f"lam {weight[0].item():.2f}, loss {losses(weight)[0].item():.2f}"
            _image(at, fastmix.mix(x, weight, index)[0].movedim(0, -1).clamp(0, 1).numpy(), title, labels[-1])
    _save(figure, out / "adversarial.png")
    return labels


def draw_spectrogram(out):
    """Draws two sounds, a rising and a falling tone, mixed two ways; returns their labels."""
    time = torch.arange(8192) / 8192
    sounds = torch.stack(
        [torch.sin(2 * torch.pi * (400 * time + sign * 900 * time**2 + (sign < 0) * 2400 * time)) for sign in (1, -1)]
    )
    x = torch.stft(sounds, 256, 64, window=torch.hann_window(256), return_complex=True).abs().add(1e-2).log()
    names, y = ("rising", "falling"), torch.arange(2)
    ways = {
        "mixup": fastmix.Mix(0.6, torch.tensor([1, 0])),
        "CutMix in time": fastmix.Mix(1.0, torch.tensor([1, 0]), box=torch.tensor([[40, 90]] * 2)),
    }
    figure, axes = _figure(1, 4, 7.2, 2.3)
    for at, one, name in zip(axes[0], x, names, strict=False):
        _image(at, one.numpy(), name, f"1.00 {name}", aspect="auto", origin="lower")
    labels = {}
    for at, (way, mix) in zip(axes[0, 2:], ways.items(), strict=True):
        image = mix.apply(x)[0].numpy()
        labels[way] = label(mix.target(y), 0, names)
        _image(at, image, way, labels[way], aspect="auto", origin="lower")
    _save(figure, out / "spectrogram.png")
    return labels


def draw_sentence(out):
    """Draws two sentences whose word vectors are mixed in place, the weight of each word as its darkness; returns the label."""
    sentences = ("where is the tallest tower ?", "how many bridges cross the river ?")
    names, lengths = ("place", "number"), torch.tensor([[len(s.split())] for s in sentences])
    x = torch.zeros(2, 7, 4)
    mix = fastmix.Mix(0.7, torch.tensor([1, 0])).within(lengths, axes=(1,))
    mix.apply(x)
    # rows of [1, 0] and [0, 1]: mixed, they hold the weight of either sentence in each place
    shares = mix.apply(torch.eye(2)[:, None, :].expand(2, 7, 2).contiguous())
    text = label(mix.target(torch.arange(2)), 1, names)
    figure, axes = _figure(1, 1, 7.2, 1.9)
    at = axes[0, 0]
    for line, sentence in enumerate((1, 0)):
        at.text(-0.9, 1 - line, names[sentence], fontsize=10, style="italic")
        for place, word in enumerate(sentences[sentence].split()):
            weight = float(shares[1, place, sentence])
            at.text(place + 0.4, 1 - line, word, fontsize=11, ha="center", color=str(0.85 * (1 - weight)))
            at.text(place + 0.4, 0.7 - line, f"{weight:.1f}", fontsize=8, ha="center", color="0.4")
    at.set(xlim=(-1, 7), ylim=(-0.6, 1.4), xticks=[], yticks=[])
    at.set_xlabel(text, fontsize=9)
    _save(figure, out / "sentence.png")
    return text


def crops():
    """Returns four parts of the photographs as a loader has them, uint8 [4, 3, SIDE, SIDE], their labels and the labels' names."""
    from sklearn.datasets import load_sample_images

    corners = (0, 60, 200), (1, 40, 240), (0, 130, 20), (1, 10, 60)  # photograph, line and column
    photos = [torch.tensor(image).movedim(-1, 0) for image in load_sample_images().images]
    parts = [photos[k][:, y : y + 3 * SIDE, x : x + 3 * SIDE].float() for k, y, x in corners]
    images = F.interpolate(torch.stack(parts), (SIDE, SIDE), mode="area").to(torch.uint8)
    return images, torch.tensor([k for k, *_ in corners]), ("temple", "flower")


def _pipeline(sampler):
    return fastmix.ImagePipeline(sampler, MEAN * 3, STD * 3, flip=0.5, device="cpu", seed=1)


def _seen(x):
    """A normalised batch as it looks: [N, H, W, 3] in [0, 1]."""
    return (x * STD[0] + MEAN[0]).clamp(0, 1).movedim(1, -1).numpy()


def draw_bytes(out):
    """Draws what a loader gives and what ImagePipeline makes of it; returns the labels."""
    images, y, names = crops()
    figure, axes = _figure(3, 4, 7.2, 6.4)
    for at, image, label_ in zip(axes[0], images, y.tolist(), strict=True):
        _image(at, image.movedim(0, -1).numpy(), "uint8", names[label_])
    labels = {}
    ways = {"mixup": fastmix.Mixup((4.0, 4.0), seed=0), "CutMix": fastmix.CutMix((4.0, 4.0), seed=0)}
    for line, (way, sampler) in zip(axes[1:], ways.items(), strict=True):
        ((x, target),) = _pipeline(sampler)([(images, y)])
        labels[way] = [label(target, row, names) for row in range(4)]
        for at, image, text in zip(line, _seen(x), labels[way], strict=True):
            _image(at, image, f"float32, {way}", text)
    _save(figure, out / "bytes.png")
    return labels


def draw_segmentation(out):
    """Draws images with label maps before and after CutMix; returns the share of each row's own labels."""
    images, *_ = crops()
    light = F.avg_pool2d(images.float().mean(1, keepdim=True), 5, 1, 2)[:, 0]
    y = (light > 80).long() + (light > 150).long()
    y[:, :4] = 255
    ((x, target),) = _pipeline(fastmix.CutMix((4.0, 4.0), seed=0))([(images, y)])
    largest = target.classes.gather(1, target.weights.argmax(1, keepdim=True))[:, 0]  # of a pixel's two labels
    figure, axes = _figure(4, 4, 7.2, 7.6)
    rows = (
        ("uint8", images.movedim(1, -1).numpy(), {}),
        ("labels", y.clamp(max=3).numpy(), {"cmap": "viridis", "vmin": 0, "vmax": 3}),
        ("float32", _seen(x), {}),
        ("the pixels' labels", largest.clamp(max=3).numpy(), {"cmap": "viridis", "vmin": 0, "vmax": 3}),
    )
    for line, (title, values, options) in zip(axes, rows, strict=True):
        for at, value in zip(line, values, strict=True):
            _image(at, value, title, **options)
    _save(figure, out / "segmentation.png")
    return [f"{float((target.weights[row, 0] > 0.5).float().mean()):.2f} own" for row in range(4)]


def draw_extents(out):
    """Draws padded images of different sizes, mixed from their corner and from their centre; returns their labels."""
    images, y, names = crops()
    sizes = torch.tensor([[96, 64], [60, 96], [80, 80], [48, 72]])
    for image, (height, width) in zip(images, sizes.tolist(), strict=True):
        image[:, height:] = 127  # about the mean: the padding
        image[..., width:] = 127
    figure, axes = _figure(3, 4, 7.2, 6.4)
    for at, image, label_ in zip(axes[0], images, y.tolist(), strict=True):
        _image(at, image.movedim(0, -1).numpy(), "uint8, padded", names[label_])
    labels = {}
    for line, anchor in zip(axes[1:], ("start", "center"), strict=True):
        mix = fastmix.Mix(0.5, torch.tensor([1, 0, 3, 2])).within(sizes, anchor=anchor)
        x = fastmix.mix_images(images, mix, mean=MEAN * 3, std=STD * 3)
        target = mix.target(y)
        labels[anchor] = [label(target, row, names) for row in range(4)]
        for at, image, text in zip(line, _seen(x), labels[anchor], strict=True):
            _image(at, image, f'anchor="{anchor}"', text)
    _save(figure, out / "extents.png")
    return labels


@one_thread()
def main(argv=None):
    args = parsed(parser("gallery", __doc__.splitlines()[0], out="fastmix-gallery", seeds=1, epochs=1), argv)
    from rich.console import Console

    with repeatable(0, torch.device("cpu")):
        labels = {**draw_methods(args.out), "spectrogram": draw_spectrogram(args.out), "sentence": draw_sentence(args.out)}
        labels |= {"manifold mixup": draw_manifold(args.out), "AMP": draw_adversarial(args.out)}
        labels |= {
            "bytes": draw_bytes(args.out),
            "segmentation": draw_segmentation(args.out),
            "extents": draw_extents(args.out),
        }
    write(args.out / "labels.json", {"environment": environment(torch.device("cpu")), "labels": labels})
    console = Console(highlight=False, markup=False)
    for name, text in labels.items():
        console.print(f"{name}: {text}")
    console.print(f"Wrote {len(METHODS) + 9} pictures and labels.json to {args.out}.")


if __name__ == "__main__":
    main()

"""Spoken words: Figure 4 of the mixup paper, `python -m fastmix.recipes.speech --data FOLDER`.

LeNet and VGG-11 learn words from spectrograms, with and without mixup; their errors on the validation list and on speakers that no network
has heard. `--data` is a folder as Google's Speech Commands has it: WORD/SPEAKER_nohash_N.wav (mono, 16 bits, one rate), validation_list.txt and
testing_list.txt; folders that begin with _ are left alone. Utterances are cut or padded to one second; a spectrogram has windows of 20 ms
every 10 ms, its last frequency is dropped, and it is standardised. Adam 3e-3, divided by ten after each third of the epochs; with mixup the first `--warmup`
epochs are on clean rows. Seed 0 tests on the testing list's speakers; each later seed holds out others, as many, and every eighth
of the rest's utterances to validate on. VGG-11's channels are divided by `--width`. Files:

    results.json   both errors of every run, and its curves
    speech.png     a spectrogram, its partner, and both mixed; the errors

Source: mixup, arXiv:1710.09412, section 3.3 and Figure 4 (Speech Commands v0.01, 30 words, 30 epochs).
"""

import sys
import wave
from functools import partial
from pathlib import Path

import torch
from torch import nn

import fastmix
from fastmix.recipes._studies import figure_of, keep, step_decay, train_arms
from fastmix.recipes._summaries import error_of_mean, means, numbers
from fastmix.recipes._training import COLORS, Fit, Mixed, error_and_loss, one_thread, parsed, parser

LISTS = "validation_list.txt", "testing_list.txt"
WHERE = "the layout of Speech Commands (http://download.tensorflow.org/data/speech_commands_v0.01.tar.gz, unpacked)"
ALPHAS = {"ERM": None, "mixup 0.1": 0.1, "mixup 0.2": 0.2, "mixup 1": 1.0}
PAPER = {  # validation and test error: ERM, 0.1, 0.2
    "LeNet": ((9.8, 10.3), (10.1, 10.8), (10.2, 11.3)),
    "VGG-11": ((5.0, 4.6), (4.0, 3.8), (3.9, 3.4)),
}
FRAMES = 101


# Data


def samples(path, rate=None):
    """(float samples in [-1, 1] of one second, zeros behind, rate) of a WAV file. ValueError with a line that says what is wrong."""
    try:
        with wave.open(str(path), "rb") as file:
            found = file.getnchannels(), file.getsampwidth(), file.getframerate()
            rate = found[2] if rate is None else rate
            if found != (1, 2, rate) or not 1000 <= rate <= 200_000:
                channels, width, here = found
                raise ValueError(
                    f"{path}: expected mono, 16 bits, {rate} Hz as the folder's first file, got {channels} channels, {8 * width} bits, {here} Hz"
                )
            content = file.readframes(rate)
    except (wave.Error, EOFError) as error:
        raise ValueError(f"{path}: expected a WAV file of PCM, got {error or 'its end'}: take {WHERE}") from None
    content = content[: len(content) // 2 * 2]
    if not content:
        raise ValueError(f"{path}: expected samples, got none: take {WHERE}")
    numbers = torch.frombuffer(bytearray(content), dtype=torch.int16)
    numbers = (
        numbers
        if sys.byteorder == "little"
        else numbers.view(torch.uint8).view(-1, 2).flip(1).contiguous().view(torch.int16).flatten()
    )
    return torch.nn.functional.pad(numbers.float() / 32768, (0, rate - len(numbers))), rate


def listed(folder, name):
    path = folder / name
    if not path.is_file():
        raise ValueError(f"{path}: expected a list of WORD/FILE.wav, got no such file: take {WHERE}")
    return set(path.read_text(encoding="utf-8").replace("\\", "/").split())


def load(folder, device, limit=None):
    """(spectrograms [N, 1, F, 101], words [N], speakers [N], part [N]: 0 to learn from, 1 validation, 2 test, names of the words)."""
    validation, testing = (listed(folder, name) for name in LISTS)
    words = sorted(path.name for path in folder.iterdir() if path.is_dir() and path.name[0] not in "_.")
    if len(words) < 2:
        raise ValueError(f"{folder}: expected a folder for each of several words, got {len(words)}: take {WHERE}")
    waves, labels, speakers, of, rate = [], [], [], [], None
    for number, word in enumerate(words):
        files = sorted((folder / word).glob("*.wav"))
        files = files if limit is None else files[:: max(1, len(files) // limit)]
        if not files:
            raise ValueError(f"{folder / word}: expected WAV files, got none: take {WHERE}")
        for path in files:
            found, rate = samples(path, rate)
            waves.append(found)
            labels.append(number)
            speakers.append(path.name.split("_nohash_")[0])
            name = f"{word}/{path.name}"
            of.append(1 if name in validation else 2 if name in testing else 0)
    for part, what in enumerate(("train on", "validate on", "test on")):
        if part not in of:
            raise ValueError(f"{folder}: expected utterances to {what} by {' and '.join(LISTS)}, got none: take {WHERE}")
    known = {name: number for number, name in enumerate(sorted(set(speakers)))}
    speakers = torch.tensor([known[name] for name in speakers])
    return (
        spectrograms(torch.stack(waves), rate).to(device),
        torch.tensor(labels, device=device),
        speakers,
        torch.tensor(of),
        words,
    )


def spectrograms(waves, rate):
    """log(1 + 100 |STFT|), standardised utterance by utterance: [N, 1, F, 101]."""
    window = rate // 50
    found = [
        torch.stft(part, window, rate // 100, window=torch.hann_window(window), return_complex=True).abs()[:, :-1, :FRAMES]
        for part in waves.split(500)
    ]
    found = (100 * torch.cat(found)).log1p()
    found = (found - found.mean((1, 2), keepdim=True)) / found.std((1, 2), keepdim=True).clamp(min=1e-3)
    return found.unsqueeze(1)


def parts(data, seed):
    """(train, validation, test) row numbers: seed 0 by the lists, others by other speakers."""
    _, _, speakers, of, _ = data
    if seed == 0:
        return [torch.nonzero(of == part)[:, 0] for part in range(3)]
    everyone = speakers.unique()
    many = len(speakers[of == 2].unique())
    order = everyone[torch.randperm(len(everyone), generator=torch.Generator().manual_seed(seed))]
    tested = torch.isin(speakers, order[:many])
    eighth = torch.arange(len(speakers)) % 8 == 0
    return [torch.nonzero(rows)[:, 0] for rows in (~tested & ~eighth, ~tested & eighth, tested)]


# Models


def lenet(classes, height, width):
    """Two convolutions and three layers, for any size."""
    convolutions = nn.Conv2d(1, 6, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2)
    flat = 16 * (((height - 4) // 2 - 4) // 2) * (((FRAMES - 4) // 2 - 4) // 2)
    return nn.Sequential(
        *convolutions, nn.Flatten(), nn.Linear(flat, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, classes)
    )


def vgg(classes, height, width):
    """VGG-11 with batch norm, its channels divided by `width`."""
    layers, inputs = [], 1
    for channels in (64, "pool", 128, "pool", 256, 256, "pool", 512, 512, "pool", 512, 512, "pool"):
        if channels == "pool":
            layers.append(nn.MaxPool2d(2))
        else:
            outputs = channels // width
            layers += [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
            inputs = outputs
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d((2, 3)), nn.Flatten(), nn.Dropout(0.5), nn.Linear(6 * inputs, classes))


MODELS = {"LeNet": lenet, "VGG-11": vgg}


class Warmed(nn.Module):
    """Clean rows for the first steps, then an objective."""

    def __init__(self, objective, steps):
        super().__init__()
        self.objective, self.clean, self.steps = objective, Mixed(), steps
        self.register_buffer("done", torch.zeros((), dtype=torch.int64))

    def forward(self, model, x, y):
        warm = int(self.done) < self.steps
        self.done += 1
        return (self.clean if warm else self.objective)(model, x, y)


def fit(data, model_name, alpha, args, seed):
    x, y, *_, words = data
    train, validation, test = (rows.to(x.device) for rows in parts(data, seed))
    model = MODELS[model_name](len(words), x.shape[2], args.width).to(x.device)
    optimizer = torch.optim.Adam(model.parameters(), args.rate, foreach=True)
    steps = -(-len(train) // 100)
    schedule = step_decay(optimizer, args.epochs * steps, (1 / 3, 2 / 3))
    objective = Mixed() if alpha is None else Warmed(Mixed(fastmix.Mixup(alpha, seed=seed)), args.warmup * steps)

    def evaluate(model):
        errors = [
            error_and_loss(torch.cat([model(x[some]) for some in rows.split(200)]), y[rows])["test_error_percent"]
            for rows in (validation, test)
        ]
        return dict(zip(("validation_error_percent", "test_error_percent"), errors, strict=True))

    return Fit(seed, model, objective, x[train], y[train], batch=100, optimizer=optimizer, schedule=schedule, evaluate=evaluate)


TITLE = "Spoken words (arXiv:1710.09412, Figure 4)"


def summary(found):
    rows = []
    for model in MODELS:
        for k, name in enumerate(ALPHAS):
            runs = found["methods"][f"{model}, {name}"]
            paper = [f"{number:g}" for number in PAPER[model][k]] if k < 3 else ["", ""]
            rows.append([model, name, *paper, *means(runs, "validation_error_percent", "test_error_percent")])
    remarks = f"""Errors in
percent after {found["epochs"]} epochs on 2,400 spoken digits of six speakers (Free Spoken Digit Dataset, CC BY-SA 4.0); paper: Speech Commands, 30 words. VGG-11's channels are
divided by {found["width"]}; {found["warmup"]} epochs on clean rows before mixup. Two unseen speakers are few: errors vary much from pair to pair."""
    columns = "model", "method", ">paper: validation", ">paper: test", ">validation", ">unseen speakers"
    return columns, rows, remarks


def picture(data, results, path):
    x, y, *_, words = data
    figure = figure_of(12, 6.4)
    top, bottom = figure.subfigures(2, 1)
    one, two = (int((y == number).nonzero()[0, 0]) for number in (0, 1))
    pair = torch.stack((x[one], x[two])).cpu()
    mixed = fastmix.mix(pair, 0.6, torch.tensor([1, 0]))
    titles = words[0], words[1], f"0.6 × {words[0]} + 0.4 × {words[1]}"
    for cell, image, title in zip(top.subplots(1, 3), (*pair, mixed[0]), titles, strict=True):
        cell.imshow(image[0].numpy(), origin="lower", aspect="auto", cmap="magma")
        cell.set_title(title, fontsize=10)
        cell.set(xlabel="10 ms", ylabel="50 Hz")
    places = {"validation_error_percent": "validation", "test_error_percent": "unseen speakers"}
    for cell, (key, title) in zip(bottom.subplots(1, 2), places.items(), strict=True):
        for number, model in enumerate(MODELS):
            for k, name in enumerate(ALPHAS):
                errors = numbers(results[f"{model}, {name}"], key)
                label = name if number == 0 else None
                cell.bar(
                    number + 0.2 * (k - 1.5),
                    sum(errors) / len(errors),
                    0.18,
                    yerr=error_of_mean(errors),
                    color=COLORS[k],
                    label=label,
                )
        cell.set_xticks(range(len(MODELS)), MODELS)
        cell.set(title=title, ylabel="error (%)")
        cell.spines[["top", "right"]].set_visible(False)
    bottom.axes[0].legend(frameon=False, fontsize=9)
    figure.savefig(path, dpi=90)


@one_thread()
def main(argv=None):
    folder = Path("speech"), "folder in the layout of Speech Commands"
    options = parser("speech", __doc__.splitlines()[0], out="fastmix-speech", seeds=3, epochs=30, data=folder)
    options.add_argument("--width", type=int, default=8, help="what VGG-11's channels are divided by (default: %(default)s)")
    options.add_argument("--rate", type=float, default=3e-3, help="Adam's rate (default: %(default)s)")
    options.add_argument("--warmup", type=int, default=5, help="epochs on clean rows before mixup (default: %(default)s)")
    args = parsed(options, argv)
    if args.width not in (1, 2, 4, 8, 16) or args.warmup < 0 or not 0 < args.rate < 1:
        options.error("--width, --warmup, --rate: expected 1, 2, 4, 8 or 16; at least 0; a number in (0, 1)")
    from rich.console import Console

    console = Console(highlight=False, markup=False)
    try:
        data = load(args.data, args.device, limit=48 if args.small else None)
    except (ValueError, OSError) as error:
        options.error(f"--data: {error}")
    console.print(
        f"{len(data[0])} utterances of {len(data[-1])} words; {args.seeds} seeds, {args.epochs} epochs, VGG-11 / {args.width}.\n"
    )
    arms = {}
    for model in MODELS:
        for name, alpha in ALPHAS.items():
            arms[f"{model}, {name}"] = args.epochs, partial(fit, data, model, alpha, args)
    more = {"width": args.width, "rate": args.rate, "warmup": args.warmup}
    results, _, runs = train_arms(args, "speech", arms, console, data, **more)
    keep(args, results, data, (TITLE, summary), console, **more)
    picture(data, results, args.out / "speech.png")
    runs.finish("results.json", "speech.png")


if __name__ == "__main__":
    main()

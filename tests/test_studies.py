"""The studies: what they read and refuse, what they write, and that each goes on from where it was broken off."""

import importlib.util
import json
import math
import wave

import numpy as np
import pytest
import torch

import fastmix

missing = [name for name in ("sklearn", "matplotlib", "rich") if importlib.util.find_spec(name) is None]
pytestmark = pytest.mark.skipif(bool(missing), reason="needs scikit-learn, matplotlib and rich")

from fastmix.bench import claims  # noqa: E402
from fastmix.recipes import _studies, _training, amp, attacks, cifar, corrupted, gan, puzzle, regression, speech, wafer  # noqa: E402

CPU = torch.device("cpu")


# Made files in the published formats


def cifar_folder(folder, hundred=False, rows=40):
    draw, labels = np.random.default_rng(0), 2 if hundred else 1
    names = ("train.bin", "test.bin") if hundred else ("data_batch_1.bin", "data_batch_2.bin", "test_batch.bin")
    for name in names:
        row = draw.integers(0, 256, (100 if hundred else rows, labels + 3072), dtype=np.uint8)
        row[:, :labels] = (np.arange(len(row)) % (100 if hundred else 10))[:, None]
        (folder / name).write_bytes(row.tobytes())
    return folder


def wav(path, count=8000, rate=8000, channels=1, width=2, value=1000):
    path.parent.mkdir(exist_ok=True)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes((np.arange(count * channels) % 50 * value // 50).astype(f"<i{width}" if width > 1 else "u1").tobytes())


def speech_folder(folder):
    for number, word in enumerate(("no", "yes")):
        for speaker in "abcd":
            for k in range(3):
                wav(folder / word / f"{speaker}_nohash_{k}.wav", 4000 + 500 * k, value=1000 * (1 + 9 * number))
    (folder / "_background_noise_").mkdir()
    (folder / "testing_list.txt").write_text("\n".join(f"{w}/d_nohash_{k}.wav" for w in ("no", "yes") for k in range(3)))
    (folder / "validation_list.txt").write_text("\n".join(f"{w}/{s}_nohash_0.wav" for w in ("no", "yes") for s in "ab"))
    return folder


def wafer_folder(folder, **changes):
    x, y, test = wafer.made(singles=10, mixed=2)
    content = {"arr_0": x, "arr_1": y.astype(np.uint8), "split": test.astype(np.uint8), **changes}
    np.savez_compressed(folder / wafer.FILE, **{name: value for name, value in content.items() if value is not None})
    return folder


def test_cifar_files(tmp_path):
    x, y, test_x, test_y = cifar.load(cifar_folder(tmp_path), CPU)
    assert (x.shape, test_x.shape, y[:12].tolist()) == ((80, 3, 32, 32), (40, 3, 32, 32), [*range(10), 0, 1])
    content = (tmp_path / "test_batch.bin").read_bytes()
    assert round(test_x[3, 1, 0, 5].item() * 255) == content[3 * 3073 + 1 + 1024 + 5]
    assert test_y[3] == content[3 * 3073]
    (tmp_path / "hundred").mkdir()
    x, y, *_ = cifar.load(cifar_folder(tmp_path / "hundred", hundred=True), CPU)
    assert (x.shape, y.tolist()) == ((100, 3, 32, 32), [*range(100)])


def test_held_out_rows_are_of_every_class(tmp_path):
    """Classes come in turn in some files: every tenth image would be of one class."""
    data = cifar.load(cifar_folder(tmp_path, rows=100), CPU)
    x, y, out_x, out_y = cifar.held_out(data)
    assert (len(x), len(out_x)) == (180, 20)
    assert len(out_y.unique()) > 5
    assert torch.equal(torch.cat((y, out_y)).sort().values, data[1].sort().values)


def test_speech_folder(tmp_path):
    x, y, speakers, part, words = speech.load(speech_folder(tmp_path), CPU)
    assert (x.shape, words, y.tolist()) == ((24, 1, 80, 101), ["no", "yes"], [0] * 12 + [1] * 12)
    assert torch.bincount(part).tolist() == [14, 4, 6]
    assert part[[0, 9]].tolist() == [1, 2]
    torch.testing.assert_close(x.mean((1, 2, 3)), torch.zeros(24), atol=1e-5, rtol=0)
    for seed in (0, 1, 2):
        train, validation, test = speech.parts((x, y, speakers, part, words), seed)
        assert len(train) + len(validation) + len(test) == 24
        assert not set(speakers[test].tolist()) & set(speakers[torch.cat((train, validation))].tolist())
    assert len(torch.nonzero(part == 2)) == len(test)


def test_speech_samples(tmp_path):
    wav(tmp_path / "w" / "a.wav", 5, value=500)
    found, rate = speech.samples(tmp_path / "w" / "a.wav")
    assert (rate, len(found)) == (8000, 8000)
    np.testing.assert_allclose(found[:6] * 32768, [0, 10, 20, 30, 40, 0])


def test_wafer_file(tmp_path):
    x, y, test = wafer.load(wafer_folder(tmp_path))
    assert (x.shape[1:], y.shape[1], x.max()) == ((52, 52), 8, 2)
    x[0] = x[np.flatnonzero(test)[0]]  # in both parts
    x[2] = x[1]  # twice in the part to learn from
    kept_x, kept_y, kept_test, dropped = wafer.without_repeats(x, y, test)
    assert dropped == 2 - int(test[2]) - int(test[0])
    assert len(kept_x) == len(kept_y) == len(kept_test) == len(x) - dropped
    train, train_y, check, check_y, *_ = wafer.parts((x, y, test), CPU)
    assert train.shape[1:] == (2, 52, 52)
    assert (train_y.sum(1) < 2).all()
    assert (check_y.sum(1) <= 2).all()
    other = x.copy()
    other[0, 0, 0] = 3
    no_split, *_ = wafer.load(wafer_folder(tmp_path, arr_0=other, split=None))
    assert no_split.max() == 2


# Bad input: one line, status 2


def stopped(recipe, folder, capsys, *more):
    with pytest.raises(SystemExit) as raised:
        recipe.main(["--data", str(folder), "--out", str(folder.parent / "out"), *more])
    assert raised.value.code == 2
    said = capsys.readouterr().err
    line = " ".join(said[said.index("error: ") :].split())
    assert str(folder) in line
    return line


@pytest.mark.parametrize("recipe", [cifar, corrupted, attacks, puzzle])
def test_folders_that_are_not_cifar(recipe, tmp_path, capsys):
    folder = tmp_path / "data"
    assert "expected data_batch_1.bin" in stopped(recipe, folder, capsys)
    folder.mkdir()
    assert "cs.toronto.edu" in stopped(recipe, folder, capsys)
    cifar_folder(folder)
    whole = (folder / "data_batch_2.bin").read_bytes()
    (folder / "data_batch_2.bin").write_bytes(whole[:-1])
    assert "data_batch_2.bin: expected records of 3073 bytes" in stopped(recipe, folder, capsys)
    (folder / "data_batch_2.bin").write_bytes(b"\x0b" + whole[1:])
    assert "expected classes below 10, got 11" in stopped(recipe, folder, capsys)
    for name in ("data_batch_1.bin", "data_batch_2.bin"):
        (folder / name).write_bytes(whole[:3073])
    assert "got none of [1, 2, 3, 4, 5]" in stopped(recipe, folder, capsys)


def test_folders_that_are_not_speech(tmp_path, capsys):
    folder = tmp_path / "data"
    assert "validation_list.txt: expected a list" in stopped(speech, folder, capsys)
    folder.mkdir()
    speech_folder(folder)
    path = folder / "yes" / "a_nohash_1.wav"
    for options, words in (
        ({"rate": 16000}, "expected mono, 16 bits, 8000 Hz as the folder's first file, got 1 channels, 16 bits, 16000 Hz"),
        ({"channels": 2}, "got 2 channels"),
        ({"width": 1}, "got 1 channels, 8 bits"),
        ({"count": 0}, "expected samples, got none"),
    ):
        wav(path, **options)
        assert words in stopped(speech, folder, capsys)
    path.write_bytes(b"RIFFnothing")
    assert f"{path}: expected a WAV file of PCM" in stopped(speech, folder, capsys)
    wav(path)
    (folder / "empty").mkdir()
    assert "expected WAV files, got none" in stopped(speech, folder, capsys)
    (folder / "empty").rmdir()
    (folder / "testing_list.txt").write_text("")
    assert "expected utterances to test on" in stopped(speech, folder, capsys)


def test_files_that_are_not_wafers(tmp_path, capsys):
    folder = tmp_path / "data"
    assert "got no such file" in stopped(wafer, folder, capsys)
    folder.mkdir()
    y = wafer.made(singles=10, mixed=2)[1]
    for changes, words in (
        ({"arr_0": None}, "expected arr_0 uint8 [None, 52, 52], which it does not have"),
        ({"arr_0": np.array([{}] * 3)}, "got object"),
        ({"arr_0": np.zeros((4, 52, 50), np.uint8)}, "got uint8 [4, 52, 50]"),
        ({"arr_0": np.zeros((4, 52, 52), np.uint8)}, "expected a row of 0 and 1"),
        ({"arr_1": np.full_like(y, 2)}, "expected a row of 0 and 1"),
        ({"arr_1": (y * (np.arange(8) != 5))}, "got none of Near-full"),
        ({"split": np.zeros(3, np.uint8)}, "expected split"),
    ):
        wafer_folder(folder, **changes)
        assert words in stopped(wafer, folder, capsys)
    (folder / wafer.FILE).write_bytes(b"not a zip file")
    assert "expected arr_0" in stopped(wafer, folder, capsys)


def test_models_that_are_none(tmp_path, capsys):
    folder = tmp_path / "data"
    folder.mkdir()
    with pytest.raises(SystemExit):
        cifar.main(["--data", str(cifar_folder(folder)), "--model", "no such model", "--out", str(tmp_path / "out")])
    assert "expected one of small, preact18 or a name" in " ".join(capsys.readouterr().err.split())


# Parts of the studies


def test_labels_are_replaced_once_by_any_class():
    y = torch.arange(2000) % 10
    wrong, changed = corrupted.replaced(y, 50, 3)
    assert changed.sum() == 1000
    assert torch.equal(wrong[~changed], y[~changed])
    assert 0.86 < (wrong[changed] != y[changed]).float().mean() < 0.94  # a tenth draws its own class
    assert torch.equal(corrupted.replaced(y, 50, 3)[0], wrong)
    assert not torch.equal(corrupted.replaced(y, 50, 4)[0], wrong)


def test_augmentation_moves_and_mirrors_whole_images():
    x = torch.arange(1.0, 1 + 4 * 8 * 8).view(4, 1, 8, 8)
    seen = []
    torch.manual_seed(0)
    for _ in range(30):
        _studies.Augmented(lambda model, moved, y: seen.append(moved), padding=2)(None, x, None)
    for moved in seen:
        for image, own in zip(moved[:, 0], x[:, 0], strict=True):
            inside = image[image > 0]
            assert inside.numel() >= 36
            assert set(inside.tolist()) <= set(own.flatten().tolist())
            steps = image[2:6, 2:6].diff(dim=1)
            assert (steps == steps[0, 0]).all()  # one way round in each image
            assert steps[0, 0].abs() == 1
    assert torch.stack(seen).diff(dim=0).abs().max() > 0


def test_sliced_wasserstein_of_a_shift():
    points = torch.randn(500, 2)
    assert gan.sliced_wasserstein(points, points[torch.randperm(500)]) == 0
    expected = 3 * 2 / math.pi  # the mean of |cos| times the length
    assert abs(gan.sliced_wasserstein(points, points + torch.tensor([0.0, 3.0])) - expected) < 0.01


def test_modes_of_a_ring():
    class Fixed(torch.nn.Module):
        shots = torch.zeros(1)

        def sample(self, count):
            return gan.modes(CPU)[torch.arange(count) % 3]

    found = gan.evaluated("ring", Fixed())
    assert (found["modes"], found["good_percent"]) == (3, 100)


def test_accuracy_of_sets():
    y = torch.zeros(3, 8)
    y[0, 1] = y[1, 2] = y[1, 3] = y[2, 4] = y[2, 5] = 1
    z = -torch.ones(3, 8)
    z[0, 1], z[1, 2], z[1, 3], z[2, 4], z[2, 6] = 1, 2, -0.5, 1, 1
    assert wafer.measured(z, y, "sigmoid") == {"top 1": 100, "exact 1": 100, "top 2": 50, "exact 2": 0}


def test_united_maps_are_unions_of_maps_and_labels():
    x, y = (torch.rand(30, 2, 4, 4) < 0.4).float(), torch.eye(8)[torch.arange(30) % 8]
    for way, most in (("maps", 2), ("three maps", 3)):
        loss = wafer.WaferLoss("sigmoid", way, 0)
        mixed, labels = loss.united(x, y)
        assert (mixed >= x).all()
        assert (labels >= y).all()
        assert labels.sum(1).max() == most
    mixed, labels = wafer.WaferLoss("sigmoid", "three", 0).united(x, y)
    assert labels.sum(1).max() == 3
    alone = labels.sum(1) == 1  # or mixed with the same kind
    assert (mixed[alone] == x[alone]).flatten(1).all(1).sum() >= 8


# Runs


@pytest.fixture
def folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("cifar", "speech", "wafer", "trec"):
        (tmp_path / name).mkdir()
    cifar_folder(tmp_path / "cifar")
    speech_folder(tmp_path / "speech")
    wafer_folder(tmp_path / "wafer")
    kinds = "LOC:city where is place{} number{} ?\n", "NUM:count how many thing{} are there in {} ?\n"
    lines = "".join(kinds[k % 2].format(k % 7, k % 3) for k in range(200))
    for name in ("train_5500.label", "TREC_10.label"):
        (tmp_path / "trec" / name).write_text(lines, encoding="iso-8859-1")
    monkeypatch.setattr(gan, "STEPS", 3)
    monkeypatch.setattr(_training, "SAVE_SECONDS", 0.0)
    return tmp_path


STUDIES = {  # recipe: (arguments, picture, one of its arms)
    "corrupted": (["--data", "cifar", "--share", "20", "--first-seed", "1"], "labels.png"),
    "attacks": ([], "attacks.png"),
    "regression": (["--data", "nowhere"], "regression.png"),
    "augmix": ([], "corruptions.png", "augmix.png"),
    "puzzle": (["--data", "cifar"], "puzzle.png", "curves.png"),
    "gan": (["--loss", "minimax", "--method", "GAN", "mixup GAN 1"], "gan.png"),
    "wafer": (["--data", "wafer"], "wafer.png"),
    "speech": (["--data", "speech", "--width", "16", "--warmup", "1"], "speech.png"),
    "amp": (["--data", "trec"], "amp.png"),
    "cifar": (
        ["--data", "cifar", "--model", "small", "--method", "ERM", "CutMix", "PuzzleMix", "--search-epochs", "1", "--bfloat16"],
        "cifar.png",
    ),
}
FEW = {"attacks": ("EPS", {"digits": (0.1, 0.2)})}


class Killed(Exception):
    pass


@pytest.mark.slow
@pytest.mark.parametrize("name", STUDIES)
def test_a_study_broken_off_ends_with_the_same_bits(name, folders, monkeypatch, capsys):
    """Broken off after the first epoch and two epochs later, it goes on; its files are whole, and of the same bits as an unbroken run's."""
    recipe = importlib.import_module(f"fastmix.recipes.{name}")
    arguments, picture, *others = STUDIES[name]
    if name in FEW:
        monkeypatch.setattr(recipe, *FEW[name])
    if name == "attacks":
        few = [part[:100] for part in corrupted.digits_data(CPU)]
        monkeypatch.setattr(corrupted, "digits_data", lambda device: few)
    if name == "augmix":
        few = [part[:100] for part in recipe.load(CPU)]
        monkeypatch.setattr(recipe, "load", lambda device: few)
    if name == "puzzle":
        monkeypatch.setattr(recipe, "METHODS", {key: recipe.METHODS[key] for key in ("CutMix", "PuzzleMix")})
    if name == "corrupted":
        monkeypatch.setattr(recipe, "METHODS", {key: recipe.METHODS[key] for key in ("ERM", "mixup 8 + dropout 0.3")})
    arguments = [*arguments, "--seeds", "1", "--epochs", "2", "--device", "cpu", "--out"]
    with monkeypatch.context() as undrawn:  # what the other calls draw is looked at
        for drawing in [called for called in vars(recipe) if called.startswith("picture")]:
            undrawn.setattr(recipe, drawing, lambda *drawn: None)
        recipe.main([*arguments, "whole"])
    epoch, left = _training.Fit.epoch, [1]

    def dies(self):
        if not left[0]:
            raise Killed
        left[0] -= 1
        (gan_epoch if isinstance(self, gan.GanFit) else epoch)(self)

    gan_epoch = gan.GanFit.epoch
    monkeypatch.setattr(_training.Fit, "epoch", dies)
    monkeypatch.setattr(gan.GanFit, "epoch", dies)
    broken = 0
    for epochs in (1, 2, 1000):
        left[0] = epochs
        try:
            recipe.main([*arguments, "broken"])
        except Killed:
            broken += 1
    assert broken == 2
    assert "Going on with an interrupted call" in capsys.readouterr().out
    whole, again = folders / "whole", folders / "broken"
    assert (whole / "results.json").read_bytes() == (again / "results.json").read_bytes()
    assert sorted(path.name for path in again.iterdir()) == sorted(["results.json", picture, *others])
    assert (again / picture).read_bytes().startswith(b"\x89PNG")
    found = json.loads((again / "results.json").read_text())
    assert str(folders) not in json.dumps(found)
    digests = [run["weights_sha256"] for runs in found["methods"].values() for run in runs]
    assert len(set(digests)) == len(digests)


def test_small_is_small():
    for made in (
        _training.parser("x", "", out="x", seeds=3, epochs=40, small=2),
        _training.parser("x", "", out="x", seeds=3, epochs=1),
    ):
        args = _training.parsed(made, ["--small", "--out", "/tmp"], needs={})
        assert (args.seeds, args.epochs) == (1, min(made.get_default("epochs"), 2))


def test_margins_of_the_attacks_are_of_the_model_that_is_asked():
    """White box: its own gradient. A linear model's error at eps is known."""
    x, y = torch.full((2, 1, 1, 2), 0.5), torch.tensor([0, 1])
    x[0, 0, 0, 0] = x[1, 0, 0, 1] = 0.7
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(2, 2, bias=False))
    with torch.no_grad():
        model[1].weight.copy_(torch.eye(2))
    for eps, wrong in ((0.05, 0), (0.15, 100)):
        moved = attacks.attacked(model, x, y, eps, 1, "margin")
        assert attacks.errors(model, moved, y)[0] == wrong


def test_regression_scales_by_the_training_rows():
    table = regression.diabetes(None)
    x, y, test_x, test_y, at, scale = regression.split(table, 0, CPU)
    torch.testing.assert_close(x.mean(0), torch.zeros(10), atol=1e-5, rtol=0)
    assert (len(x), len(test_x)) == (354, 88)
    assert abs(y.std(unbiased=False).item() - 1) < 1e-5
    assert test_y.min() >= table[1].min()
    assert scale > 1 < at


def test_what_moves_lambda():
    """The authors' step by its formula, and the same dropout where it is not drawn anew."""
    torch.manual_seed(0)
    model = amp.text.Classifier(amp.text.TextCNN, 20, 3)
    x, y = torch.randint(1, 20, (6, 5)), torch.tensor([0, 1, 2, 0, 1, 2])
    for fresh in (False, True):
        moved = amp.METHODS["authors' step" if fresh else "reweighting alone"][1](model, 0)
        moved(model, x, y).backward()
        found = moved.measured()
        assert 0 < found["lambda_moved"] < 0.002
        assert (found["loss_moved"] > 0.01) == fresh  # the noise of dropout
    steps = []
    for step in (0.01, 0.1):
        moved = amp.METHODS[f"AMP, step {step:g}"][1](model, 0)
        torch.manual_seed(1)
        moved(model, x, y)
        steps.append(moved.measured()["lambda_moved"])
    assert steps[0] <= 0.02 < steps[1] * 10
    assert steps[1] > 3 * steps[0]


def test_the_authors_loss():
    logits, y = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
    target = fastmix.Mixup(1.0, seed=0).sample(logits).target(y)
    chances, rows = logits.softmax(1), target.dense(3)
    expected = -(rows * chances.log() + (1 - rows) * (1 - chances).log()).sum(1)
    torch.testing.assert_close(amp.authors_loss(logits, target), expected, atol=1e-5, rtol=1e-5)


def test_padding_changes_nothing_in_a_transformer():
    torch.manual_seed(0)
    model = amp.text.Classifier(amp.Transformer, 20, 3).eval()
    words = torch.tensor([[3, 4, 5, 6, 0, 0, 0], [7, 8, 0, 0, 0, 0, 0]])
    torch.testing.assert_close(model(words), torch.cat([model(words[:1, :4]), model(words[1:, :2])]), atol=1e-5, rtol=1e-4)
    objective = amp.METHODS["transformer, TMix"][1](model, 0)
    assert objective(model, words, torch.tensor([0, 1])).isfinite()


@pytest.mark.parametrize(
    ("gaps", "said"),
    [
        ([3.0, 3.1, 2.9], "reproduced"),
        ([-3.0, -3.1, -2.9], "contradicted"),
        ([0.5, -0.5, 0.1], "not testable here"),
        ([5, 0, 5], "not testable here"),  # exactly two standard errors
        ([3.0], "not testable here (one seed)"),
        ([3.0, 3.0], "not testable here (two seeds)"),
    ],
)
def test_a_claim_needs_more_than_two_standard_errors(gaps, said):
    assert claims.verdict(gaps) == said


def test_claims_of_studies_that_have_not_run():
    columns, rows = claims.claims({})
    assert len(rows) == len(claims.CLAIMS)
    assert {row[2] for row in rows} == {"not testable here"}
    assert all(len(row) == len(columns) for row in rows)

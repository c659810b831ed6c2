import csv
import json
import math
import os
import pickle
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.tools.experiments.test_reproduce_article import RECIPE, accept, train_tiny, write_tiny_cifar
from tools.experiments import article
from tools.experiments import article_robustness as robustness
from videogru.checkpoint.model_file import read_model
from videogru.data.manifests.dataset_card import load_card
from videogru.errors import DataError

FILL = np.array([10, 20, 30], dtype=np.uint8)
ROWS = np.arange(6, dtype=np.int64)


def images(count: int = 6, side: int = 32) -> np.ndarray:
    return np.random.default_rng(0).integers(100, 200, (count, 3, side, side)).astype(np.uint8)


# Damage


@pytest.mark.parametrize("share", robustness.SEVERITIES["occlusion"])
def test_occlusion_is_one_square_of_the_right_area(share: float) -> None:
    before = images()
    after = robustness.spoil(before, "occlusion", share, ROWS, FILL)
    side = round(math.sqrt(share * 32 * 32))
    places = set()
    for old, new in zip(before, after, strict=True):
        covered = (new == FILL[:, None, None]).all(axis=0)
        assert covered.sum() == side * side
        top, left = np.argwhere(covered)[0]
        assert covered[top : top + side, left : left + side].all()
        assert np.array_equal(new[:, ~covered], old[:, ~covered])
        places.add((int(top), int(left)))
    assert len(places) > 1
    assert abs(side * side / 1024 - share) < 0.02


def test_the_square_reaches_every_border() -> None:
    rows = np.arange(400, dtype=np.int64)
    after = robustness.spoil(np.full((400, 3, 32, 32), 99, np.uint8), "occlusion", 0.5, rows, FILL)
    covered = (after[:, 0] == 10).any(axis=0)
    assert covered.all()


@pytest.mark.parametrize("sd", robustness.SEVERITIES["noise"])
def test_noise_has_its_sd(sd: float) -> None:
    gray = np.full((6, 3, 32, 32), 128, np.uint8)
    noise = robustness.spoil(gray, "noise", sd, ROWS, FILL).astype(float) / 255 - 128 / 255
    assert noise.std() == pytest.approx(sd, rel=0.03)
    assert abs(noise.mean()) < 4 * sd / math.sqrt(noise.size)
    white = robustness.spoil(np.full((1, 3, 32, 32), 255, np.uint8), "noise", sd, ROWS[:1], FILL)
    assert (white == 255).mean() == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize("sd", robustness.SEVERITIES["blur"])
def test_blur_by_loops(sd: float) -> None:
    before = images(1, 16)
    after = robustness.spoil(before, "blur", sd, ROWS[:1], FILL)
    reach = math.ceil(4 * sd)
    weights = {step: math.exp(-(step**2) / (2 * sd * sd)) for step in range(-reach, reach + 1)}
    total = sum(weights.values())

    def mirrored(place: int) -> int:
        return -place if place < 0 else 30 - place if place > 15 else place

    for y, x in ((0, 0), (3, 15), (8, 7)):
        expected = sum(
            weights[v] * weights[u] / total**2 * float(before[0, 1, mirrored(y + v), mirrored(x + u)])
            for v in weights
            for u in weights
        )
        assert float(after[0, 1, y, x]) == pytest.approx(expected, abs=0.51)


@pytest.mark.parametrize(("kind", "severity"), robustness.CONDITIONS)
def test_damage_depends_on_kind_severity_and_row_alone(kind: str, severity: float) -> None:
    before = images()
    kept = before.copy()
    after = robustness.spoil(before, kind, severity, ROWS, FILL)
    assert np.array_equal(before, kept)
    assert after.shape == before.shape and after.dtype == np.uint8
    some = np.array([4, 1])
    assert np.array_equal(robustness.spoil(before[some], kind, severity, some, FILL), after[some])
    if kind != "blur":
        assert not np.array_equal(robustness.spoil(before, kind, severity, ROWS + 1, FILL), after)


# Comparing


def made_up(level: dict[str, float], seed: int = 0) -> dict[str, np.ndarray]:
    """Answers of three seeds to 500 images; damage takes from the accuracy `level` a tenth of it per severity."""
    rng = np.random.default_rng(seed)
    hits = {}
    for net, accuracy in level.items():
        hits[f"{net} clean"] = rng.random((3, 500)) < accuracy
        hits[f"{net} superclass"] = hits[f"{net} clean"] | (rng.random((3, 500)) < 0.3)
        hits[f"{net} within superclass"] = hits[f"{net} clean"] | (rng.random((3, 500)) < 0.2)
        for kind, severity in robustness.CONDITIONS:
            step = 1 + robustness.SEVERITIES[kind].index(severity)
            hits[f"{net} {kind} {severity}"] = rng.random((3, 500)) < accuracy * (1 - step / 10)
    return hits


def test_the_numbers_by_hand() -> None:
    hits = made_up({"resnet": 0.5, "lstm-cnn": 0.7, "gru-cnn": 0.6})
    found = robustness.compare(hits)
    for net in article.NETS:
        clean = hits[f"{net} clean"].mean()
        noisy = np.mean([hits[f"{net} noise {sd}"].mean() for sd in robustness.SEVERITIES["noise"]])
        assert found["conditions"][net]["clean"]["value"] == pytest.approx(clean)
        assert found["measures"]["noise: accuracy"][net]["value"] == pytest.approx(noisy)
        assert found["measures"]["noise: relative accuracy"][net]["value"] == pytest.approx(noisy / clean)
        fine = found["measures"]["fine class given a right superclass"][net]["value"]
        right = hits[f"{net} superclass"]
        assert fine == pytest.approx(hits[f"{net} clean"][right].mean())
    claims = {(one["measure"], one["against"]): one for one in found["claims"]}
    assert len(claims) == 2 * (2 * 3 + 2)
    for kind in robustness.SEVERITIES:
        better, worse = claims[f"{kind}: accuracy", "resnet"], claims[f"{kind}: accuracy", "lstm-cnn"]
        assert better["verdict"] == "the claim holds" and better["low"] > 0
        assert "the opposite" in worse["verdict"] and worse["high"] < 0
        assert "the claim holds." in robustness.sentence(better)
    assert sum(found["verdicts"].values()) == 16
    for said, count in found["verdicts"].items():
        assert count == sum(claim["verdict"] == said for claim in found["claims"])
    # Made the same, relative to the clean accuracy.
    relative = claims["blur: relative accuracy", "resnet"]
    assert relative["verdict"] == "undecided" and relative["low"] < 0 < relative["high"]


def by_hand(values: list[float], drawn: np.ndarray) -> tuple[float, float]:
    """The union of the percentiles and of t with two degrees of freedom, around the mean of three seeds."""
    half = 4.3027 * np.std(values, ddof=1) / math.sqrt(3)
    low, high = np.quantile(drawn, [0.025, 0.975])
    return min(low, np.mean(values) - half), max(high, np.mean(values) + half)


def test_intervals_of_averages_and_differences_by_hand() -> None:
    hits = made_up({"resnet": 0.5, "gru-cnn": 0.6})
    found = robustness.compare(hits)
    names = [f"{net} blur {sd}" for net in ("gru-cnn", "resnet") for sd in robustness.SEVERITIES["blur"]]
    _, drawn = article.resampled_means(np.stack([hits[name] for name in names]))
    ours, theirs = drawn[:5].mean(axis=0), drawn[5:].mean(axis=0)
    seeds = [[np.mean([hits[name][s].mean() for name in some]) for s in range(3)] for some in (names[:5], names[5:])]
    claim = next(one for one in found["claims"] if one["measure"] == "blur: accuracy")
    differences = [a - b for a, b in zip(*seeds, strict=True)]
    assert (claim["low"], claim["high"]) == pytest.approx(by_hand(differences, ours - theirs))
    number = found["measures"]["blur: accuracy"]["resnet"]
    assert (number["low"], number["high"]) == pytest.approx(by_hand(seeds[1], theirs))


def test_one_seed_says_that_it_has_no_interval_over_seeds() -> None:
    hits = {name: one[:1] for name, one in made_up({"resnet": 0.5, "gru-cnn": 0.6}).items()}
    found = robustness.compare(hits)
    assert {one["over"] for one in found["claims"]} == {"images alone"}
    assert "images alone)" in robustness.sentence(found["claims"][0])
    _, drawn = article.resampled_means(np.stack([hits["resnet clean"]]))
    clean = found["conditions"]["resnet"]["clean"]
    assert (clean["low"], clean["high"]) == pytest.approx(tuple(np.quantile(drawn, [0.025, 0.975])))


def test_a_net_that_is_not_there_is_left_out() -> None:
    found = robustness.compare(made_up({"resnet": 0.5, "gru-cnn": 0.6}))
    assert {one["against"] for one in found["claims"]} == {"resnet"}
    assert list(found["conditions"]) == ["resnet", "gru-cnn"]


def test_a_net_that_knows_nothing() -> None:
    hits = made_up({"resnet": 0.5, "gru-cnn": 0.6})
    hits["resnet clean"][:] = False
    with pytest.raises(DataError, match="no clean image right"):
        robustness.compare(hits)
    hits["resnet clean"][:2, 0] = True
    with pytest.raises(DataError, match="no clean image right"):
        robustness.compare(hits)
    # One right image: many resamples have none, which leaves their ratio undefined.
    hits["resnet clean"][2, 0] = True
    relative = robustness.compare(hits)["measures"]["noise: relative accuracy"]["resnet"]
    assert -math.inf < relative["low"] < relative["value"] < relative["high"] < math.inf


# Models


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Six trained nets in work/, and the tiny CIFAR-100 in data/."""
    place = tmp_path_factory.mktemp("article")
    (place / "recipe.yaml").write_text(RECIPE)
    with pytest.MonkeyPatch.context() as patch:
        accept(patch.setattr, write_tiny_cifar(place / "data"))
        train_tiny(place, [f"{net}-seed{seed}" for net in article.NETS for seed in (0, 1)])
        yield place


def called(place: Path) -> list[str]:
    return ["--work", str(place / "work"), "--data-dir", str(place / "data"), "--out", str(place / "out")]


@pytest.mark.slow
def test_from_models_to_pages(place: Path) -> None:
    assert robustness.main(called(place)) == 0
    table = json.loads((place / "out/robustness.json").read_text())
    assert table["seeds"] == [0, 1] and table["images"] == 100
    text = (place / "out/robustness.md").read_text()
    assert text.count("that GRU-CNN is better:") == 16
    counts = ", ".join(f"{said}: {text.count(f'is better: {said}.')}" for said in table["verdicts"])
    assert f"16 comparisons; {counts}. Each interval" in text
    assert "DIR" in text and str(place / "data") not in text
    assert (place / "out/robustness.png").read_bytes().startswith(b"\x89PNG")

    # Independently: the model itself on pixels spoiled here.
    classifier, _ = read_model(place / "work/lstm-cnn-seed1/model.safetensors")
    with (place / "data/cifar-100-python/test").open("rb") as file:
        content = pickle.load(file)
    with (place / "data/cifar-100-python/train").open("rb") as file:
        fill = np.rint(pickle.load(file)["data"].reshape(-1, 3, 1024).mean(axis=(0, 2))).astype(np.uint8)
    pixels, labels = content["data"].reshape(-1, 3, 32, 32), np.array(content["fine_labels"])
    with np.load(place / "work/lstm-cnn-seed1/robustness.npz") as arrays:
        hits = dict(zip(arrays["names"].tolist(), arrays["hits"], strict=True))

    def scores(frames: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            said: np.ndarray = classifier(torch.from_numpy(frames)[:, None], torch.ones(100, dtype=torch.int64)).numpy()
            return said

    for kind, severity in (("occlusion", 0.3), ("noise", 0.08), ("blur", 1.2)):
        spoiled = robustness.spoil(pixels, kind, severity, np.arange(100), fill)
        assert np.array_equal(hits[f"{kind} {severity}"], scores(spoiled).argmax(1) == labels)
    clean = scores(pixels)
    groups, _ = article.superclasses(load_card("cifar100").classes)
    for row, label in enumerate(labels):
        family = [k for k in range(100) if groups[k] == groups[label]]
        assert hits["clean"][row] == (clean[row].argmax() == label)
        assert hits["superclass"][row] == (clean[row].argmax() in family)
        assert hits["within superclass"][row] == (max(family, key=lambda k: clean[row, k]) == label)


@pytest.mark.slow
def test_answers_are_kept_for_the_same_weights_and_damage(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert robustness.main(called(place)) == 0
    asked = []
    real = robustness.Predictor.from_file
    monkeypatch.setattr(robustness.Predictor, "from_file", lambda path: asked.append(path.parent.name) or real(path))

    def asks() -> list[str]:
        asked.clear()
        assert robustness.main(called(place)) == 0
        return asked

    assert asks() == []
    # Neither a newer model nor an older one is another; other weights are, though they look older than the answers.
    model = place / "work/gru-cnn-seed1/model.safetensors"
    os.utime(model, ns=(2**62, 2**62))
    assert asks() == []
    weights = model.read_bytes()
    shutil.copyfile(place / "work/gru-cnn-seed0/model.safetensors", model)
    os.utime(model, ns=(1, 1))
    assert asks() == ["gru-cnn-seed1"]
    with np.load(model.with_name("robustness.npz")) as one, np.load(place / "work/gru-cnn-seed0/robustness.npz") as two:
        assert np.array_equal(one["hits"], two["hits"]) and str(one["key"]) == str(two["key"])
    model.write_bytes(weights)
    assert asks() == ["gru-cnn-seed1"]
    # A condition that is missing is asked, and so is a cache of an earlier form.
    for cut in (slice(-1), slice(None)):
        cache = place / "work/resnet-seed0/robustness.npz"
        with np.load(cache) as arrays:
            kept = dict(arrays)
        key = {"key": kept["key"]} if cut.stop else {}
        np.savez(cache, names=kept["names"][cut], hits=kept["hits"][cut], **key)
        assert asks() == ["resnet-seed0"]
        with np.load(cache) as arrays:
            assert np.array_equal(arrays["hits"], kept["hits"])
    whole = cache.read_bytes()
    for damaged in (b"", b"junk", whole[:100], whole[: len(whole) // 2], whole[:60] + bytes(20) + whole[80:]):
        cache.write_bytes(damaged)
        assert asks() == ["resnet-seed0"]
    monkeypatch.setattr(robustness, "DAMAGE_VERSION", robustness.DAMAGE_VERSION + 1)
    assert len(asks()) == 6
    assert asks() == []
    model = place / "work/gru-cnn-seed1/model.safetensors"
    assert robustness.cache_key(model, FILL) != robustness.cache_key(model, FILL + 1)


def test_a_folder_must_hold_the_net_of_its_name(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for net, held in (("resnet", "resnet"), ("gru-cnn", "lstm-cnn")):
        (tmp_path / f"{net}-seed0").symlink_to(place / f"work/{held}-seed0")
    assert robustness.main(["--work", str(tmp_path), "--data-dir", str(place / "data")]) == 2
    assert "model.cell=lstm, but a GRU-CNN has gru" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "--work"),
        (["--work", "x", "--data-dir", "/nowhere"], "/nowhere: no folder cifar-100-python"),
        (["--work", "/nowhere", "--data-dir", "DATA"], "no finished run"),
    ],
)
def test_bad_usage_is_one_line(place: Path, words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code = robustness.main([str(place / "data") if word == "DATA" else word for word in words])
    except SystemExit as error:
        code = int(str(error.code))
    err = capsys.readouterr().err
    assert code == 2 and said in err and err.count("\n") == 1


def test_nets_without_a_common_seed(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for net, seed in (("resnet", 0), ("gru-cnn", 1)):
        (tmp_path / f"{net}-seed{seed}").symlink_to(place / f"work/{net}-seed{seed}")
    assert robustness.main(["--work", str(tmp_path), "--data-dir", str(place / "data")]) == 2
    assert "no seed that all nets have" in capsys.readouterr().err


# Superclasses


def test_twenty_superclasses_of_five_as_in_the_readme() -> None:
    card = load_card("cifar100")
    groups, names = article.superclasses(card.classes)
    assert len(names) == 20 and np.bincount(groups).tolist() == [5] * 20
    table = {}
    for line in (card.folder / "README.md").read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("|") and "," in line:
            table[cells[0].replace(" ", "_")] = {c.replace(" ", "_") for c in cells[1].split(", ")}
    assert {name: {card.classes[k] for k in np.flatnonzero(groups == g)} for g, name in enumerate(names)} == table


def test_other_classes_are_refused() -> None:
    with pytest.raises(DataError, match="other classes"):
        article.superclasses([*load_card("cifar100").classes[1:], "unicorn"])


@pytest.mark.slow
def test_superclasses_of_the_real_data(shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import runpy

    monkeypatch.syspath_prepend(str(shared_data / "cifar100"))
    monkeypatch.setattr(sys, "argv", ["unpack.py", str(tmp_path)])
    runpy.run_path(str(shared_data / "cifar100" / "unpack.py"), run_name="__main__")
    folder = tmp_path / "cifar-100-python"
    found = {}
    with (folder / "meta").open("rb") as file:
        meta = pickle.load(file)
    for split in ("train", "test"):
        with (folder / split).open("rb") as file:
            content = pickle.load(file, encoding="latin1")
        for fine, coarse in zip(content["fine_labels"], content["coarse_labels"], strict=True):
            found.setdefault(meta["fine_label_names"][fine], set()).add(meta["coarse_label_names"][coarse])
    with (load_card("cifar100").folder / "superclasses.csv").open(newline="") as file:
        assert {row["class"]: {row["superclass"]} for row in csv.DictReader(file)} == found

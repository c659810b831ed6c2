import json
import subprocess
from pathlib import Path
from shutil import which

import numpy as np
import pytest

from videogru.config import DataConfig
from videogru.data.manifests.corpus import open_corpus
from videogru.data.manifests.describe import describe_corpus, list_cards


def described(dataset: object, **settings: object) -> dict:
    data = DataConfig(dataset=str(dataset))
    facts = describe_corpus(open_corpus(data), data=data, **settings)
    assert json.loads(json.dumps(facts)) == facts
    return facts


def test_arrays() -> None:
    facts = described("adrenalmnist3d")
    assert facts["splits"] == {"train": 1188, "val": 98, "test": 298}
    assert facts["sources"] == {"steps": 28, "channels": 1, "height": 28, "width": 28}
    assert facts["license"] == "CC BY 4.0"
    with np.load(Path(str(facts["root"])) / "adrenalmnist3d.npz") as arrays:
        assert facts["labels"]["hyperplasia"]["test"] == int(arrays["test_labels"].sum())


@pytest.mark.skipif(which("ffprobe") is None, reason="needs ffprobe")
def test_videos_agree_with_ffprobe() -> None:
    facts = described("grid_digits", probe=3)
    assert (facts["rows"], facts["groups"], facts["classes"], facts["missing"]) == (1000, 1000, 10, 0)
    assert facts["unreadable"] == {}
    manifest = open_corpus(DataConfig(dataset="grid_digits")).manifest
    frames = []
    for row in (0, 499, 999):
        command = ["ffprobe", "-v", "error", "-count_frames", "-of", "json", "-show_streams", str(manifest.path(row))]
        stream = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)["streams"][0]
        frames.append(int(stream["nb_read_frames"]))
        assert (stream["width"], stream["height"], stream["avg_frame_rate"]) == (112, 96, "25/1")
    sources = facts["sources"]
    assert (sources["width"], sources["height"], sources["channels"]) == (112, 96, 3)
    assert sources["frames_per_second"] == 25
    assert sources["steps"] == ([min(frames), max(frames)] if min(frames) < max(frames) else frames[0])
    length = sources["length_seconds"]
    assert max(length if isinstance(length, list) else [length]) == pytest.approx(max(frames) / 25)


def test_volumes_and_unreadable_files(tmp_path: Path) -> None:
    import nibabel

    for label in ("a", "b"):
        (tmp_path / label).mkdir()
        volume = nibabel.Nifti1Image(np.arange(6 * 5 * 4, dtype=np.int16).reshape(6, 5, 4), np.diag([1, 1, 2.5, 1]))
        nibabel.save(volume, tmp_path / label / "x.nii")
    (tmp_path / "b" / "y.nii").write_bytes(b"no volume")
    facts = described(tmp_path)
    assert facts["sources"]["steps"] == 4
    assert (facts["sources"]["height"], facts["sources"]["width"]) == (5, 6)
    assert (facts["sources"]["step_mm"], facts["sources"]["length_mm"]) == (2.5, 10)
    assert list(facts["unreadable"]) == ["b/y.nii"]
    assert (facts["title"], facts["license"]) == (None, None)


def test_cards_say_whether_their_data_are_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, repository: Path
) -> None:
    monkeypatch.setenv("VIDEOGRU_DATA", str(tmp_path))
    cards = {card["name"]: card for card in list_cards()}
    assert set(cards) == {path.parent.name for path in (repository / "datasets").glob("*/dataset.yaml")}
    assert cards["grid_digits"]["found"] == str(open_corpus(DataConfig(dataset="grid_digits")).manifest.root)
    assert cards["cifar100"]["found"] is None
    (tmp_path / "cifar100" / "cifar-100-python").mkdir(parents=True)
    assert next(card for card in list_cards() if card["name"] == "cifar100")["found"] == str(tmp_path / "cifar100")

from pathlib import Path

import pytest
import yaml

from videogru.data.manifests.dataset_card import Card, load_card, read_card
from videogru.errors import ConfigError, DataError
from videogru.resources import card_names, resource_dir

FACTS = {
    "name": "toy",
    "title": "Toy",
    "kind": "image",
    "layout": "manifest",
    "license": "CC0",
    "citation": "none",
    "source": "https://example.org",
    "how_to_obtain": "draw it",
    "bundled": True,
}


def toy(folder: Path, labels: str = "a\nb\n", **changes: object) -> Path:
    place = folder / "toy"
    place.mkdir()
    (place / "dataset.yaml").write_text(yaml.safe_dump(FACTS | changes))
    (place / "labels.txt").write_text(labels)
    return place


@pytest.mark.parametrize("name", card_names())
def test_every_card_is_whole(name: str) -> None:
    card = load_card(name)
    assert card.name == name
    assert card.bundled or card.how_to_obtain.count("--data-dir") >= 1
    readme = (resource_dir("datasets") / name / "README.md").read_text()
    for heading in ("**Source.**", "**License.**"):
        assert heading in readme
    assert not list((resource_dir("datasets") / name).rglob("*.py"))


def test_the_cards_are_there() -> None:
    assert {name: len(load_card(name).classes) for name in card_names()} == {
        "adrenalmnist3d": 2,
        "cifar100": 100,
        "fracturemnist3d": 3,
        "grid_digits": 10,
        "kinetics400": 400,
        "nodulemnist3d": 2,
        "organmnist3d": 11,
        "synapsemnist3d": 2,
        "vesselmnist3d": 2,
    }


def test_kinetics_names_are_torchvisions() -> None:
    from torchvision.models import get_weight

    assert load_card("kinetics400").classes == tuple(get_weight("R3D_18_Weights.KINETICS400_V1").meta["categories"])


def test_bundled_files_have_the_published_checksums() -> None:
    for card in map(load_card, card_names()):
        for name in card.files:
            if card.bundled and (card.folder / name).exists():
                card.check_file(card.folder / name)
    assert (load_card("adrenalmnist3d").folder / "adrenalmnist3d.npz").exists()


def test_bundled_clips_stay_small() -> None:
    sizes = [path.stat().st_size for path in load_card("grid_digits").folder.rglob("*.mkv")]
    assert len(sizes) == 1000
    assert sum(sizes) < 2_000_000


def test_unknown_name_gets_the_nearest() -> None:
    with pytest.raises(ConfigError, match="Did you mean cifar100") as caught:
        load_card("cifar10")
    assert "kinetics400" in str(caught.value)


def test_a_card_cannot_be_reached_by_a_path() -> None:
    with pytest.raises(ConfigError):
        load_card("../datasets/cifar100")


def test_read_card_keeps_the_order_of_labels(tmp_path: Path) -> None:
    card = read_card(toy(tmp_path, "zebra\nant\n"))
    assert card.classes == ("zebra", "ant")
    assert card.home == tmp_path / "toy"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"kind": "smell"}, "kind"),
        ({"licence": "CC0"}, "Did you mean license"),
        ({"name": "tyo"}, "folder"),
        ({"files": {"x": {"bytes": 3}}}, "md5 or sha256"),
        ({"files": {"x": {"bytes": 3, "md5": "abc"}}}, "md5"),
        ({"classes": ["a", "b"]}, "labels.txt"),
    ],
)
def test_broken_cards_name_the_key(tmp_path: Path, changes: dict[str, object], words: str) -> None:
    with pytest.raises(DataError, match=words):
        read_card(toy(tmp_path, **changes))


@pytest.mark.parametrize(("labels", "line"), [("a\n\nb\n", 2), ("a\nb\na\n", 3), (" a\nb\n", 1)])
def test_bad_labels_name_the_line(tmp_path: Path, labels: str, line: int) -> None:
    with pytest.raises(DataError, match=rf"labels.txt:{line}:"):
        read_card(toy(tmp_path, labels))


def test_one_class_is_no_card(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="classes"):
        read_card(toy(tmp_path, "a\n"))


def test_no_yaml(tmp_path: Path) -> None:
    place = toy(tmp_path)
    (place / "dataset.yaml").write_text("a: [")
    with pytest.raises(DataError, match="YAML"):
        read_card(place)


def test_check_file_sees_size_and_content(tmp_path: Path) -> None:
    # md5sum of "abc"
    files = {"x.bin": {"bytes": 3, "md5": "900150983cd24fb0d6963f7d28e17f72"}}
    card: Card = read_card(toy(tmp_path, files=files))
    path = tmp_path / "x.bin"
    with pytest.raises(DataError, match="cannot be read"):
        card.check_file(path)
    path.write_bytes(b"abc")
    card.check_file(path)
    path.write_bytes(b"abd")
    with pytest.raises(DataError, match="checksum"):
        card.check_file(path)
    path.write_bytes(b"ab")
    with pytest.raises(DataError, match="2 bytes"):
        card.check_file(path)
    card.check_file(tmp_path / "unlisted.bin")

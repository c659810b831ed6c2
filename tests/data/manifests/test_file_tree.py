import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from videogru.data.manifests.columns import Text
from videogru.data.manifests.file_tree import Tree, absent, first_of_each_suffix, places_of
from videogru.data.manifests.manifest import build_manifest, missing_rows
from videogru.data.readers.file_types import kind_of_name


def test_places_are_what_rpartition_says() -> None:
    sources = ["a/b.mp4", "c.mp4", "a/d.mp4", "a//e", "/f", "x/y/z.tar", "", "a/\udc80", "y/"]
    places = places_of(Text.of(sources))
    assert [places.folders[int(code)] for code in places.codes] == [source.rpartition("/")[0] for source in sources]
    rows = {folder: rows.tolist() for folder, rows in places.by_folder()}
    assert rows == {"a": [0, 2, 7], "": [1, 4, 6], "a/": [3], "x/y": [5], "y": [8]}
    assert absent(Text.of(sources), np.array([0, 2, 7]), {"d.mp4", "\udc80"}).tolist() == [0]


def test_suffixes_are_found_by_their_first_row() -> None:
    names = ["a.mp4", "b.mp4", "c.MP4", "d.nii.gz", "e.x.nii.gz", "f.gz", "g/h.mkv", "i", "j.k/l", "m.GZ", "n.mp4"]
    first = first_of_each_suffix(Text.of(names))
    assert {kind_of_name(names[row]) for row in first} == {kind_of_name(name) for name in names}
    assert first == [0, 2, 3, 5, 6, 7, 8, 9]


def test_an_absent_tree_costs_a_look_at_what_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "1.mp4").touch()
    (tmp_path / "file").touch()
    sources = [f"absent/{row % 7}/{row}/x.mp4" for row in range(500)]
    sources += [f"there/{row}.mp4" for row in range(20)] + ["file/x.mp4", "./there/1.mp4", "there/./1.mp4", "1.mp4"]
    manifest = build_manifest(tmp_path, ("a", "b"), sources, [0] * len(sources))
    seen: Counter[str] = Counter()
    scan = os.scandir

    def scandir(place: Path) -> object:
        seen[str(place)] += 1
        return scan(place)

    monkeypatch.setattr(os, "scandir", scandir)
    monkeypatch.setattr(Path, "stat", None)
    missing = missing_rows(manifest)
    assert missing.tolist() == [row for row, source in enumerate(sources) if not os.path.exists(tmp_path / source)]
    assert sum(seen.values()) < 12


def test_links_that_lead_out_are_seen_from_the_listing(tmp_path: Path) -> None:
    root, outside = tmp_path / "root", tmp_path / "outside"
    (root / "real" / "deep").mkdir(parents=True)
    (outside / "deep").mkdir(parents=True)
    (root / "out").symlink_to(outside)
    (root / "in").symlink_to(root / "real")
    tree = Tree(root)
    assert [tree.leaves(folder) for folder in ("", "real/deep", "in/deep", "out", "out/deep", "none")] == [
        False,
        False,
        False,
        True,
        True,
        False,
    ]
    assert tree.listing("in/deep") is not None
    assert tree.listing("none") is None


def test_a_link_to_itself_is_listed(tmp_path: Path) -> None:
    """Python up to 3.12 raises where such a link is resolved."""
    (tmp_path / "a.nii").write_bytes(b"x")
    (tmp_path / "again.nii").symlink_to("again.nii")
    found = Tree(tmp_path).listing("")
    assert found is not None
    assert found.names == {"a.nii", "again.nii"}

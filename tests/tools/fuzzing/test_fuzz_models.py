"""A seeded part of tools/fuzzing/fuzz_models.py, and that a finding can be wrong."""

from dataclasses import replace
from pathlib import Path

import pytest

COUNT = 120


@pytest.fixture
def fuzz(monkeypatch: pytest.MonkeyPatch):
    from tools.fuzzing import fuzz_models

    return fuzz_models


def test_damage_is_refused_or_verified(fuzz, tmp_path: Path) -> None:
    attempt = fuzz.Attempt(fuzz.make_bases(tmp_path, []), COUNT, 7)
    findings = [attempt(number) for number in range(COUNT)]
    assert [finding for finding in findings if fuzz.wrong(finding)] == []
    assert {finding.outcome for finding in findings} >= {"refused", "verified", "not verified"}
    assert {finding.mutation for finding in findings} == {*fuzz.MUTATIONS, "pickle"}


def test_files_are_functions_of_seed_and_number(fuzz, tmp_path: Path) -> None:
    bases = fuzz.make_bases(tmp_path, [])
    one, same, other = (fuzz.Attempt(bases, 60, seed) for seed in (0, 0, 1))
    contents = [[attempt.content(number, tmp_path) for number in range(60)] for attempt in (one, same, other)]
    assert contents[0] == contents[1] and contents[0] != contents[2]


def test_what_is_wrong(fuzz) -> None:
    fine = fuzz.Finding(0, "a", "card", "refused", "because", 0.1, 3.0)
    assert not fuzz.wrong(fine)
    for change in (
        {"outcome": "died"},
        {"outcome": "crashed"},
        {"outcome": "ran a pickle"},
        {"reason": ""},
        {"seconds": 99.0},
        {"peak_mib": 4e3},
    ):
        assert fuzz.wrong(replace(fine, **change))


def test_the_pickle_would_run(fuzz, tmp_path: Path) -> None:
    """Else that it did not says nothing."""
    import pickle

    pickle.loads(pickle.dumps(fuzz._Runs(str(tmp_path / fuzz.MARKER))))
    assert (tmp_path / fuzz.MARKER).exists()


def test_the_tool_writes_its_page(fuzz, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--count", "8", "--workers", "1", "--work", str(tmp_path / "work"), "--out", str(tmp_path / "out")]
    assert fuzz.main(words) == 0
    assert "8 files. refused:" in capsys.readouterr().out
    assert "| damage | refused | verified |" in (tmp_path / "out" / "fuzz-models.md").read_text()
    assert fuzz.main(words) == 0  # read back

"""A seeded part of tools/fuzzing/fuzz_volumes.py, and that its comparison can fail."""

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

COUNT = 150


@pytest.fixture
def fuzz(monkeypatch: pytest.MonkeyPatch):
    from tools.fuzzing import fuzz_volumes

    return fuzz_volumes


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """A folder with one scan of each container, where the shared ones are absent."""
    from nibabel.freesurfer import MGHImage

    folder = tmp_path / "volumes" / "nibabel"
    folder.mkdir(parents=True)
    array = np.random.default_rng(0).integers(-300, 3000, (6, 7, 5)).astype(np.int16)
    nib.save(nib.Nifti1Image(array, np.diag([-1.0, 2, 3, 1])), folder / "anatomical.nii")
    nib.save(nib.Nifti1Image(array.astype(np.float32), np.eye(4)), folder / "standard.nii.gz")
    nib.save(nib.Nifti2Image(array, np.eye(4)), folder / "example_nifti2.nii.gz")
    nib.save(MGHImage(array.astype(np.int16), np.eye(4)), folder / "test.mgz")
    return tmp_path


@pytest.mark.parametrize("real", [False, True])
def test_no_damage_gives_other_voxels(fuzz, made: Path, real: bool, request: pytest.FixtureRequest) -> None:
    volumes = (request.getfixturevalue("shared_data") if real else made) / "volumes"
    bases = fuzz.collect_bases(volumes)
    assert len(bases) == (15 if real else 4)
    attempt = fuzz.Attempt(bases, COUNT, 1)
    findings = [attempt(number) for number in range(COUNT)]
    assert [finding for finding in findings if fuzz.wrong(finding)] == []
    assert {finding.outcome for finding in findings} == {"voxels", "refused"}
    assert {finding.mutation for finding in findings} == set(fuzz.MUTATIONS)


def test_files_are_functions_of_seed_and_number(fuzz, made: Path, tmp_path: Path) -> None:
    bases = fuzz.collect_bases(made / "volumes")
    one, other = (fuzz.Attempt(bases, 40, seed) for seed in (0, 1))
    for number in range(40):
        contents = []
        for place, attempt in enumerate((one, one, other)):
            folder = tmp_path / f"{number}-{place}"
            folder.mkdir()
            contents.append(attempt.write(number, folder).read_bytes())
        assert contents[0] == contents[1]
    assert contents[0] != contents[2]


def test_other_voxels_are_seen(fuzz, made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = made / "volumes" / "nibabel" / "anatomical.nii"
    read = fuzz.Volume.read

    def finding():
        return fuzz.Attempt({}, 0, 0, [path])(0)

    assert finding().match == "same"
    monkeypatch.setattr(fuzz.Volume, "read", lambda self, indices: read(self, indices).flip(-1))
    assert finding().match == "differs: voxels"
    assert fuzz.wrong(finding())
    monkeypatch.setattr(fuzz.Volume, "read", lambda self, indices: read(self, indices)[:, :, :-1])
    assert finding().match == "differs: shape"


def test_a_flipped_bit_that_is_not_refused_is_seen(fuzz, made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import gzip as plain
    import io

    from videogru.data.readers.volume import nifti as volume_nifti

    class Blind:
        """Gunzips without looking at the checksum."""

        @staticmethod
        def open(path):
            import zlib

            return io.BufferedReader(io.BytesIO(zlib.decompressobj(31).decompress(fixed(Path(path).read_bytes()))))

    def fixed(stream: bytes) -> bytes:
        import zlib

        content = zlib.decompressobj(-15).decompress(stream[10:])
        return plain.compress(content)

    monkeypatch.setattr(volume_nifti, "igzip", Blind)
    attempt = fuzz.Attempt(fuzz.collect_bases(made / "volumes"), 400, 0)
    numbers = [number for number, (_, kind) in enumerate(attempt.planned) if kind == "gzip-body"]
    matches = {attempt(number).match for number in numbers}
    assert "other voxels than the sound file" in matches


def test_the_tool_writes_its_page_and_goes_on(fuzz, made: Path, tmp_path: Path, capsys) -> None:
    (made / "hostile" / "nifti").mkdir(parents=True)
    (made / "hostile" / "nifti" / "empty.nii").touch()
    words = ["--shared", str(made), "--count", "20", "--workers", "1", "--work", str(tmp_path / "work")]
    for _ in range(2):
        assert fuzz.main([*words, "--out", str(tmp_path / "out")]) == 0
    assert len((tmp_path / "work" / "findings.jsonl").read_text().splitlines()) == 21
    assert "Wrong: 0." in (tmp_path / "out" / "fuzz.md").read_text()
    assert fuzz.main(["--shared", str(tmp_path / "none"), "--out", str(tmp_path)]) == 2
    assert "holds no small scan" in capsys.readouterr().err

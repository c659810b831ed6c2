"""Stills: every Pillow mode, orientation tags, and files that are refused."""

import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from videogru.data.readers.image import open_image
from videogru.errors import SourceError

RGB = np.random.default_rng(0).integers(0, 256, (6, 8, 3)).astype(np.uint8)


def read(path: Path) -> np.ndarray:
    """(H W 3)"""
    with open_image(path) as source:
        assert source.positions.tolist() == [0.0]
        assert (source.unit, source.extent) == ("index", (0.0, 1.0))
        clip = source.read([0])
    assert clip.shape[:2] == (1, 3)
    return clip[0].permute(1, 2, 0).numpy()


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tif"])
def test_rgb_comes_as_it_is(tmp_path: Path, suffix: str) -> None:
    Image.fromarray(RGB).save(tmp_path / f"a{suffix}")
    assert np.array_equal(read(tmp_path / f"a{suffix}"), RGB)


@pytest.mark.parametrize("suffix", [".jpg", ".webp"])
def test_lossy_formats_against_pillow(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    Image.fromarray(RGB).save(path)
    with Image.open(path) as image:
        assert np.array_equal(read(path), np.asarray(image.convert("RGB")))


def test_gray_bilevel_palette_and_cmyk(tmp_path: Path) -> None:
    gray = RGB[..., 0]
    Image.fromarray(gray).save(tmp_path / "l.png")
    assert np.array_equal(read(tmp_path / "l.png"), np.stack([gray] * 3, -1))
    Image.fromarray(gray > 127).save(tmp_path / "1.png")
    assert np.array_equal(read(tmp_path / "1.png")[..., 0], np.where(gray > 127, 255, 0))
    palette = Image.fromarray(RGB).quantize(16)
    palette.save(tmp_path / "p.png")
    assert np.array_equal(read(tmp_path / "p.png"), np.asarray(palette.convert("RGB")))
    cmyk = Image.fromarray(RGB).convert("CMYK")
    cmyk.save(tmp_path / "c.tif")
    assert np.array_equal(read(tmp_path / "c.tif"), np.asarray(cmyk.convert("RGB")))


def test_transparent_pixels_lie_on_white(tmp_path: Path) -> None:
    alpha = np.zeros(RGB.shape[:2], np.uint8)
    alpha[:3] = 255
    truth = RGB.copy()
    truth[3:] = 255
    Image.fromarray(np.dstack([RGB, alpha])).save(tmp_path / "rgba.png")
    assert np.array_equal(read(tmp_path / "rgba.png"), truth)
    Image.fromarray(np.dstack([RGB[..., 0], alpha])).save(tmp_path / "la.png")
    assert np.array_equal(read(tmp_path / "la.png")[..., 1], truth[..., 0])
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((1, 0), 1)
    palette.save(tmp_path / "p.png", transparency=1)
    assert read(tmp_path / "p.png").tolist() == [[[10, 20, 30], [255, 255, 255]]]


def test_sixteen_bits_keep_their_full_range(tmp_path: Path) -> None:
    values = np.array([[0, 257, 65535, 32768, 1000]], np.uint16)
    for name in ("a.png", "a.tif"):
        Image.fromarray(values).save(tmp_path / name)
        assert read(tmp_path / name)[..., 2].tolist() == [[0, 1, 255, 128, 4]]


def tiff(path: Path, values: np.ndarray, *, bits: int, photometric: int) -> None:
    """One uncompressed strip of gray, packed by hand (TIFF 6.0, sections 2, 3 and 9)."""
    height, width = values.shape
    places = np.arange(bits - 1, -1, -1)
    packed = np.packbits((values[..., None] >> places & 1).astype(np.uint8).reshape(height, -1), axis=1)
    strip = (packed if bits % 8 else values.astype("<u2")).tobytes()  # whole bytes come in the file's byte order
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: photometric, 273: 8, 277: 1, 278: height, 279: len(strip)}
    entries = b"".join(struct.pack("<HHIHH", tag, 3, 1, value, 0) for tag, value in tags.items())
    directory = struct.pack("<H", len(tags)) + entries + bytes(4)
    path.write_bytes(b"II*\0" + struct.pack("<I", 8 + len(strip)) + strip + directory)


@pytest.mark.parametrize(
    ("bits", "photometric", "truth"),
    [(12, 1, [0, 255, 85, 51]), (16, 1, [0, 255, 85, 51]), (16, 0, [255, 0, 170, 204])],
)
def test_tiffs_of_other_depths_and_with_white_at_zero(
    tmp_path: Path, bits: int, photometric: int, truth: list[int]
) -> None:
    largest = 2**bits - 1
    tiff(tmp_path / "a.tif", np.array([[0, largest, largest // 3, largest // 5]]), bits=bits, photometric=photometric)
    assert read(tmp_path / "a.tif")[0, :, 0].tolist() == truth


def test_the_transparent_gray_of_sixteen_bits_is_white(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, 257, 258, 65535]], np.uint16)).save(tmp_path / "a.png", transparency=257)
    assert read(tmp_path / "a.png")[..., 0].tolist() == [[0, 255, 1, 255]]


def test_damaged_tags_do_not_warn(tmp_path: Path) -> None:
    Image.fromarray(RGB).save(tmp_path / "a.jpg", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x02\x01\x12\0\x03")
    assert read(tmp_path / "a.jpg").shape == RGB.shape


@pytest.mark.parametrize("tag", range(1, 9))
def test_orientation_tags(tmp_path: Path, tag: int) -> None:
    # Exif 2.3, 4.6.4: where row 0 and column 0 of the stored image lie.
    shown = {
        1: RGB,
        2: RGB[:, ::-1],
        3: RGB[::-1, ::-1],
        4: RGB[::-1],
        5: RGB.transpose(1, 0, 2),
        6: np.rot90(RGB, -1),
        7: RGB[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(RGB, 1),
    }
    exif = Image.Exif()
    exif[0x0112] = tag
    Image.fromarray(RGB).save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(read(tmp_path / "a.png"), shown[tag])
    # Raw pixels of one channel, which Pillow maps into memory where it is given a name.
    Image.fromarray(RGB[..., 0].copy()).save(tmp_path / "a.tif", exif=exif)
    assert np.array_equal(read(tmp_path / "a.tif")[..., 0], shown[tag][..., 0])


def test_more_than_one_image_is_refused(tmp_path: Path) -> None:
    pages = [Image.fromarray(RGB), Image.fromarray(RGB[::-1].copy())]
    for name in ("a.tif", "a.png", "a.webp"):
        pages[0].save(tmp_path / name, save_all=True, append_images=pages[1:])
        with pytest.raises(SourceError, match="holds several images"):
            open_image(tmp_path / name)


@pytest.mark.parametrize("mode", ["I", "F"])
def test_pixels_of_unknown_range_are_refused(tmp_path: Path, mode: str) -> None:
    Image.new(mode, (4, 4)).save(tmp_path / "a.tif")
    with pytest.raises(SourceError, match="32-bit"):
        open_image(tmp_path / "a.tif")


@pytest.mark.parametrize("pixels", [30, 15])
def test_decompression_bombs_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pixels: int) -> None:
    Image.fromarray(RGB).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", pixels)  # 48 pixels: a warning above 30, an error above 2 * 15
    with pytest.raises(SourceError, match="larger than"):
        open_image(tmp_path / "a.png")


def test_damaged_and_foreign_files_are_errors(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    for name in ("a.png", "a.jpg", "a.tif", "a.webp", "a.bmp"):
        path = tmp_path / name
        Image.fromarray(noise).save(path)
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])
        with pytest.raises(SourceError, match="cannot be read as an image"):
            open_image(path)
    Image.fromarray(noise).save(tmp_path / "b.ppm")
    (tmp_path / "b.ppm").rename(tmp_path / "b.png")
    with pytest.raises(SourceError, match="cannot be read as an image"):
        open_image(tmp_path / "b.png")


def test_only_step_zero_and_nothing_after_close(tmp_path: Path) -> None:
    Image.fromarray(RGB).save(tmp_path / "a.png")
    source = open_image(tmp_path / "a.png")
    with pytest.raises(ValueError, match="step 0 only"):
        source.read([1])
    source.close()
    source.close()
    with pytest.raises(ValueError, match="closed"):
        source.read([0])

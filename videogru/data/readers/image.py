"""Still images by Pillow: a sequence of one frame, whose rows or cells become steps later."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps

from videogru.errors import SourceError
from videogru.kinds import Kind, Unit

# No other of Pillow's readers (PostScript, ...) gets to see a user's file.
FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP")
_WHITE_IS_ZERO = 0  # TIFF 6.0, section 3, PhotometricInterpretation


class StillImage:
    """A `FrameSource` with the one frame of an image as uint8 RGB (1 3 H W), turned upright by its EXIF tag.

    Transparent pixels lie on white. Gray of more than 8 bits keeps its full range: 0..65535 (of a 12-bit TIFF 0..4095)
    becomes 0..255.
    """

    kind: Kind = "image"
    unit: Unit = "index"

    def __init__(self, path: Path) -> None:
        """Decode. Raises SourceError where it is no single image of a known form, is damaged, or is too large."""
        self.path = path
        self.positions: NDArray[np.float64] = np.zeros(1)
        self.extent = (0.0, 1.0)
        self.pixel_aspect = 1.0
        self.details: dict[str, object] = {}
        try:
            # A named file of raw TIFF pixels would be mapped into memory, with rows as wide as it is after turning.
            with warnings.catch_warnings(), path.open("rb") as file:
                warnings.simplefilter("ignore", UserWarning)  # of tags that are damaged while the pixels are not
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                with Image.open(file, formats=FORMATS) as image:
                    self._check(image)
                    self.details = {"format": image.format, "mode": image.mode}
                    ImageOps.exif_transpose(image, in_place=True)
                    pixels = np.array(_to_rgb(image))
        except SourceError:
            raise
        except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
            raise SourceError(
                f"is larger than {Image.MAX_IMAGE_PIXELS} pixels", where=path, hint="Make it smaller first."
            ) from error
        # Pillow raises OSError, SyntaxError, ValueError, struct.error, ... on damaged files.
        except Exception as error:
            raise SourceError(
                f"cannot be read as an image ({type(error).__name__}: {error})",
                where=path,
                hint="Readable are: " + ", ".join(FORMATS),
            ) from error
        self._frame: torch.Tensor | None = torch.from_numpy(pixels).permute(2, 0, 1).contiguous().unsqueeze(0)
        self.details |= {"width": pixels.shape[1], "height": pixels.shape[0]}

    def read(self, indices: Sequence[int]) -> torch.Tensor:
        """The frame as uint8 (1 3 H W); `indices` can only be [0]."""
        if [int(index) for index in indices] != [0]:
            raise ValueError(f"an image has step 0 only, not {list(indices)}")
        if self._frame is None:
            raise ValueError(f"{self.path} is closed")
        return self._frame

    def close(self) -> None:
        """Let go of the pixels; may be called twice."""
        self._frame = None

    def __enter__(self) -> "StillImage":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _check(self, image: Image.Image) -> None:
        # Not n_frames: it walks through all pages. The further pictures of an MPO (.jpg of phones) are previews.
        if getattr(image, "is_animated", False) and image.format != "MPO":
            raise SourceError(
                "holds several images, not one", where=self.path, hint="Save the pages apart, or make it a video."
            )
        if image.mode in ("I", "F"):
            raise SourceError(
                f"has signed or 32-bit pixels (mode {image.mode}), whose range is unknown",
                where=self.path,
                hint="Save it with 8 or 16 unsigned bits, or as NIfTI.",
            )


def open_image(path: Path) -> StillImage:
    """A still image as a source of one frame. Raises SourceError, see `StillImage`."""
    return StillImage(path)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        return Image.fromarray(_to_eight_bits(image)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _to_eight_bits(image: Image.Image) -> NDArray[np.uint8]:
    """Gray of up to 16 bits (H W), scaled by what Pillow leaves to us: a TIFF's depth and polarity, a PNG's tRNS."""
    values = np.asarray(image)
    tags = getattr(image, "tag_v2", {})
    bits = tags.get(ExifTags.Base.BitsPerSample, (16,))[0]
    gray: NDArray[np.uint8] = np.rint(values.astype(np.float32) * (255 / (2**bits - 1))).astype(np.uint8)
    if tags.get(ExifTags.Base.PhotometricInterpretation) == _WHITE_IS_ZERO:
        gray = 255 - gray
    if "transparency" in image.info:
        gray[values == image.info["transparency"]] = 255
    return gray

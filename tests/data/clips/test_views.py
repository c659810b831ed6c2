"""Several views of a source against views made one by one."""

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.data.readers.video.test_video import make_video
from videogru.checkpoint.model_file import make_card
from videogru.config import DataConfig, ModelConfig
from videogru.data.clips.read_clip import read_clips
from videogru.data.clips.transforms import fit_frames, prepare_clip
from videogru.data.clips.views import check_views, crop_places, parse_views
from videogru.data.readers.open import open_source
from videogru.errors import ConfigError
from videogru.inference.predictor import Predictor
from videogru.models.classifier import Classifier


def test_views_are_clips_times_crops() -> None:
    assert parse_views("10x3") == (10, 3)
    assert parse_views(" 1X1 ") == (1, 1)


@pytest.mark.parametrize("text", ["", "10", "x3", "0x3", "3x0", "-1x3", "1.5x2", "10x3x2", "999x999", "ten x 3"])
def test_what_is_no_number_of_views(text: str) -> None:
    with pytest.raises(ConfigError, match="CLIPSxCROPS"):
        parse_views(text)


@pytest.mark.parametrize(
    ("views", "kind", "settings"),
    [((2, 1), "image", {}), ((2, 1), "video", {"sampling": "all"}), ((1, 3), "video", {"fit": "pad"})],
)
def test_views_that_would_be_the_same_are_refused(views, kind: str, settings: dict[str, str]) -> None:
    data = DataConfig(**settings).for_kind(kind)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="cannot differ"):
        check_views(views, data, kind)  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [(8, 20), (20, 8)])
def test_crops_lie_along_the_longer_side(shape: tuple[int, int]) -> None:
    frames = torch.arange(shape[0] * shape[1], dtype=torch.uint8).view(1, 1, *shape)
    starts = []
    for place in crop_places(3):
        crop = fit_frames(frames, size=8, fit="crop", place=place)
        assert crop.shape == (1, 1, 8, 8)
        corner = int(crop[0, 0, 0, 0])
        starts.append(corner if shape[0] == 8 else corner // 8)
    assert starts == [0, 6, 12]
    assert torch.equal(fit_frames(frames, size=8, fit="crop"), fit_frames(frames, size=8, fit="crop", place=0.5))


@pytest.mark.parametrize("sampling", ["random", "dense"])
def test_scores_are_the_mean_over_views_read_one_by_one(tmp_path: Path, sampling: str) -> None:
    paths = [make_video(tmp_path / f"{count}.mp4", range(0, count * 40, 40)) for count in (4, 30)]
    data = DataConfig(frame_size=16, num_frames=5, channels=1, sampling=sampling, stride_seconds=0.08)  # type: ignore[arg-type]
    data = data.for_kind("video")
    torch.manual_seed(0)
    model = ModelConfig(encoder_width=4, hidden_size=6)
    classifier = Classifier(model, in_channels=1, frame_size=16, num_classes=3, mean=(0.5,), std=(0.2,)).eval()
    card = make_card(classifier, kind="video", classes=("a", "b", "c"), data=data)
    predictor = Predictor(classifier, card, device="cpu")
    found = predictor.predict_paths([*paths, tmp_path / "absent.mp4"], views=(4, 3), num_workers=0)
    assert found.errors[:2].tolist() == ["", ""]
    assert "no such file" in found.errors[2]
    for path, mine in zip(paths, found.probabilities, strict=False):
        scores = []
        with open_source(path, data=data) as source:
            for clip in read_clips(source, data=data, num_clips=4):
                for place in (0.0, 0.5, 1.0):
                    frames = prepare_clip(clip, data=data, place=place).frames
                    with torch.inference_mode():
                        logits = classifier(frames[None], torch.tensor([len(frames)]))
                    scores.append(logits.softmax(dim=1)[0].numpy())
        assert len(scores) == 12
        assert np.abs(np.stack(scores) - scores[0]).max() > 1e-5
        np.testing.assert_allclose(mine, np.mean(scores, axis=0), atol=1e-5)
    one = predictor.predict_paths(paths, num_workers=0)
    assert np.abs(one.probabilities - found.probabilities[:2]).max() > 1e-6

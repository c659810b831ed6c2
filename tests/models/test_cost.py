import pytest
import torch

from videogru.config import ModelConfig
from videogru.models.cells.cells import EMBEDDING_SIZE
from videogru.models.classifier import Classifier
from videogru.models.cost import count_macs


def build(frame_size: int = 16, **settings: object) -> Classifier:
    return Classifier(
        ModelConfig.model_validate(settings),
        in_channels=3,
        frame_size=frame_size,
        num_classes=10,
        mean=(0.5,) * 3,
        std=(0.25,) * 3,
    )


# conv2 at 16 pixels: 3 -> 64 channels on 16x16, then 64 -> 128 on 8x8; maps are 4x4.
CONV2 = 16 * 16 * 64 * 3 * 9 + 8 * 8 * 128 * 64 * 9


@pytest.mark.parametrize(("cell", "gates"), [("gru", 3), ("lstm", 4)])
@pytest.mark.parametrize(("temporal", "directions"), [("causal", 1), ("bi", 2)])
@pytest.mark.parametrize(("seq", "steps", "size"), [("frames", 1, 128), ("rows", 4, 128 * 4), ("grid", 16, 128)])
def test_recurrent_layers_by_their_formula(
    cell: str, gates: int, temporal: str, directions: int, seq: str, steps: int, size: int
) -> None:
    model = build(encoder="conv2", seq=seq, cell=cell, temporal=temporal, hidden_size=12, num_layers=2)
    frames = 3
    first = directions * frames * steps * gates * 12 * (size + 12)
    second = directions * frames * steps * gates * 12 * (directions * 12 + 12)
    expected = {"encoder": frames * CONV2, "recurrent": first + second, "head": directions * 12 * 10}
    assert count_macs(model, frames) == {**expected, "total": sum(expected.values())}


def test_without_a_recurrent_part() -> None:
    assert count_macs(build(encoder="pixels", encoder_width=8, seq="rows", cell="none")) == {
        "encoder": 16 * 16 * 3 * 8,
        "recurrent": 0,
        "head": 16 * 8 * 10,
        "total": 16 * 16 * 3 * 8 + 16 * 8 * 10,
    }


def test_the_small_encoder() -> None:
    # A stem of 16 on 28x28; blocks of 8, 16, 32 channels on 14x14, 7x7, 4x4, each with a 1x1 shortcut.
    macs = 28 * 28 * 16 * 3 * 9
    before = 16
    for side, channels in ((14, 8), (7, 16), (4, 32)):
        macs += side * side * channels * (before * 9 + channels * 9 + before)
        before = channels
    counted = count_macs(build(28, encoder="small", encoder_width=8, cell="gru", temporal="causal", hidden_size=5))
    assert counted["encoder"] == macs
    assert counted["recurrent"] == 3 * 5 * (32 + 5)


def test_a_resnet18_with_its_stem_for_small_images() -> None:
    # He et al. 2016, table 1, at 32 pixels: two blocks of two 3x3 convolutions per stage, then 1x1 shortcuts.
    macs = 32 * 32 * 64 * 3 * 9 + 4 * 32 * 32 * 64 * 64 * 9
    for side, channels in ((16, 128), (8, 256), (4, 512)):
        macs += side * side * channels * (channels // 2 * 9 + 3 * channels * 9 + channels // 2)
    assert count_macs(build(32, encoder="resnet18", seq="grid", cell="none"))["encoder"] == macs


def test_cells_of_our_own() -> None:
    D, H, N, S = 128 * 4, 8, 6, 4
    small = {"encoder": "conv2", "seq": "rows", "temporal": "causal", "hidden_size": H, "hyper_size": N}
    assert count_macs(build(**small, cell="mingru"))["recurrent"] == S * 2 * H * D
    # The main and the small GRU read [x ; h], the small one its own state, and that gives nine vectors of H.
    hyper = S * ((3 * H + 3 * N) * (D + H) + 3 * N * N + 9 * H * N)
    # Once a clip the maps to the embeddings and from them are multiplied.
    once = 9 * H * EMBEDDING_SIZE * N + 6 * H * EMBEDDING_SIZE
    assert hyper <= count_macs(build(**small, cell="hypergru"))["recurrent"] <= hyper + once


def test_the_projection_of_a_residual_connection() -> None:
    small = {"encoder": "conv2", "seq": "rows", "cell": "gru", "hidden_size": 8, "num_layers": 2}
    plain, residual = (count_macs(build(**small, residual=on))["recurrent"] for on in (False, True))
    # The second layer is as wide as the first, and needs none.
    assert residual - plain == 4 * (128 * 4) * 16


def test_attention_is_a_part_of_its_own() -> None:
    plain = build(encoder="pixels", encoder_width=8, seq="rows", cell="gru")
    attending = build(encoder="pixels", encoder_width=8, seq="rows", cell="gru", local_attention=2)
    counted, without = count_macs(attending), count_macs(plain)
    assert counted.pop("attention") > 0
    assert counted["recurrent"] == without["recurrent"]
    assert counted["total"] > without["total"]


def test_the_model_stays_as_it_is() -> None:
    model = build(encoder="small", encoder_width=4).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert count_macs(model) == count_macs(model.eval())
    model.train()
    count_macs(model)
    assert model.training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_a_clip_has_a_frame() -> None:
    with pytest.raises(ValueError, match="at least one frame"):
        count_macs(build(encoder="conv2"), 0)

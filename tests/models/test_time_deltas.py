"""Gaps between steps: what a batch carries of them, and what the model does with them."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from videogru.config import AugmentConfig, DataConfig, ModelConfig
from videogru.data.clips.augment import drop_steps
from videogru.data.loading.batching import Item, collate
from videogru.models.classifier import Classifier
from videogru.models.time_deltas import GapEmbedding
from videogru.sequence import FrameSequence, SequenceBatch


def clip(positions: list[float]) -> FrameSequence:
    return FrameSequence(torch.rand(len(positions), 1, 16, 16), torch.tensor(positions, dtype=torch.float64), "mm")


def model(**settings) -> Classifier:
    torch.manual_seed(0)
    config = ModelConfig(**{"encoder_width": 8, "hidden_size": 6, "use_gaps": True, **settings})
    made = Classifier(config, in_channels=1, frame_size=16, num_classes=3, mean=(0.4,), std=(0.2,)).eval()
    if made.gap_embedding is not None:
        nn.init.normal_(made.gap_embedding.linear.weight)
        nn.init.normal_(made.gap_embedding.linear.bias)
    return made


def test_a_batch_carries_the_distances_between_positions():
    clips = [clip([0.0, 1.5, 5.5]), clip([2.0]), clip([0.0, 3.0])]
    batch = collate(0, [Item(row, 0, each) for row, each in enumerate(clips)]).batch
    assert batch is not None and batch.gaps is not None
    assert batch.gaps.tolist() == [[0, 1.5, 4], [0, 0, 0], [0, 3, 0]]
    assert batch.to("cpu").gaps is not None
    with pytest.raises((ValueError, TypeError), match="gaps"):  # jaxtyping sees it before
        SequenceBatch(batch.frames, batch.lengths, batch.indices, gaps=batch.gaps[:, :2])


def test_the_embedding_is_a_linear_map_of_the_logarithms():
    gaps, lengths = torch.tensor([[0, 2.0, 8.0, 5.0], [0, 3.0, 0, 0]]), torch.tensor([3, 2])
    for causal in (False, True):
        part = GapEmbedding(4, causal=causal)
        assert not part(gaps, lengths).any()  # at the start nothing is added
        nn.init.normal_(part.linear.weight)
        nn.init.normal_(part.linear.bias)
        # What lies behind the end of a clip (5.0) is padding.
        logs = [[(0, math.log(2)), (math.log(2), math.log(8)), (math.log(8), 0)], [(0, math.log(3)), (math.log(3), 0)]]
        for row, pairs in enumerate(logs):
            for step, pair in enumerate(pairs):
                known = torch.tensor(pair[:1] if causal else pair, dtype=torch.float32)
                expected = part.linear.weight @ known + part.linear.bias
                torch.testing.assert_close(part(gaps, lengths)[row, step], expected)


@pytest.mark.parametrize("seq", ["frames", "rows", "grid"])
@pytest.mark.parametrize("cell", ["gru", "none"])
def test_a_clip_alone_and_in_a_batch(seq, cell):
    net, lengths = model(seq=seq, cell=cell), torch.tensor([4, 1, 3])
    frames, gaps = torch.rand(3, 4, 1, 16, 16), torch.rand(3, 4) + 0.5
    with torch.no_grad():
        together = net(frames, lengths, gaps)
        for row, length in enumerate(lengths.tolist()):
            own = slice(row, row + 1)
            alone = net(frames[own, :length], lengths[own], gaps[own, :length])
            torch.testing.assert_close(together[own], alone, rtol=0, atol=1e-5)
        assert not torch.allclose(together[0], net(frames, lengths, 3 * gaps)[0], atol=1e-3)


def test_a_causal_model_does_not_know_the_next_gap():
    net, lengths = model(temporal="causal"), torch.tensor([4])
    frames, gaps = torch.rand(1, 4, 1, 16, 16), torch.ones(1, 4)
    later = gaps.clone()
    later[0, 3] = 9
    with torch.no_grad():
        one, other = (net.features(frames, lengths, each)[0] for each in (gaps, later))
    assert torch.equal(one[:, :3], other[:, :3])
    assert not torch.equal(one[:, 3], other[:, 3])


def test_without_gaps_such_a_model_refuses_and_another_does_not_care():
    frames, lengths = torch.rand(1, 4, 1, 16, 16), torch.tensor([4])
    with pytest.raises(ValueError, match="use_gaps"):
        model()(frames, lengths)
    plain = model(use_gaps=False)
    assert torch.equal(plain(frames, lengths), plain(frames, lengths, torch.rand(1, 4)))


def test_the_other_parts_start_with_the_same_values():
    torch.manual_seed(0)
    plain, reading = model(use_gaps=False).state_dict(), model().state_dict()
    assert all(torch.equal(tensor, reading[name]) for name, tensor in plain.items())


def test_dropped_steps_keep_their_places():
    whole = clip([float(place) for place in range(40)])
    kept = []
    for index in range(30):
        part = drop_steps(whole, largest=0.8, seed=0, epoch=1, index=index)
        again = drop_steps(whole, largest=0.8, seed=0, epoch=1, index=index)
        assert torch.equal(part.positions, again.positions)
        assert torch.equal(part.frames, whole.frames[part.positions.long()])
        kept.append(len(part))
    assert min(kept) < 20 and max(kept) > 30
    assert np.mean(kept) == pytest.approx(24, abs=5)  # a mean share of 0.4 is dropped
    one = clip([1.0])
    assert drop_steps(one, largest=0.9, seed=0, epoch=0, index=0) is one
    assert drop_steps(whole, largest=0.0, seed=0, epoch=0, index=0) is whole
    assert all(len(drop_steps(clip([0.0, 1.0]), largest=0.99, seed=0, epoch=0, index=i)) >= 1 for i in range(50))


def test_training_clips_lose_steps_and_evaluated_ones_do_not():
    from tests.data.loading.test_clip_dataset import corpus
    from videogru.data.loading.clip_dataset import ClipDataset

    volumes = corpus("volume", np.random.default_rng(0).integers(0, 256, (5, 12, 1, 8, 8), dtype=np.uint8))
    augment = AugmentConfig(drop_steps=0.8)
    data = DataConfig(frame_size=8, num_frames=12, intensity="window", augment=augment).for_kind("volume")
    keys = [(0, row) for row in range(5)]
    trained = ClipDataset(volumes, data=data, training=True).__getitems__(keys).batch
    judged = ClipDataset(volumes, data=data).__getitems__(keys).batch
    assert trained is not None and judged is not None and trained.gaps is not None
    assert judged.lengths.tolist() == [12] * 5
    assert trained.lengths.min() < 12
    assert float(trained.gaps.max()) >= 2

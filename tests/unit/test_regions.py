"""Several people in one clip: whose place a cell is, and whose face reaches it."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from animator.config import tiny
from animator.id_adapter import align_and_add, statistics
from animator.model import Animator
from inference.regions import person_regions

FRAMES, HEIGHT, WIDTH = 2, 16, 16


def standing(x: float) -> np.ndarray:
    """A stick person of 18 joints whose middle is at `x`, `(18, 2)`."""
    right, left = x - 0.06, x + 0.06
    joints = [(x, 0.2), (x, 0.35), (right, 0.35), (right, 0.5), (right, 0.6), (left, 0.35)]
    joints += [(left, 0.5), (left, 0.6), (right, 0.6), (right, 0.75), (right, 0.9)]
    joints += [(left, 0.6), (left, 0.75), (left, 0.9)]
    joints += [(x - 0.02, 0.18), (x + 0.02, 0.18), (x - 0.04, 0.19), (x + 0.04, 0.19)]
    return np.array(joints, np.float32)


def two_people() -> tuple[np.ndarray, np.ndarray]:
    points = np.stack([standing(0.25), standing(0.75)])
    return np.repeat(points[None], FRAMES, 0), np.ones((FRAMES, 2, 18), np.float32)


def test_cells_belong_to_the_nearest_person() -> None:
    regions = person_regions(*two_people(), (HEIGHT, WIDTH), 0.3)
    assert regions.shape == (FRAMES, HEIGHT, WIDTH)
    assert (regions[:, :, : WIDTH // 2] == 0).all()
    assert (regions[:, :, WIDTH // 2 :] == 1).all()


def test_people_that_cross_take_their_regions_along() -> None:
    points, score = two_people()
    points[1] = points[1, ::-1]
    regions = person_regions(points, score, (HEIGHT, WIDTH), 0.3)
    assert torch.equal(regions[1], 1 - regions[0])


def test_who_is_not_seen_has_no_place() -> None:
    points, score = two_people()
    score[1, 1] = 0
    points[1, 1] = np.nan
    regions = person_regions(points, score, (HEIGHT, WIDTH), 0.3)
    assert (regions[0] == 1).any()
    assert (regions[1] == 0).all()
    assert (person_regions(points, 0 * score, (HEIGHT, WIDTH), 0.3) == 0).all()


def test_a_long_clip_is_the_sum_of_its_frames() -> None:
    points, score = (np.concatenate([part] * 20) for part in two_people())
    points = points + np.linspace(0, 0.2, len(points), dtype=np.float32)[:, None, None, None]
    whole = person_regions(points, score, (8, 8), 0.3)
    alone = [person_regions(points[[t]], score[[t]], (8, 8), 0.3) for t in range(len(points))]
    assert torch.equal(whole, torch.cat(alone))


def test_statistics_of_regions_are_those_of_each_alone() -> None:
    torch.manual_seed(0)
    face, owner = torch.randn(3, 10, 6) * 3 + 1, torch.arange(10) // 6
    owners = (owner[:, None] == torch.arange(2)).expand(3, -1, -1)
    mean, deviation = statistics(face, owners=owners)
    for person in range(2):
        alone_mean, alone_deviation = statistics(face[:, owner == person])
        torch.testing.assert_close(
            mean[:, owner == person], alone_mean.expand(-1, 6 - 2 * person, 1)
        )
        torch.testing.assert_close(
            deviation[:, owner == person], alone_deviation.expand(-1, 6 - 2 * person, 1)
        )
    one = torch.ones(3, 10, 1, dtype=torch.bool)
    image = torch.randn(3, 1, 6)
    torch.testing.assert_close(align_and_add(face, image, one), align_and_add(face, image))
    assert align_and_add(face, torch.zeros(3, 1, 6), owners).isfinite().all()


@pytest.fixture
def model() -> Animator:
    torch.manual_seed(0)
    small = replace(tiny(), block_out_channels=(32, 64), num_attention_heads=(1, 2))
    model = Animator(small).eval()
    for parameter in model.parameters():  # zero-initialised layers would hide every face
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.05)
    return model


def call(model: Animator, embeddings: torch.Tensor, regions: torch.Tensor | None) -> torch.Tensor:
    draw = torch.Generator().manual_seed(1)
    config = model.config
    shape = (1, FRAMES, 2 * config.latent_channels, HEIGHT, WIDTH)
    token = torch.randn(1, 1, config.cross_attention_dim, generator=draw)
    with torch.no_grad():
        context = model.context_of_people(token, embeddings)
        sample = torch.randn(shape, generator=draw)
        time_ids = torch.tensor([[6.0, 127.0, 0.02]])
        return model.denoise(sample, torch.zeros(1), context, None, time_ids, regions)


def faces(model: Animator, count: int) -> torch.Tensor:
    draw = torch.Generator().manual_seed(2)
    return torch.randn(count, model.config.face_embedding_dim, generator=draw)


def test_one_person_everywhere_is_the_plain_call(model: Animator) -> None:
    one = faces(model, 1)
    plain = call(model, one, None)
    everywhere = torch.zeros(FRAMES, HEIGHT, WIDTH, dtype=torch.long)
    torch.testing.assert_close(call(model, one, everywhere), plain)
    torch.testing.assert_close(call(model, faces(model, 2)[[0, 1]], everywhere), plain)


def test_a_face_acts_in_its_own_region_first(model: Animator) -> None:
    regions = person_regions(*two_people(), (HEIGHT, WIDTH), 0.3)
    both = faces(model, 3)
    before, after = call(model, both[[0, 1]], regions), call(model, both[[0, 2]], regions)
    change = (after - before).abs().mean((0, 1, 2))
    mine, others = change[regions[0] == 1].mean(), change[regions[0] == 0].mean()
    assert mine > others  # convolutions carry the rest: with random weights, nearly all of it


def test_adapters_keep_a_face_out_of_other_regions(model: Animator) -> None:
    adapter = next(m for n, m in model.unet.named_modules() if n.endswith("attn2.processor"))
    attention = next(m for m in model.unet.modules() if getattr(m, "processor", None) is adapter)
    channels, width = attention.to_q.in_features, model.config.cross_attention_dim
    hidden = torch.randn(FRAMES, HEIGHT * WIDTH, channels)
    context = torch.randn(FRAMES, 1 + 2 * model.config.num_face_tokens, width)
    other = context.clone()
    other[:, 1 + model.config.num_face_tokens :] = torch.randn_like(other[:, 5:])
    adapter.regions = person_regions(*two_people(), (HEIGHT, WIDTH), 0.3)
    with torch.no_grad():
        before, after = (attention(hidden, c) for c in (context, other))
    theirs = adapter.regions.flatten(1) == 0
    assert torch.equal(before[theirs], after[theirs])
    assert not torch.allclose(before[~theirs], after[~theirs])


def test_what_does_not_fit_is_refused(model: Animator) -> None:
    with pytest.raises(ValueError, match="with regions for several"):
        call(model, faces(model, 2), None)
    with pytest.raises(ValueError, match="at most 1"):
        call(model, faces(model, 1), torch.ones(FRAMES, HEIGHT, WIDTH, dtype=torch.long))
    with pytest.raises(ValueError, match="expected \\(2, 16, 16\\)"):
        call(model, faces(model, 2), torch.zeros(FRAMES, 4, 4, dtype=torch.long))

"""The alignment block: starts at the closed form, masks what is missing, learns."""

import pytest
import torch

from animator.alignment import AlignmentBlock
from animator.config import AlignmentConfig
from animator.losses import alignment_loss
from animator.similarity import Similarity, apply, compose, fit, invert

SMALL = AlignmentConfig(width=32, num_heads=4, coordinates="frame")
PERSON = AlignmentConfig(width=32, num_heads=4, coordinates="person")


def pair(batch: int, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    reference = torch.randn(batch, 18, 2, generator=generator) * 0.2
    driven = torch.randn(batch, 18, 2, generator=generator) * 0.2
    return reference, driven, torch.ones(batch, 18)


def square(like: torch.Tensor) -> torch.Tensor:
    return torch.ones(len(like), 2)


@pytest.mark.parametrize("config", [SMALL, PERSON])
def test_untrained_block_is_the_closed_form(config):
    reference, driven, weight = pair(4)
    block = AlignmentBlock(config)
    estimate = block(reference, driven, weight, square(weight))
    for got, want in zip(estimate.transform, fit(driven, reference, weight), strict=True):
        torch.testing.assert_close(got, want)
    assert (estimate.votes == 0).all()


def test_only_a_person_s_place_in_the_frame_tells_equal_pairs_apart():
    reference, driven, weight = pair(3)
    weight[:, 5:9] = 0
    other = Similarity(
        torch.tensor([0.4, 1.0, 2.5]),
        torch.ones(3),
        torch.zeros(3),
        torch.tensor([[0.2, -0.1], [0.0, 0.3], [-0.4, 0.0]]),
    )
    moved = apply(other, reference), apply(other, driven)
    block = trained_block(PERSON)

    def same(frame: torch.Tensor) -> bool:
        here = block(reference, driven, weight, square(weight)).transform
        there = block(*moved, weight, frame).transform
        want = compose(compose(other, here), invert(other))
        return torch.allclose(apply(there, driven), apply(want, driven), atol=1e-4)

    assert not same(square(weight))
    torch.nn.init.zeros_(block.embed_context.weight)
    assert same(square(weight))  # nothing else depends on it
    # A person without extent has no size; the answer stays finite.
    points = torch.zeros(3, 18, 2)
    estimate = trained_block(PERSON)(points, points, weight, square(weight))
    assert all(field.isfinite().all() for field in (*estimate.transform, *estimate[1:]))


def test_the_shape_of_the_frame_counts():
    reference, driven, weight = pair(2)
    block = trained_block(PERSON)
    wide = torch.tensor([[9 / 16, 1.0]]).expand(2, 2)
    assert not torch.allclose(
        block(reference, driven, weight, wide).transform.shift,
        block(reference, driven, weight, wide.flip(1)).transform.shift,
    )


def trained_block(config: AlignmentConfig = SMALL) -> AlignmentBlock:
    torch.manual_seed(0)
    block = AlignmentBlock(config)
    for head in (block.head, block.vote_head, block.error_head):
        torch.nn.init.normal_(head[-1].weight, std=0.1)
    return block.eval()


def test_missing_joints_have_no_influence():
    reference, driven, weight = pair(2)
    weight[:, 9:] = 0
    block = trained_block()
    before = block(reference, driven, weight, square(weight))
    driven[:, 9:] = float("nan")
    reference[:, 9:] = 1e6
    after = block(reference, driven, weight, square(weight))
    for got, want in zip(
        (*after.transform, *after[1:]), (*before.transform, *before[1:]), strict=True
    ):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("config", [SMALL, PERSON])
@pytest.mark.parametrize("case", ["two seen", "one point", "reference in one point", "NaN"])
def test_degenerate_poses_get_the_closed_form_s_fallback_and_finite_gradients(case, config):
    reference, driven, weight = pair(2)
    if case == "two seen":
        weight[:, 2:] = 0
    elif case == "one point":
        driven = driven[:, :1].expand(-1, 18, -1).clone()
    elif case == "reference in one point":
        reference = reference[:, :1].expand(-1, 18, -1).clone()
    else:  # joints whose place is no number are missing ones, whatever their confidence
        driven[:, 2:] = float("nan")
        weight[:, 0] = float("inf")
    block = trained_block(config)
    driven.requires_grad_(True)
    estimate = block(reference, driven, weight, square(weight))
    shift = fit(driven, reference, weight).shift
    assert (estimate.transform.scale - 1).abs().max() < 1e-5
    assert estimate.transform.sin.abs().max() < 1e-5
    torch.testing.assert_close(estimate.transform.shift, shift)
    total = sum(part.sum() for part in (*estimate.transform, *estimate[1:]))
    total.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in block.parameters())
    assert driven.grad.isfinite().all()


def test_votes_and_expected_error_do_not_pull_at_each_other():
    reference, driven, weight = pair(4)
    block = trained_block(PERSON)
    block(reference, driven, weight, square(weight)).error.sum().backward()
    touched = {name for name, p in block.named_parameters() if p.grad is not None}
    assert all(name.startswith("error_head") for name in touched)
    assert touched


def test_nothing_in_common_gives_the_identity():
    reference, driven, weight = pair(1)
    got = trained_block()(reference, driven, weight * 0, square(weight)).transform
    assert (got.scale.item(), got.cos.item(), got.sin.item()) == (1, 1, 0)
    assert got.shift.abs().max() == 0


def test_scale_stays_positive_and_rotation_normalised_for_any_weights():
    reference, driven, weight = pair(64)
    block = trained_block()
    torch.nn.init.normal_(block.head[-1].weight, std=10)
    got = block(reference, driven, weight, square(weight)).transform
    assert (got.scale > 0).all()
    torch.testing.assert_close(got.cos**2 + got.sin**2, torch.ones(64), atol=1e-4, rtol=0)


def test_block_learns_what_the_closed_form_cannot_know():
    # The true transform moves poses by a constant on top of what aligns the joints.
    torch.manual_seed(0)
    block = AlignmentBlock(SMALL)
    optimiser = torch.optim.Adam(block.parameters(), lr=3e-3)
    offset = torch.tensor([0.3, -0.2])
    for step in range(60):
        reference, driven, weight = pair(32, seed=step)
        target = apply(fit(driven, reference, weight), driven) + offset
        aligned = apply(block(reference, driven, weight, square(weight)).transform, driven)
        loss = alignment_loss(aligned, target, weight)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert loss.item() < 0.1 * offset.norm().item()


def test_alignment_loss_has_a_gradient_where_a_joint_lies_right():
    points = torch.zeros(1, 18, 2, requires_grad=True)
    alignment_loss(points, torch.zeros(1, 18, 2), torch.ones(1, 18)).backward()
    assert torch.isfinite(points.grad).all()

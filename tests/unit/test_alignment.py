"""The alignment block: starts at the closed form, masks what is missing, learns."""

import pytest
import torch

from animator.alignment import AlignmentBlock
from animator.config import AlignmentConfig
from animator.losses import alignment_loss
from animator.similarity import Similarity, apply, compose, fit, invert

SMALL = AlignmentConfig(width=32, num_heads=4)
PERSON = AlignmentConfig(width=32, num_heads=4, coordinates="person")


def pair(batch: int, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    reference = torch.randn(batch, 18, 2, generator=generator) * 0.2
    driven = torch.randn(batch, 18, 2, generator=generator) * 0.2
    return reference, driven, torch.ones(batch, 18)


@pytest.mark.parametrize("config", [SMALL, PERSON])
def test_untrained_block_is_the_closed_form(config):
    reference, driven, weight = pair(4)
    block = AlignmentBlock(config)
    for got, want in zip(
        block(reference, driven, weight), fit(driven, reference, weight), strict=True
    ):
        torch.testing.assert_close(got, want)


def test_in_a_persons_coordinates_place_and_size_in_the_frame_do_not_matter():
    reference, driven, weight = pair(3)
    weight[:, 5:9] = 0
    other = Similarity(
        torch.tensor([0.4, 1.0, 2.5]),
        torch.ones(3),
        torch.zeros(3),
        torch.tensor([[0.2, -0.1], [0.0, 0.3], [-0.4, 0.0]]),
    )
    for config, same in ((PERSON, True), (SMALL, False)):
        block = trained_block(config)
        here = block(reference, driven, weight)
        there = block(apply(other, reference), apply(other, driven), weight)
        want = compose(compose(other, here), invert(other))
        equal = torch.allclose(apply(there, driven), apply(want, driven), atol=1e-4)
        assert equal == same
    # A person without extent has no size; the answer stays finite.
    points = torch.zeros(3, 18, 2)
    assert all(field.isfinite().all() for field in trained_block(PERSON)(points, points, weight))


def trained_block(config: AlignmentConfig = SMALL) -> AlignmentBlock:
    torch.manual_seed(0)
    block = AlignmentBlock(config)
    torch.nn.init.normal_(block.head[-1].weight, std=0.1)
    return block.eval()


def test_missing_joints_have_no_influence():
    reference, driven, weight = pair(2)
    weight[:, 9:] = 0
    block = trained_block()
    before = block(reference, driven, weight)
    driven[:, 9:] = float("nan")
    reference[:, 9:] = 1e6
    for got, want in zip(block(reference, driven, weight), before, strict=True):
        torch.testing.assert_close(got, want)


def test_nothing_in_common_gives_the_identity():
    reference, driven, weight = pair(1)
    got = trained_block()(reference, driven, weight * 0)
    assert (got.scale.item(), got.cos.item(), got.sin.item()) == (1, 1, 0)
    assert got.shift.abs().max() == 0


def test_scale_stays_positive_and_rotation_normalised_for_any_weights():
    reference, driven, weight = pair(64)
    block = trained_block()
    torch.nn.init.normal_(block.head[-1].weight, std=10)
    got = block(reference, driven, weight)
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
        aligned = apply(block(reference, driven, weight), driven)
        loss = alignment_loss(aligned, target, weight)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert loss.item() < 0.1 * offset.norm().item()


def test_alignment_loss_has_a_gradient_where_a_joint_lies_right():
    points = torch.zeros(1, 18, 2, requires_grad=True)
    alignment_loss(points, torch.zeros(1, 18, 2), torch.ones(1, 18)).backward()
    assert torch.isfinite(points.grad).all()

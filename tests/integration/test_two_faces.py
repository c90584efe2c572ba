"""Two people in decoded pictures of a real clip: each becomes more like the one who is meant."""

from pathlib import Path

import numpy as np
import pytest
from two_faces import FILM, TALKING, Outcome, Scene, Seen, known, refine, see

pytestmark = [pytest.mark.real_data, pytest.mark.slow]


CLEAR = 0.05  # of a cosine: far more than rounding, far less than one step's usual raise
STILL = 0.2  # of what the faces changed by


@pytest.fixture(scope="module", params=[TALKING, FILM], ids=["talking", "film"])
def seen(request: pytest.FixtureRequest, data_root: Path) -> Seen:
    scene: Scene = request.param
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ANIMATOR_MODELS", str(data_root / "models"))
        return see(scene, data_root)


@pytest.fixture(scope="module")
def same(seen: Seen) -> Outcome:
    return refine(seen, ())


@pytest.fixture(scope="module")
def swapped(seen: Seen) -> Outcome:
    return refine(seen, (2, 1))


def test_decoded_faces_are_those_of_the_clip(seen: Seen, same: Outcome):
    assert known(seen, same.shown).mean(0).min() > 0.3


def test_each_person_becomes_more_like_their_own_reference(same: Outcome, swapped: Outcome):
    assert same.pairs == [(0, 0), (1, 1)]
    assert swapped.pairs == [(0, 1), (1, 0)]
    for outcome in (same, swapped):
        for reference, person in outcome.pairs:
            assert outcome.raised[person, reference] > CLEAR
        # The other reference's likeness grows by less: it is this face, not any face.
        assert (outcome.leaning(outcome.raised) > CLEAR).all()


def test_swapped_references_swap_the_faces(same: Outcome, swapped: Outcome):
    np.testing.assert_array_equal(same.before, swapped.before)
    for person in (0, 1):
        assert same.after[person, person] > swapped.after[person, person] + CLEAR
        assert swapped.after[person, 1 - person] > same.after[person, 1 - person] + CLEAR


def test_pixels_far_from_both_faces_hardly_change(same: Outcome, swapped: Outcome):
    for outcome in (same, swapped):
        assert outcome.far_change < STILL * outcome.face_change

"""Noise levels for few steps."""

import pytest
import torch

from animator import edm


def test_few_steps_take_the_published_levels_and_keep_their_place_in_other_ranges():
    published = [700, 54.5, 15.886, 7.977, 4.248, 1.789, 0.981, 0.403, 0.173, 0.034, 0]
    torch.testing.assert_close(edm.ays_sigmas(10), torch.tensor(published), rtol=1e-4, atol=0)
    for steps in (1, 4, 25):
        sigmas = edm.ays_sigmas(steps, 0.01, 20.0)
        assert len(sigmas) == steps + 1
        assert sigmas[0] == pytest.approx(20)
        assert (sigmas.diff() < 0).all()
        assert 0.01 < sigmas[-2]
    with pytest.raises(ValueError, match="at least 1"):
        edm.ays_sigmas(0)

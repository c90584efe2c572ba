"""The forward benchmark: what it compares is the same work, and its figures are whole."""

import math

import pytest
import torch

from inference.benchmark import BASELINE, ForwardBench, _animator, _plain_unet, bench_forward


def test_every_row_has_time_memory_and_a_ratio_to_the_baseline():
    shares = []
    config = ForwardBench(
        preset="tiny", height=64, width=32, frames=2, batch=2, device="cpu", repeats=2
    )
    result = bench_forward(config, lambda done, total: shares.append(done / total))
    assert set(result["rows"]) == {BASELINE, "animator", "animator_step"}
    for row in result["rows"].values():
        assert row["seconds"] > 0
        assert row["ratio_low"] <= row["ratio"] <= row["ratio_high"]
        assert math.isnan(row["peak_gb"]) or row["peak_gb"] >= 0
    assert result["rows"][BASELINE]["ratio"] == 1
    assert result["sample"] == [2, 2, 96, 8, 4]
    assert result["machine"]["torch"] == torch.__version__
    assert shares == sorted(shares)
    assert shares[-1] == 1


def test_the_baseline_is_diffusers_own_network_on_the_same_tensors():
    with torch.no_grad():
        model = _animator("tiny", torch.device("cpu"), torch.float32)
    plain = _plain_unet(model)
    shared = dict(plain.named_parameters())
    own = dict(model.unet.named_parameters())
    assert all(value.data_ptr() == own[key].data_ptr() for key, value in shared.items())
    assert {key for key in own if key not in shared} == {k for k in own if ".processor." in k}


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"preset": "huge"}, "expected one of tiny, svd_xt"),
        ({"dtype": "int8"}, "expected one of fp32"),
        ({"device": "tpu"}, "expected auto, cpu or cuda"),
        ({"repeats": 0}, "at least 1"),
    ],
)
def test_settings_that_cannot_be_are_named(wrong, said):
    with pytest.raises(ValueError, match=said):
        ForwardBench(**wrong)
    with pytest.raises(ValueError, match=r"100 x 96.*multiples of 32"):
        bench_forward(ForwardBench(preset="tiny", height=100, width=96, device="cpu"))

"""Peaks are those of the data sheets, dense; what is not known is not made up."""

import pytest
import torch

from training.throughput import peak_flops, peak_of


@pytest.mark.parametrize(
    ("name", "teraflops"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989.4),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
        ("NVIDIA A10G", None),  # not the A10
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("Some Accelerator 9000", None),
    ],
)
def test_bf16_peak_follows_from_the_name(name, teraflops):
    assert peak_of(name, "bf16") == (None if teraflops is None else teraflops * 1e12)


def test_precisions_differ_and_unknown_ones_are_refused():
    assert peak_of("NVIDIA A100-SXM4-80GB", "tf32") == 156e12
    assert peak_of("NVIDIA A100-SXM4-80GB", "fp32") == 19.5e12
    with pytest.raises(ValueError, match="expected one of bf16, tf32, fp32"):
        peak_of("NVIDIA A100-SXM4-80GB", "fp8")


def test_cpu_has_no_known_peak():
    assert peak_flops(torch.device("cpu"), "bf16") is None

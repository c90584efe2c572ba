"""Components on disk: shards, types, damage, and memory."""

import json
import subprocess
import sys

import pytest
import torch
from torch import nn

from animator.tensor_files import WeightsError, component_files, load_component, write_component


def layers(count: int = 6, width: int = 64) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(width, width) for _ in range(count)))


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def test_a_large_component_is_split_and_comes_back_bit_for_bit(tmp_path):
    module = layers()
    write_component(tmp_path, "unet", module.state_dict(), max_shard_size=40_000)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names[0] == "unet-00001-of-00003.safetensors"
    assert names[-1] == "unet.safetensors.index.json"
    with torch.device("meta"):
        again = layers()
    load_component(again, tmp_path, "unet")
    assert same(again, module)


def test_writing_again_leaves_no_file_of_the_earlier_split(tmp_path):
    module = layers()
    write_component(tmp_path, "unet", module.state_dict(), max_shard_size=40_000)
    write_component(tmp_path, "unet", module.state_dict())
    assert [path.name for path in tmp_path.iterdir()] == ["unet.safetensors"]
    write_component(tmp_path, "unet", module.state_dict(), max_shard_size=60_000)
    assert len(component_files(tmp_path, "unet")) == 2
    again = layers()
    load_component(again, tmp_path, "unet")
    assert same(again, module)


def test_weights_are_loaded_in_the_type_asked_for(tmp_path):
    module = layers()
    write_component(tmp_path, "unet", module.state_dict())
    again = layers()
    load_component(again, tmp_path, "unet", torch.bfloat16)
    assert {p.dtype for p in again.parameters()} == {torch.bfloat16}
    assert torch.equal(again[0].weight, module[0].weight.bfloat16())


def test_damage_is_named_with_the_file(tmp_path):
    module = layers()
    write_component(tmp_path, "unet", module.state_dict(), max_shard_size=40_000)
    shard = tmp_path / "unet-00002-of-00003.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(WeightsError, match=r"unet-00002-of-00003\.safetensors is not a readable"):
        load_component(layers(), tmp_path, "unet")
    shard.unlink()
    with pytest.raises(WeightsError, match=r"00002-of-00003\.safetensors is missing"):
        load_component(layers(), tmp_path, "unet")
    with pytest.raises(WeightsError, match=r"missing"):
        load_component(layers(), tmp_path / "nowhere", "unet")


@pytest.mark.parametrize(
    "index",
    [
        '{"weight_map": {"a": "../secret.safetensors"}}',
        '{"weight_map": {"a": "/etc/passwd"}}',
        '{"weight_map": {"a": "code.bin"}}',
        '{"weight_map": []}',
        "{}",
        "no json",
    ],
)
def test_an_index_cannot_name_files_elsewhere(tmp_path, index):
    (tmp_path / "unet.safetensors.index.json").write_text(index)
    with pytest.raises(WeightsError, match="index"):
        load_component(layers(), tmp_path, "unet")


def test_names_and_shapes_that_do_not_fit_are_listed(tmp_path):
    state = layers().state_dict()
    state["0.wight"] = state.pop("0.weight")
    write_component(tmp_path, "unet", state)
    with pytest.raises(WeightsError, match=r"lacks 0\.weight and has 0\.wight"):
        load_component(layers(), tmp_path, "unet")
    write_component(tmp_path, "unet", layers(width=32).state_dict())
    with pytest.raises(WeightsError, match=r"shape \(32,\), expected \(64,\).*and 9 more"):
        load_component(layers(), tmp_path, "unet")
    write_component(tmp_path, "unet", {k: v.int() for k, v in layers().state_dict().items()})
    with pytest.raises(WeightsError, match="real numbers"):
        load_component(layers(), tmp_path, "unet")


def test_the_index_is_the_common_one(tmp_path):
    write_component(tmp_path, "unet", layers().state_dict(), max_shard_size=40_000)
    index = json.loads((tmp_path / "unet.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(layers().state_dict())
    assert index["metadata"]["total_size"] == sum(p.numel() * 4 for p in layers().parameters())


NO_SECOND_COPY = """
import resource, sys
from pathlib import Path
import torch
from torch import nn
from animator.tensor_files import load_component, write_component

def allow(share):  # of the component's size, above what the process has now
    status = Path("/proc/self/status").read_text().split("VmData:")[1]
    limit = int(status.split()[0]) * 1024 + int(share * SIZE)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, -1))

def build():
    return nn.Sequential(*(nn.Linear(2048, 2048, bias=False) for _ in range(24)))

SIZE = 24 * 2048 * 2048 * 4
folder = Path(sys.argv[1])
module = build()
allow(0.3)
write_component(folder, "unet", module.state_dict(), max_shard_size=40_000_000)
total = float(sum(p.sum() for p in module.parameters()))
del module
with torch.device("meta"):
    again = build()
allow(1.3)  # its own weights, and the one shard that is mapped
load_component(again, folder, "unet")
assert float(sum(p.sum() for p in again.parameters())) == total
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits of memory are Linux's")
def test_neither_writing_nor_reading_holds_a_second_copy(tmp_path):
    run = subprocess.run(
        [sys.executable, "-c", NO_SECOND_COPY, str(tmp_path)], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-2000:]

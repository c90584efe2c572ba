import dataclasses
import hashlib
import json
from pathlib import Path

import pytest
from toy_task import toy_config

from training import checkpoint as ckpt


def make_checkpoint(root: Path, samples_seen: int, *, config=None, world: int = 1) -> Path:
    folder = root / ckpt.checkpoint_name(samples_seen)
    (folder / "state").mkdir(parents=True)
    files = {}
    for name in ("state/model.pt", "state/optim.pt"):
        content = f"{name} at {samples_seen}".encode()
        (folder / name).write_bytes(content)
        files[name] = [len(content), hashlib.sha256(content).hexdigest()]
    about = ckpt.describe_run(config or toy_config(), "toy-data-0", world)
    record = {**about, "samples_seen": samples_seen, "files": files}
    (folder / "train.json").write_text(json.dumps(record))
    return folder


def test_newest_complete_checkpoint_is_chosen(tmp_path):
    make_checkpoint(tmp_path, 80)
    make_checkpoint(tmp_path, 1000)
    assert ckpt.newest_checkpoint(tmp_path).samples_seen == 1000


def test_empty_folder_has_no_checkpoint(tmp_path):
    assert ckpt.newest_checkpoint(tmp_path / "nothing") is None


def break_missing(folder: Path) -> None:
    (folder / "state/optim.pt").unlink()


def break_size(folder: Path) -> None:
    (folder / "state/optim.pt").write_bytes(b"torn")


def break_content(folder: Path) -> None:
    path = folder / "state/optim.pt"
    path.write_bytes(path.read_bytes()[::-1])


def break_record(folder: Path) -> None:
    (folder / "train.json").write_text('{"samples_seen": 96, "fi')


def break_no_record(folder: Path) -> None:
    (folder / "train.json").unlink()


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (break_missing, "state/optim.pt is missing"),
        (break_size, "state/optim.pt has 4 bytes instead of"),
        (break_content, "state/optim.pt has other contents"),
        (break_record, "train.json is damaged"),
        (break_no_record, "train.json is missing"),
    ],
)
def test_torn_newest_checkpoint_gives_way_to_the_one_before(tmp_path, damage, reason):
    make_checkpoint(tmp_path, 64)
    torn = make_checkpoint(tmp_path, 96)
    damage(torn)
    assert ckpt.newest_checkpoint(tmp_path).samples_seen == 64
    (line,) = ckpt.remove_incomplete(tmp_path)
    assert torn.name in line
    assert reason in line
    assert not torn.exists()


def test_complete_checkpoints_are_left_alone(tmp_path):
    make_checkpoint(tmp_path, 64)
    assert ckpt.remove_incomplete(tmp_path) == []
    assert ckpt.newest_checkpoint(tmp_path).samples_seen == 64


def test_only_the_newest_are_kept(tmp_path):
    for samples in (8, 16, 24, 32):
        make_checkpoint(tmp_path, samples)
    ckpt.prune(tmp_path, keep=2)
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == [ckpt.checkpoint_name(24), ckpt.checkpoint_name(32)]


def resume(tmp_path, config, *, fingerprint="toy-data-0") -> None:
    make_checkpoint(tmp_path, 64, config=toy_config(lr=1e-3))
    found = ckpt.newest_checkpoint(tmp_path)
    ckpt.check_resume(found, config, fingerprint)


def test_same_settings_continue(tmp_path):
    resume(tmp_path, toy_config(lr=1e-3))


def test_settings_that_change_no_result_may_differ(tmp_path):
    config = toy_config(lr=1e-3, every=8, micro=4, max_failures=9, delay=1.0)
    resume(tmp_path, config)


@pytest.mark.parametrize(
    ("change", "named"),
    [({"lr": 2e-3}, "optim.lr: 0.001 → 0.002"), ({"width": 32, "lr": 1e-3}, "task.width: 16 → 32")],
)
def test_changed_setting_is_refused_by_name(tmp_path, change, named):
    with pytest.raises(ckpt.ResumeError, match=named):
        resume(tmp_path, toy_config(**change))


def test_length_of_a_cosine_run_may_not_change(tmp_path):
    with pytest.raises(ckpt.ResumeError, match=r"optim\.samples"):
        resume(tmp_path, toy_config(lr=1e-3, samples=960))


def test_constant_run_may_be_made_longer(tmp_path):
    config = toy_config(lr=1e-3)
    short, long = (
        dataclasses.replace(
            config, optim=dataclasses.replace(config.optim, schedule="constant", samples=samples)
        )
        for samples in (64, 640)
    )
    make_checkpoint(tmp_path, 64, config=short)
    ckpt.check_resume(ckpt.newest_checkpoint(tmp_path), long, "toy-data-0")


def test_other_data_is_refused(tmp_path):
    with pytest.raises(ckpt.ResumeError, match="other data"):
        resume(tmp_path, toy_config(lr=1e-3), fingerprint="something else")

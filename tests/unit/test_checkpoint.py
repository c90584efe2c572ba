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


def test_best_by_validation_are_kept_too(tmp_path):
    root = tmp_path / "checkpoints"
    for samples, psnr in {8: 21.0, 16: 30.0, 24: float("nan"), 32: 25.0, 40: None}.items():
        name = make_checkpoint(root, samples).name
        if psnr is not None:
            folder = tmp_path / "validation" / name
            folder.mkdir(parents=True)
            (folder / "metrics.json").write_text(json.dumps({"psnr": psnr}))
    (tmp_path / "validation" / ckpt.checkpoint_name(99)).mkdir()  # of one that is gone
    best = ckpt.best_checkpoints(root, "psnr", 2, higher_is_better=True)
    assert best == [ckpt.checkpoint_name(16), ckpt.checkpoint_name(32)]
    assert ckpt.best_checkpoints(root, "psnr", 1, higher_is_better=False) == [
        ckpt.checkpoint_name(8)
    ]
    assert ckpt.best_checkpoints(root, "loss", 1, higher_is_better=False) == []
    ckpt.prune(root, keep=1, best=best)
    assert sorted(path.name for path in root.iterdir()) == [
        ckpt.checkpoint_name(16),
        ckpt.checkpoint_name(32),
        ckpt.checkpoint_name(40),
    ]


def test_what_a_kill_left_half_written_or_half_removed_is_no_checkpoint(tmp_path):
    make_checkpoint(tmp_path, 64)
    whole = make_checkpoint(tmp_path / ".writing-samples-000000000096", 96)
    whole.rename(whole.with_name("whole"))
    make_checkpoint(tmp_path, 32).rename(tmp_path / ".removing-samples-000000000032")
    assert ckpt.newest_checkpoint(tmp_path).samples_seen == 64
    assert ckpt.remove_incomplete(tmp_path) == []
    assert [path.name for path in tmp_path.iterdir()] == [ckpt.checkpoint_name(64)]


def test_state_that_is_whole_on_one_worker_needs_no_conversion(tmp_path):
    config = toy_config()
    ddp = dataclasses.replace(config, run=dataclasses.replace(config.run, engine="ddp"))
    make_checkpoint(tmp_path, 8, config=config, world=2)
    assert ckpt.newest_checkpoint(tmp_path).needs_conversion(1)
    make_checkpoint(tmp_path, 16, config=ddp, world=2)
    found = ckpt.newest_checkpoint(tmp_path)
    assert not found.needs_conversion(1)
    assert found.state_for(1) == found.folder
    assert ckpt.fit_world(found, 1) is None


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

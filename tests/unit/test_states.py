"""The latents of a clip between steps: in memory and in a folder that outlives its process."""

import json

import numpy as np
import pytest
import torch

from inference.noise import ClipNoise
from inference.outputs import FolderInUseError
from inference.sampler import SamplerConfig, sample
from inference.states import STATE, ClipStates, WorkFolderError, WorkPlace, open_states

SHAPE = (9, 2, 3, 4)
CONFIG = SamplerConfig(solver="heun", steps=5, sigma_min=0.1, sigma_max=10, churn=3)
SIGMAS = torch.tensor([10.0, 5.0, 2.0, 1.0, 0.3, 0.0])


class KilledError(Exception):
    pass


def run(states: ClipStates, on_work=None) -> torch.Tensor:
    def denoise(read, sigma, step):
        for start in (0, 3, 5):
            frames = range(start, start + 4)
            share = torch.full((4, 1, 1, 1), 0.5 if start else 1.0)
            yield frames, (read(frames) + 0.1 * step) / (1 + sigma**2) * share

    sample(denoise, states, SIGMAS, CONFIG, ClipNoise(1, SHAPE[1:]), portion=4, on_work=on_work)
    return states.current.read(range(SHAPE[0]))


def kill_after(calls: int):
    count = []

    def on_work(step):
        count.append(step)
        if len(count) == calls:
            raise KilledError

    return on_work


@pytest.mark.parametrize("folder", [False, True])
def test_any_frames_can_be_read_and_written(tmp_path, folder):
    states = ClipStates(SHAPE, tmp_path / "work" if folder else None)
    values = torch.randn(3, *SHAPE[1:])
    room = states.room("predicted")
    room.write([7, 0, 4], values)
    assert torch.equal(room.read([0, 4, 7]), values[[1, 2, 0]])
    assert room.read([1]).abs().max() == 0
    got = room.read([0])
    got += 1  # a copy
    assert torch.equal(room.read([0]), values[1:2])
    room.clear()
    assert room.read(range(9)).abs().max() == 0
    states.remove()
    assert not (tmp_path / "work").exists()


def test_a_folder_gives_what_memory_gives(tmp_path):
    assert torch.equal(run(ClipStates(SHAPE, tmp_path / "work")), run(ClipStates(SHAPE)))


@pytest.mark.parametrize("calls", [1, 4, 7, 13, 20, 26])
def test_a_run_that_was_ended_anywhere_ends_in_the_same_bits(tmp_path, calls):
    states = ClipStates(SHAPE, tmp_path / "work", "a request")
    with pytest.raises(KilledError):
        run(states, kill_after(calls))
    done = states.step
    states.close()
    again = ClipStates(SHAPE, tmp_path / "work", "a request")
    assert again.step == done
    steps = []
    resumed = run(again, steps.append)
    assert min(steps, default=done) == done
    assert torch.equal(resumed, run(ClipStates(SHAPE)))


@pytest.mark.parametrize("calls", [3, 9, 14, 19, 22])
def test_a_run_whose_steps_lean_on_earlier_ones_is_continued_where_none_does(tmp_path, calls):
    def leaning(read, sigma, step):
        if step % 2 == 0:
            memory[0] = read([3]).mean()
        yield range(9), (read(range(9)) + memory[0]) / (1 + sigma**2)

    def lean(states, on_work=None):
        noise = ClipNoise(1, SHAPE[1:])
        sample(leaning, states, SIGMAS, CONFIG, noise, portion=3, on_work=on_work)
        return states.current.read(range(9))

    memory = [torch.tensor(0.0)]
    whole = lean(ClipStates(SHAPE))
    states = ClipStates(SHAPE, tmp_path / "work", every=2)
    with pytest.raises(KilledError):
        lean(states, kill_after(calls))
    states.close()
    memory[0] = torch.tensor(torch.nan)
    again = ClipStates(SHAPE, tmp_path / "work", every=2)
    assert again.step % 2 == 0
    assert torch.equal(lean(again), whole)


def test_what_a_kill_leaves_half_written_is_not_believed(tmp_path):
    folder = tmp_path / "work"
    states = ClipStates(SHAPE, folder, "a request")
    with pytest.raises(KilledError):
        run(states, kill_after(17))
    states.coming.write(range(9), torch.full(SHAPE, torch.nan))
    states.room("predicted").write([2], torch.full((1, *SHAPE[1:]), 1e9))
    states.close()
    (folder / f".{STATE}.1.tmp").write_text("{")
    assert torch.equal(run(ClipStates(SHAPE, folder, "a request")), run(ClipStates(SHAPE)))


def test_states_of_another_request_are_refused_or_replaced(tmp_path):
    folder = tmp_path / "work"
    states = ClipStates(SHAPE, folder, "one")
    with pytest.raises(KilledError):
        run(states, kill_after(17))
    states.close()
    for changed in ("other", "one"):
        shape = SHAPE if changed == "other" else (8, *SHAPE[1:])
        with pytest.raises(WorkFolderError, match="another request"):
            ClipStates(shape, folder, changed)
    replaced = ClipStates(SHAPE, folder, "other", replace=True)
    assert replaced.step == 0
    assert torch.equal(run(replaced), run(ClipStates(SHAPE)))


def test_a_folder_with_files_of_somebody_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("years")
    with pytest.raises(WorkFolderError, match=r"thesis\.txt"):
        ClipStates(SHAPE, tmp_path, "one", replace=True)
    assert (tmp_path / "thesis.txt").exists()


def test_two_runs_do_not_share_a_folder(tmp_path):
    states = ClipStates(SHAPE, tmp_path / "work")
    with pytest.raises(FolderInUseError, match="another run"):
        ClipStates(SHAPE, tmp_path / "work")
    states.close()
    ClipStates(SHAPE, tmp_path / "work").remove()


def test_anything_the_states_depend_on_makes_another_identity(tmp_path):
    poses = np.arange(6.0)
    changes = [
        (WorkPlace(tmp_path / "1", "other"), {"seed": 1}, poses),
        (WorkPlace(tmp_path / "2"), {"seed": 2}, poses),
        (WorkPlace(tmp_path / "3"), {"seed": 1}, poses + 1e-9),
        (WorkPlace(tmp_path / "4"), {"seed": 1}, poses.reshape(2, 3)),
        (WorkPlace(tmp_path / "5"), {"seed": 1}, poses),
        (WorkPlace(tmp_path / "6", inputs="a file"), {"seed": 1}, poses),
    ]
    found = set()
    # Where it is known what poses were made from, their rounding does not count.
    same = (WorkPlace(tmp_path / "7", inputs="a file"), {"seed": 1}, poses + 1e-9)
    for place, about, array in (*changes, same):
        states = open_states(SHAPE, place, about, [array])
        sample(
            lambda read, sigma, step: [(range(9), read(range(9)))],
            states,
            SIGMAS[-2:],
            CONFIG,
            ClipNoise(0, SHAPE[1:]),
        )
        found.add(json.loads((place.folder / STATE).read_text())["identity"])
        states.remove()
    assert len(found) == len(changes)


def test_a_continued_run_gets_the_conditions_of_its_beginning(tmp_path):
    def conditions(value):
        return {"context": torch.full((2,), value, dtype=torch.bfloat16)}

    states = ClipStates(SHAPE, tmp_path / "work", "a request")
    assert states.kept(conditions(1.0))["context"].tolist() == [1, 1]
    with pytest.raises(KilledError):
        run(states, kill_after(17))
    states.close()
    again = ClipStates(SHAPE, tmp_path / "work", "a request")
    kept = again.kept(conditions(1.01))["context"]
    assert torch.equal(kept, conditions(1.0)["context"])
    again.remove()
    afresh = ClipStates(SHAPE, tmp_path / "work", "a request")
    assert afresh.kept(conditions(3.0))["context"].tolist() == [3, 3]


def test_what_a_kill_left_before_the_first_step_is_no_obstacle(tmp_path):
    work = tmp_path / "work"
    work.mkdir()
    for name in (".faces-1.npz.77.tmp", "faces-1.npz", ".state.json.12.tmp", "latents-0.f32"):
        (work / name).write_bytes(b"half")
    states = ClipStates(SHAPE, work)
    assert not list(work.glob("faces*"))
    assert not list(work.glob(".*"))
    states.remove()
    assert not work.exists()


@pytest.mark.parametrize("name", ["faces-me.jpg", "latents-00000.tar", "lockscreen.png", ".hidden"])
def test_files_that_only_look_like_ours_are_never_removed(tmp_path, name):
    work = tmp_path / "work"
    work.mkdir()
    (work / name).write_text("mine")
    with pytest.raises(WorkFolderError, match="holds other files"):
        ClipStates(SHAPE, work)
    (work / name).unlink()
    states = ClipStates(SHAPE, work)
    (work / name).write_text("mine")
    states.remove()
    assert [path.name for path in work.iterdir()] == [name]

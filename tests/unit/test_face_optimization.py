"""Predictions steered towards a face: what rises, what stays as it is, and when it stops."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from skimage.data import astronaut
from torch import Tensor

from animator.block_dct import BlockDCT
from animator.face_embedding import FaceThumbnail
from inference.conditioning import to_tensor
from inference.faces.config import FaceOptimizationConfig
from inference.faces.optimizer import FaceOptimizer
from inference.faces.places import FacePlaces
from inference.faces.similarity import FaceReader, arcface, similarities
from pipelines.faces import Face

SIZE = (160, 192)
# Eyes, nose, mouth corners and box of the portrait, within SIZE.
LANDMARKS = np.array([[0.54, 0.35], [0.73, 0.34], [0.64, 0.48], [0.57, 0.63], [0.73, 0.62]])
BOX = np.array([0.46, 0.13, 0.8, 0.76])


def portrait() -> np.ndarray:
    return np.ascontiguousarray(astronaut()[50:210, 100:292])


def clip(num_frames: int = 4) -> Tensor:
    """Latents of the portrait, a little other in every frame."""
    still = BlockDCT().encode(to_tensor(portrait())[None])
    noise = torch.randn(num_frames, *still.shape[1:], generator=torch.Generator().manual_seed(0))
    return still + 0.1 * noise


def places(num_frames: int = 4, people: int = 1) -> FacePlaces:
    return FacePlaces(
        visible=np.ones((num_frames, people), bool),
        landmarks=np.tile(LANDMARKS.astype(np.float32), (num_frames, people, 1, 1)),
        boxes=np.tile(BOX.astype(np.float32), (num_frames, people, 1)),
        size=SIZE,
    )


def thumbnail() -> FaceReader:
    return FaceReader(FaceThumbnail(128), by="box")


def target(seed: int = 1) -> Tensor:
    return torch.randn(1, 128, generator=torch.Generator().manual_seed(seed))


def config(**changes: Any) -> FaceOptimizationConfig:
    given: dict[str, Any] = {"mode": "crop", "halo": 2, "margin": 2, "iterations": 4, "chunk": 2}
    return FaceOptimizationConfig(**{**given, "min_gain": 0.0, "detect_every": 0, **changes})


def optimizer(
    settings: FaceOptimizationConfig, where: FacePlaces | None = None, **options: Any
) -> FaceOptimizer:
    options.setdefault("targets", target())
    where = where or places()
    return FaceOptimizer(
        BlockDCT(), thumbnail(), places=where, config=settings, num_steps=25, **options
    )


def similarity(latents: Tensor, where: FacePlaces, wanted: Tensor, person: int = 0) -> Tensor:
    reader = thumbnail()
    shown = BlockDCT().decode(latents)
    points, boxes = (torch.from_numpy(x[:, person]) for x in (where.landmarks, where.boxes))
    return similarities(reader.embed(shown, points, boxes), wanted)


@pytest.mark.parametrize("mode", ["crop", "exact", "published"])
def test_faces_become_more_like_the_reference(mode: str):
    latents, where = clip(), places()
    run = optimizer(config(mode=mode, iterations=8), where)
    refined = run.refine(latents, torch.arange(4), 0)
    gain = similarity(refined, where, target()) - similarity(latents, where, target())
    assert float(gain.min()) > 0.1
    record = run.record()
    (step,) = record["steps"]
    assert len(step["loss"]) == 8
    assert step["loss"][-1] < step["loss"][0]
    assert step["faces"] == 4
    assert record["similarity_first"] == pytest.approx(1 - step["loss"][0], abs=1e-4)
    assert record["frames_with_face"] == 4


def test_nothing_outside_of_the_crop_changes():
    latents = clip()
    refined = optimizer(config()).refine(latents, torch.arange(4), 0)
    changed = (refined != latents).any(1).any(0)
    rows, columns = changed.any(1).nonzero().flatten(), changed.any(0).nonzero().flatten()
    # The face's square of 1.3 times the box's longer side, and two cells around it.
    side, (height, width) = 1.3 * (BOX[3] - BOX[1]) * SIZE[0] / 8, (SIZE[0] // 8, SIZE[1] // 8)
    middle_x, middle_y = (BOX[0] + BOX[2]) / 2 * width, (BOX[1] + BOX[3]) / 2 * height
    assert columns.min() >= np.floor(middle_x - side / 2) - 2
    assert columns.max() < np.ceil(middle_x + side / 2) + 2
    assert rows.min() >= np.floor(middle_y - side / 2) - 2
    assert not changed.all()
    assert changed[int(middle_y), int(middle_x)]


def test_chunks_change_nothing():
    latents = clip()
    refined = [
        optimizer(config(chunk=chunk, mode=mode)).refine(latents, torch.arange(4), 0)
        for chunk, mode in ((1, "exact"), (3, "exact"), (4, "exact"), (4, "published"))
    ]
    for other in refined[1:]:
        torch.testing.assert_close(other, refined[0], atol=2e-3, rtol=0)


def test_portions_of_a_clip_change_nothing():
    latents = clip()
    whole = optimizer(config()).refine(latents, torch.arange(4), 0)
    run = optimizer(config())
    parts = [run.refine(latents[i : i + 2], torch.arange(i, i + 2), 0) for i in (0, 2)]
    torch.testing.assert_close(torch.cat(parts), whole, atol=2e-3, rtol=0)
    assert run.record()["steps"][0]["faces"] == 4


def test_frames_without_a_visible_face_are_left_alone():
    latents, where = clip(), places()
    where.visible[1] = where.visible[3] = False
    refined = optimizer(config(chunk=4), where).refine(latents, torch.arange(4), 0)
    assert torch.equal(refined[[1, 3]], latents[[1, 3]])
    assert not torch.equal(refined[0], latents[0])
    assert not torch.equal(refined[2], latents[2])
    where.visible[:] = False
    run = optimizer(config(), where)
    assert torch.equal(run.refine(latents, torch.arange(4), 0), latents)
    assert run.record()["steps"] == []


def test_later_steps_are_left_alone():
    latents, run = clip(), optimizer(config(steps=2))
    assert run.refine(latents, torch.arange(4), 2) is latents
    assert not torch.equal(run.refine(latents, torch.arange(4), 1), latents)
    # What the last of them came to is measured.
    assert run.record()["similarity_last"] > run.record()["similarity_first"]


def test_two_people_become_like_their_own_reference():
    where = places(people=2)
    where.boxes[:, 0] = [0.05, 0.3, 0.25, 0.6]
    where.boxes[:, 1] = [0.7, 0.3, 0.9, 0.6]
    targets = torch.cat([target(1), target(2)])
    latents = clip()
    run = optimizer(config(iterations=8, halo=1, margin=1), where, targets=targets)
    refined = run.refine(latents, torch.arange(4), 0)
    for person in (0, 1):
        own, other = targets[person], targets[1 - person]
        gain = similarity(refined, where, own, person) - similarity(latents, where, own, person)
        drift = similarity(refined, where, other, person) - similarity(
            latents, where, other, person
        )
        assert float(gain.min()) > 0.1
        assert float(gain.mean()) > 4 * float(drift.mean().abs())
    assert run.record()["faces"] == [4, 4]


def test_key_frames_take_turns_over_all_frames():
    latents, seen = clip(8), []
    run = optimizer(config(chunk=2, portion=8, key_frames=0.25, iterations=4), places(8))
    original = run.curve.add
    run.curve.add = lambda step, i, found: (  # type: ignore[method-assign]
        seen.append(sum(faces for _, faces in found)),
        original(step, i, found),
    )[1]
    refined = run.refine(latents, torch.arange(8), 0)
    assert seen == [2, 2, 2, 2]
    moved = (refined - latents).abs().amax((1, 2, 3))
    # Every frame had one of the four iterations.
    torch.testing.assert_close(moved, torch.full((8,), run.config.learning_rate), rtol=0.01, atol=0)


def test_half_of_the_key_frames_are_half_of_a_portion_as_it_is_by_default():
    given = {"mode": "crop", "min_gain": 0.0, "detect_every": 0, "iterations": 4}
    run = optimizer(FaceOptimizationConfig(**given, key_frames=0.5, halo=2, margin=2))
    original, seen = run.curve.add, []
    run.curve.add = lambda step, i, found: (  # type: ignore[method-assign]
        seen.append(sum(faces for _, faces in found)),
        original(step, i, found),
    )[1]
    refined = run.refine(clip(), torch.arange(4), 0)
    assert seen == [2, 2, 2, 2]
    assert (refined - clip()).abs().amax((1, 2, 3)).min() > 0


def test_the_published_way_keeps_all_frames_in_one_graph():
    run = optimizer(config(mode="published", iterations=1, portion=2), places(6))
    original, seen = run.curve.add, []
    run.curve.add = lambda step, i, found: (  # type: ignore[method-assign]
        seen.append([faces for _, faces in found]),
        original(step, i, found),
    )[1]
    run.refine(clip(6), torch.arange(6), 0)
    assert seen == [[6]]


def test_it_stops_where_little_is_gained():
    run = optimizer(config(iterations=30, min_gain=0.9))
    run.refine(clip(), torch.arange(4), 0)
    assert len(run.record()["steps"][0]["loss"]) == 2


def test_it_can_be_stopped_within_a_step():
    def stop(step: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        optimizer(config(), on_iteration=stop).refine(clip(), torch.arange(4), 0)


def test_v1_moves_less_from_step_to_step():
    v1 = FaceOptimizationConfig.v1()
    assert (v1.mode, v1.iterations, v1.steps) == ("published", 3, 21)
    assert [v1.rate(step, 25) for step in (0, 5, 20)] == pytest.approx([0.1, 0.08, 0.02])
    run = optimizer(config(schedule="v1", learning_rate=0.1, iterations=1))
    latents = clip()
    moved = [
        float((run.refine(latents, torch.arange(4), step) - latents).abs().max()) for step in (0, 5)
    ]
    assert moved == pytest.approx([0.1, 0.08], rel=0.01)


def test_gradients_that_are_no_numbers_move_nothing():
    latents = clip()
    latents[1, 0, 5:, 12:] = torch.nan
    run = optimizer(config(chunk=1))
    refined = run.refine(latents, torch.arange(4), 0)
    assert torch.equal(refined[0].isnan().any(), torch.tensor(False))
    assert run.record()["skipped_gradients"] == 4
    assert run.record()["steps"][0]["faces"] == 3
    json.dumps(run.record(), allow_nan=False)
    unchanged = refined[1].isnan() | (refined[1] == latents[1])
    assert bool(unchanged.all())


class Seen:
    """A detector that sees the face a little to the right, in all frames."""

    name = licence = reason = "here"
    embedding_dim = 0
    channel_order = "rgb"

    def detect(self, frame: np.ndarray) -> list[Face]:
        shift = np.array([0.02, 0.0])
        landmarks = (LANDMARKS + shift).astype(np.float32)
        return [
            Face(
                box=(BOX + np.array([0.02, 0, 0.02, 0])).astype(np.float32),
                score=1,
                landmarks=landmarks,
            )
        ]

    def embed(self, frame: np.ndarray, face: Face) -> np.ndarray:
        return np.zeros(0)


def test_places_are_corrected_every_few_steps():
    run = optimizer(config(detect_every=2), detector=Seen())
    for step, corrected in ((0, 0), (1, 0), (2, 4), (3, 4)):
        run.refine(clip(), torch.arange(4), step)
        assert run.record()["corrected_places"] == corrected
    np.testing.assert_allclose(
        run.places.landmarks[:, 0], np.tile(LANDMARKS + np.array([0.02, 0]), (4, 1, 1))
    )


def test_a_run_that_was_killed_goes_on_with_places_and_record(tmp_path: Path):
    whole = optimizer(config(detect_every=1), detector=Seen())
    kept = optimizer(config(detect_every=1), detector=Seen())
    kept.keep_in(tmp_path, 0)
    for step in (0, 1):
        for run in (whole, kept):
            run.refine(clip(), torch.arange(4), step)
    again = optimizer(config(detect_every=1), detector=Seen())
    again.keep_in(tmp_path, 2)
    expected = whole.refine(clip(), torch.arange(4), 2)
    assert torch.equal(again.refine(clip(), torch.arange(4), 2), expected)
    told, known = again.record(), whole.record()
    assert told["corrected_places"] == known["corrected_places"] == 8
    assert [row["loss"] for row in told["steps"]] == [row["loss"] for row in known["steps"]]


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"mode": "fast"}, "crop, exact, published"),
        ({"iterations": 0}, "face.iterations"),
        ({"learning_rate": float("nan")}, "learning_rate"),
        ({"key_frames": 0.0}, "key_frames"),
        ({"margin": 9, "halo": 8}, "margin"),
        ({"min_gain": -0.1}, "min_gain"),
    ],
)
def test_settings_out_of_range_are_refused(changes: dict[str, Any], complaint: str):
    with pytest.raises(ValueError, match=complaint):
        FaceOptimizationConfig(**changes)


def test_modes_that_are_not_decided_are_refused():
    with pytest.raises(ValueError, match="crop, exact or published"):
        optimizer(FaceOptimizationConfig())


@pytest.mark.real_data
def test_a_real_network_takes_a_face_for_another_persons(models_env: Path, data_root: Path):
    from pipelines.faces import InsightFaceBackend
    from pipelines.images import read_image

    detector = InsightFaceBackend(models_env / "face" / "mini")
    network = arcface(models_env / "face" / "mini" / "mobilefacenet.onnx", torch.device("cpu"))
    reader = FaceReader(network)
    group = read_image(data_root / "image" / "insightface_t1.jpg")
    other = detector.detect(group)[0]
    found = detector.detect(portrait())[0]
    where = places(2)
    where.landmarks[:, 0], where.boxes[:, 0] = found.landmarks, found.box
    wanted = reader.embed(
        to_tensor(group)[None],
        torch.from_numpy(other.landmarks)[None],
        torch.from_numpy(other.box)[None],
    )
    latents = clip(2)
    run = FaceOptimizer(BlockDCT(), reader, wanted, where, config(iterations=6), num_steps=25)
    refined = run.refine(latents, torch.arange(2), 0)
    # What the backend itself, which detects and aligns anew, thinks of the result.
    shown = BlockDCT().decode(refined)[0]
    frame = ((shown.clamp(-1, 1) + 1) * 127.5).round().byte().movedim(0, -1).numpy()
    theirs = torch.from_numpy(detector.embed(frame, detector.detect(frame)[0]))
    before = torch.from_numpy(detector.embed(portrait(), found))
    assert float(similarities(before[None], wanted)[0]) < 0.3
    assert float(similarities(theirs[None], wanted)[0]) > 0.5

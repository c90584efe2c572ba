"""CoTracker's backend on moving footage, with a small tracker of the same inputs and outputs.

CoTracker's own weights are for non-commercial use and large, and its package is not on PyPI. The
stand-in finds each point again by comparing blocks of pixels, chunk by chunk as the online
predictor does; windows, masks, visibility, coordinates and loading are those of the product.
"""

import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from skimage.data import astronaut
from torch import Tensor, nn
from torch.nn import functional

from pipelines.camera import CameraError, camera_motion, measure_camera, open_camera_backend
from pipelines.cotracker import CoTrackerBackend

SCENE = cv2.resize(astronaut(), (1200, 1200), interpolation=cv2.INTER_CUBIC)
FPS = 5.0


class BlockTracker(nn.Module):
    """Follows blocks of 7 x 7 at a quarter of the size by least squares, to a part of a pixel.

    Points that were not asked for yet are said to be visible where they will be asked for.
    """

    gain: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.step = 8
        self.register_buffer("gain", torch.ones(1))
        self.queries = torch.zeros(0, 3)
        self.blocks = torch.zeros(0, 49)
        self.tracks = torch.zeros(0, 0, 2)
        self.visible = torch.zeros(0, 0, dtype=torch.bool)
        self.begin = 0

    def forward(
        self, video_chunk: Tensor, is_first_step: bool = False, queries: Tensor | None = None
    ) -> tuple[Tensor | None, Tensor | None]:
        if is_first_step:
            assert queries is not None
            self.queries = queries[0].clone()
            self.queries[:, 1:] = (self.queries[:, 1:] - 1.5) / 4
            count = self.queries.size(0)
            self.blocks = torch.zeros(count, 49)
            self.tracks = torch.zeros(0, count, 2)
            self.visible = torch.zeros(0, count, dtype=torch.bool)
            self.begin = 0
            return None, None
        grey = functional.avg_pool2d(video_chunk[0].mean(dim=1, keepdim=True), 4)
        for index in range(grey.size(0)):
            if self.begin + index >= self.tracks.size(0):
                self.follow(grey[index, 0], self.begin + index)
        self.begin += self.step
        return 4 * self.tracks[None] + 1.5, self.visible[None]

    def follow(self, frame: Tensor, number: int) -> None:
        born = self.queries[:, 0] < number
        last = self.queries[:, 1:].clone()
        if number > 0:
            last[born] = self.tracks[number - 1, born]
        around = self.around(frame, last)  # 5 pixels each way, and the block's own 3
        now = self.queries[:, 0] == number
        self.blocks[now] = around[:, 5:12, 5:12].reshape(-1, 49)[now]
        # Mean square of the difference: of the place, of the block, less twice their product.
        blocks = self.blocks.reshape(-1, 1, 7, 7)
        product = functional.conv2d(around[None], blocks, groups=blocks.size(0))[0] / 49
        power = functional.avg_pool2d(around.square(), 7, stride=1)
        grid = power - 2 * product + blocks.square().mean(dim=(2, 3))[:, :, None]
        best = grid.reshape(-1, 121).argmin(dim=1)
        row, column = (best // 11).clamp(1, 9), (best % 11).clamp(1, 9)
        points = torch.arange(best.size(0))
        middle = grid[points, row, column]
        left, right = grid[points, row, column - 1], grid[points, row, column + 1]
        above, below = grid[points, row - 1, column], grid[points, row + 1, column]
        dx = (left - right) / (2 * (left + right - 2 * middle)).clamp(min=1e-3)
        dy = (above - below) / (2 * (above + below - 2 * middle)).clamp(min=1e-3)
        moved = torch.stack([column + dx.clamp(-1, 1), row + dy.clamp(-1, 1)], dim=1) - 5
        place = torch.where(born[:, None], last + moved, self.queries[:, 1:])
        limit = torch.tensor([frame.size(1) - 1, frame.size(0) - 1])
        inside = ((place >= 0) & (place <= limit)).all(dim=1)
        self.tracks = torch.cat([self.tracks, place[None]])
        sure = ~born | (inside & (middle < 200.0 * self.gain))
        self.visible = torch.cat([self.visible, sure[None]])

    def around(self, frame: Tensor, centres: Tensor) -> Tensor:
        offset = torch.arange(17) - 8
        x = (centres[:, 0, None, None] + offset[None, None, :]) / (frame.size(1) - 1) * 2 - 1
        y = (centres[:, 1, None, None] + offset[None, :, None]) / (frame.size(0) - 1) * 2 - 1
        where = torch.stack([x.expand(-1, 17, -1), y.expand(-1, -1, 17)], dim=3)
        sampled = functional.grid_sample(
            frame[None, None],
            where.reshape(1, -1, 17, 2),
            padding_mode="border",
            align_corners=True,
        )
        return sampled.reshape(-1, 17, 17)


class Watched(BlockTracker):
    """Writes down what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[np.ndarray] = []
        self.chunks: list[tuple[int, ...]] = []

    def forward(
        self, video_chunk: Tensor, is_first_step: bool = False, queries: Tensor | None = None
    ) -> tuple[Tensor | None, Tensor | None]:
        if is_first_step and queries is not None:
            self.asked.append(queries[0].numpy().copy())
        else:
            assert 100 < video_chunk.max() <= 255  # not scaled to 0..1
            self.chunks.append(tuple(video_chunk.shape))
        return super().forward(video_chunk, is_first_step, queries)


class HidesHalf(BlockTracker):
    """Half of the points run away, and are said not to be visible."""

    def forward(
        self, video_chunk: Tensor, is_first_step: bool = False, queries: Tensor | None = None
    ) -> tuple[Tensor | None, Tensor | None]:
        tracks, visible = super().forward(video_chunk, is_first_step, queries)
        if tracks is not None and visible is not None:
            tracks, visible = tracks.clone(), visible.clone()
            tracks[:, :, ::2] += 20 * torch.arange(tracks.size(1))[None, :, None, None]
            visible[:, :, ::2] = False
        return tracks, visible


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    # The blocks are small: threads would wait for one another.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def backend(tracker: BlockTracker | None = None) -> CoTrackerBackend:
    return CoTrackerBackend((tracker or BlockTracker()).eval(), file="stand-in")


def view(x: float, y: float = 600, zoom: float = 1.0, turn: float = 0.0) -> np.ndarray:
    """A view of 320 x 180 whose centre shows (x, y) of the scene."""
    matrix = cv2.getRotationMatrix2D((x, y), turn, zoom)
    matrix[:, 2] += (159.5 - x, 89.5 - y)
    return cv2.warpAffine(SCENE, matrix, (320, 180))


def test_pan_is_measured_as_by_flow():
    frames = [view(500 + 3 * i) for i in range(21)]
    tracked, flow = camera_motion(frames, FPS, None, backend()), camera_motion(frames, FPS)
    assert tracked.percent_per_second == pytest.approx(3 * FPS / 320 * 100, rel=0.05)
    assert tracked.percent_per_second == pytest.approx(flow.percent_per_second, rel=0.05)
    assert tracked.kind == flow.kind == "pan"
    assert tracked.tracked_share == 1


def test_zoom_and_roll_are_measured_as_by_flow():
    zoomed = [view(600, zoom=1.01**i) for i in range(16)]
    tracked, flow = camera_motion(zoomed, FPS, None, backend()), camera_motion(zoomed, FPS)
    assert tracked.zoom_percent_per_second == pytest.approx(flow.zoom_percent_per_second, rel=0.1)
    assert tracked.kind == flow.kind
    rolled = [view(600, turn=0.8 * i) for i in range(16)]
    tracked, flow = camera_motion(rolled, FPS, None, backend()), camera_motion(rolled, FPS)
    assert tracked.roll_degrees_per_second == pytest.approx(flow.roll_degrees_per_second, rel=0.1)


@pytest.mark.parametrize("count", [2, 9, 17])
def test_fixed_camera_is_static_however_short_the_shot(count: int):
    motion = camera_motion([view(600)] * count, FPS, None, backend())
    assert motion.kind == "static"
    assert motion.percent_per_second < 0.1  # a twentieth of the stand-in's pixels
    assert motion.num_tracks > 80


def test_long_shots_are_followed_in_windows_and_points_asked_for_again():
    tracker = Watched()
    frames = [view(300 + 6 * i) for i in range(64)]
    motion = camera_motion(frames, FPS, None, backend(tracker))
    # In 60 frames all of the first picture is gone.
    assert motion.tracked_share == 1
    assert motion.percent_per_second == pytest.approx(6 * FPS / 320 * 100, rel=0.05)
    assert set(tracker.chunks) == {(1, 16, 3, 384, 512)}
    assert len(tracker.asked) == 2
    assert set(tracker.asked[0][:, 0]) == {0, 16, 32, 48}
    assert set(tracker.asked[1][:, 0]) == {0}  # the rest of the shot is short
    assert max(len(asked) for asked in tracker.asked) < 500
    assert len(tracker.chunks) < 12


def test_people_are_not_followed():
    tracker = Watched()
    frames, boxes = [], []
    for i in range(17):
        frame = view(600)
        left = 60 + round(25 * np.sin(i))
        frame[10:, left : left + 160] = SCENE[100:270, 500:660]
        frames.append(frame)
        boxes.append([left / 320, 10 / 180, (left + 160) / 320, 1])
    people = np.array(boxes, np.float32)[:, None]
    motion = camera_motion(frames, FPS, people, backend(tracker))
    assert motion.peak_percent_per_second < 0.3
    assert motion.tracked_share == 1
    places = tracker.asked[0][tracker.asked[0][:, 0] == 0][:, 1:] / (512, 384)
    x1, y1, x2, y2 = boxes[0]
    within = (places > (x1, y1)).all(1) & (places < (x2, y2)).all(1)
    assert len(places) > 20
    assert not within.any()


def test_points_that_cannot_be_seen_do_not_count():
    frames = [view(500 + 3 * i) for i in range(17)]
    motion = camera_motion(frames, FPS, None, backend(HidesHalf()))
    assert motion.percent_per_second == pytest.approx(3 * FPS / 320 * 100, rel=0.05)
    assert motion.tracked_share == 1
    assert motion.num_tracks < 60


def test_nothing_open_to_follow_is_unknown():
    everywhere = np.tile(np.array([-0.1, -1.5, 1.1, 1], np.float32), (9, 1, 1))
    motion = camera_motion([view(600)] * 9, FPS, everywhere, backend())
    assert (motion.kind, motion.num_tracks) == ("unknown", 0)


def test_tracks_of_other_shapes_are_refused():
    class Odd(BlockTracker):
        def forward(self, video_chunk, is_first_step=False, queries=None):
            tracks, visible = super().forward(video_chunk, is_first_step, queries)
            return tracks, visible if visible is None else visible[..., :-1]

    with pytest.raises(CameraError, match=r"not CoTracker's online model"):
        camera_motion([view(600)] * 9, FPS, None, backend(Odd()))


@pytest.fixture
def package(no_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package of CoTracker's name and layout on the path; the checkpoint to write for it."""
    folder = tmp_path / "site" / "cotracker"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("")
    (folder / "predictor.py").write_text(
        textwrap.dedent(
            f"""
            import sys
            from torch import nn
            sys.path.insert(0, {str(Path(__file__).parent)!r})
            from test_camera_cotracker import BlockTracker

            class CoTrackerOnlinePredictor(nn.Module):
                def __init__(self, checkpoint="x.pth", offline=False, v2=False, window_len=16):
                    super().__init__()
                    assert checkpoint is None
                    self.step = window_len // 2
                    self.model = BlockTracker()

                def forward(self, video_chunk, is_first_step=False, queries=None, grid_size=5,
                            grid_query_frame=0, add_support_grid=False):
                    return self.model(video_chunk, is_first_step, queries)
            """
        )
    )
    monkeypatch.syspath_prepend(str(folder.parent))
    for name in ("cotracker", "cotracker.predictor"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    checkpoint = no_models / "cotracker" / "scaled_online.pth"
    checkpoint.parent.mkdir()
    yield checkpoint
    for name in ("cotracker", "cotracker.predictor"):
        sys.modules.pop(name, None)


def test_auto_takes_the_package_with_its_weights(package: Path):
    torch.save(BlockTracker().state_dict(), package)
    found = open_camera_backend("auto")
    assert (found.name, found.needs_models) == ("cotracker", True)
    assert "CC BY-NC 4.0" in found.describe()["licence"]
    assert found.describe()["file"] == "scaled_online.pth"
    scores = measure_camera([view(500 + 3 * i) for i in range(9)], FPS, None, found)
    assert scores["camera_backend"] == "cotracker"
    assert scores["camera_pan_percent_per_second"] == pytest.approx(4.69, rel=0.05)


class _Attack:
    def __reduce__(self):
        return (Path.touch, (Path("attacked"),))


def test_checkpoints_that_are_not_the_weights_are_refused(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    for content in ({"other": torch.ones(2)}, [1, 2], _Attack()):
        torch.save(content, package)
        with pytest.raises(CameraError, match=r"(?s)does not hold CoTracker3.* get scaled_online"):
            open_camera_backend("cotracker")
    package.write_bytes(b"<html>not found</html>")
    with pytest.raises(CameraError, match="does not hold"):
        open_camera_backend("cotracker")
    assert not (tmp_path / "attacked").exists()


def test_weights_without_the_package_leave_auto_to_flow(no_models: Path):
    checkpoint = no_models / "cotracker" / "scaled_online.pth"
    checkpoint.parent.mkdir()
    torch.save(BlockTracker().state_dict(), checkpoint)
    assert open_camera_backend("auto").name == "flow"
    with pytest.raises(CameraError, match="install it from its repository"):
        open_camera_backend("cotracker")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript_file_needs_no_package(no_models: Path):
    file = no_models / "cotracker" / "scaled_online.ts"
    file.parent.mkdir()
    torch.jit.script(BlockTracker()).save(str(file))
    found = open_camera_backend("auto")
    assert (found.name, found.describe()["file"]) == ("cotracker", "scaled_online.ts")
    frames = [view(500 + 3 * i) for i in range(17)]
    scripted, plain = (camera_motion(frames, FPS, None, b) for b in (found, backend()))
    assert scripted.percent_per_second == pytest.approx(plain.percent_per_second, rel=1e-3)
    file.write_bytes(b"nothing of the kind")
    with pytest.raises(CameraError, match="not a TorchScript file"):
        open_camera_backend("auto")

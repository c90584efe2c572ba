"""Reading and writing video: upright frames, caps, hostile files, atomic reproducible output."""

import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from skimage.data import astronaut

from pipelines.images import ImageError, ImageLimits, read_image
from pipelines.video import (
    DecodeStats,
    VideoError,
    VideoLimits,
    decode,
    encode,
    iter_frames,
    probe,
)

PORTRAIT = astronaut()[:192, 130:290]  # (192, 160, 3)


def _moving(count: int) -> list[np.ndarray]:
    return [np.roll(PORTRAIT, 3 * index, axis=1) for index in range(count)]


def _grey(count: int, side: int = 64) -> list[np.ndarray]:
    """Frame k is the flat grey 10 + 4 k, so that a decoded frame tells its number."""
    return [np.full((side, side, 3), 10 + 4 * index, np.uint8) for index in range(count)]


def _numbers(frames: np.ndarray) -> list[int]:
    return [round((float(frame.mean()) - 10) / 4) for frame in frames]


def _psnr(one: np.ndarray, other: np.ndarray) -> float:
    error = ((one.astype(float) - other.astype(float)) ** 2).mean()
    return float(10 * np.log10(255**2 / error))


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    path = tmp_path / "clip.mp4"
    encode(path, _grey(40), fps=20)
    return path


def test_encoded_clip_comes_back_with_its_size_rate_and_picture(tmp_path: Path):
    frames = _moving(24)
    result = encode(tmp_path / "a.mp4", frames, fps=Fraction(30000, 1001))
    info = probe(tmp_path / "a.mp4")
    assert (info.width, info.height, info.num_frames, info.codec) == (160, 192, 24, "h264")
    assert info.fps == pytest.approx(29.97, abs=0.01)
    assert info.seconds == pytest.approx(24 / 29.97, abs=0.01)
    assert not info.variable_rate
    assert not info.has_audio
    assert result.num_frames == 24
    decoded = decode(tmp_path / "a.mp4")
    assert decoded.shape == (24, 192, 160, 3)
    assert min(_psnr(a, b) for a, b in zip(decoded, frames, strict=True)) > 32


def test_saturated_colours_survive_a_round_trip(tmp_path: Path):
    colours = np.array(
        [[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 0], [255, 0, 255], [255] * 3, [0] * 3],
        np.uint8,
    )
    bars = np.repeat(np.repeat(colours[None], 64, 0), 32, 1)
    encode(tmp_path / "bars.mp4", [bars] * 3, fps=10, crf=10)
    middles = decode(tmp_path / "bars.mp4")[1][32, 16::32].astype(int)
    assert np.abs(middles - colours).max() <= 3
    with av.open(str(tmp_path / "bars.mp4")) as container:
        frame = next(container.decode(video=0))
        assert (frame.colorspace, frame.color_trc, frame.color_primaries) == (1, 1, 1)


def test_same_frames_give_the_same_bytes(tmp_path: Path):
    for name in ("a.mp4", "b.mp4", "c.mp4"):
        encode(tmp_path / name, _moving(30), fps=24)
    contents = {(tmp_path / name).read_bytes() for name in ("a.mp4", "b.mp4", "c.mp4")}
    assert len(contents) == 1


def test_odd_sides_are_padded_to_even(tmp_path: Path):
    odd = PORTRAIT[:191, :159]
    encode(tmp_path / "odd.mp4", [odd] * 4, fps=10)
    decoded = decode(tmp_path / "odd.mp4")
    assert decoded.shape == (4, 192, 160, 3)
    assert _psnr(decoded[1][:191, :159], odd) > 32


def test_failed_encode_leaves_nothing_behind_and_the_old_file_whole(tmp_path: Path):
    path = tmp_path / "a.mp4"
    encode(path, _grey(3), fps=10)
    before = path.read_bytes()

    def broken():
        yield from _grey(5)
        raise RuntimeError("the source died")

    with pytest.raises(RuntimeError, match="source died"):
        encode(path, broken(), fps=10)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["a.mp4"]


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        ([], "no frames"),
        ([np.zeros((8, 8, 3), np.float32)], "float32"),
        ([np.zeros((8, 8), np.uint8)], "3 channels"),
        ([np.zeros((8, 8, 3), np.uint8), np.zeros((8, 10, 3), np.uint8)], r"\(8, 8\)"),
    ],
)
def test_frames_that_make_no_video_are_refused(tmp_path: Path, frames, message: str):
    with pytest.raises(VideoError, match=message):
        encode(tmp_path / "a.mp4", frames, fps=10)
    assert not list(tmp_path.iterdir())


def test_span_starts_and_ends_at_the_frames_on_screen(clip: Path):
    assert _numbers(decode(clip, start=0.5, end=1.0)) == list(range(10, 20))
    # Past the first second the decoder seeks: the frames must be the same.
    assert _numbers(decode(clip, start=1.4)) == list(range(28, 40))


def test_other_rates_show_the_frame_on_screen(clip: Path):
    assert _numbers(decode(clip, fps=10)) == list(range(0, 40, 2))
    assert _numbers(decode(clip, fps=40, end=0.2)) == [0, 0, 1, 1, 2, 2, 3, 3]


def test_size_and_longest_side_are_kept(tmp_path: Path):
    encode(tmp_path / "a.mp4", _moving(2), fps=10)
    assert decode(tmp_path / "a.mp4", size=(50, 70)).shape == (2, 50, 70, 3)
    assert decode(tmp_path / "a.mp4", max_side=96).shape == (2, 96, 80, 3)
    assert decode(tmp_path / "a.mp4", max_side=999).shape == (2, 192, 160, 3)


def test_variable_rate_becomes_constant(tmp_path: Path):
    path = tmp_path / "vfr.mp4"
    ticks = [0, 1, 2, 6, 7, 8, 12, 13]
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10, options={"bf": "0"})
        stream.width = stream.height = 64
        stream.codec_context.time_base = Fraction(1, 10)
        for tick, image in zip(ticks, _grey(8), strict=True):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = tick, Fraction(1, 10)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    assert probe(path).variable_rate
    shown = _numbers(decode(path, fps=10))
    assert shown == [0, 1, 2, 2, 2, 2, 3, 4, 5, 5, 5, 5, 6, 7]


@pytest.mark.parametrize(
    ("matrix", "turns", "mirror"),
    [
        ((0, 1, -1, 0), 3, False),
        ((0, -1, 1, 0), 1, False),
        ((-1, 0, 0, -1), 2, False),
        ((-1, 0, 0, 1), 0, True),
    ],
)
def test_rotated_clip_is_shown_upright(tmp_path: Path, matrix, turns: int, mirror: bool):
    encode(tmp_path / "a.mp4", [PORTRAIT] * 2, fps=10)
    data = bytearray((tmp_path / "a.mp4").read_bytes())
    place = data.index(b"tkhd") + 4 + 40  # the 3x3 matrix of the track header
    values = [matrix[0], matrix[1], 0, matrix[2], matrix[3], 0, 0, 0, 1]
    scales = [1 << 16, 1 << 16, 1 << 30] * 3
    packed = [value * scale for value, scale in zip(values, scales, strict=True)]
    data[place : place + 36] = struct.pack(">9i", *packed)
    (tmp_path / "a.mp4").write_bytes(data)
    picture = PORTRAIT[:, ::-1] if mirror else PORTRAIT
    upright = np.rot90(picture, turns)
    info = probe(tmp_path / "a.mp4")
    assert (info.height, info.width) == upright.shape[:2]
    assert info.rotation == 90 * turns
    assert _psnr(decode(tmp_path / "a.mp4")[0], upright) > 30


def test_non_square_pixels_are_made_square(tmp_path: Path):
    path = tmp_path / "sar.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height = 160, 192
        stream.codec_context.sample_aspect_ratio = Fraction(3, 2)
        container.mux(stream.encode(av.VideoFrame.from_ndarray(PORTRAIT, format="rgb24")))
        container.mux(stream.encode(None))
    info = probe(path)
    assert (info.width, info.height, info.pixel_aspect) == (240, 192, 1.5)
    assert decode(path).shape == (1, 192, 240, 3)


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        (VideoLimits(max_bytes=500), "bytes"),
        (VideoLimits(max_pixels=1000), "pixels"),
        (VideoLimits(max_frames=12), "12 frames"),
        (VideoLimits(max_seconds=1.0), "max_seconds"),
    ],
)
def test_limits_hold_and_name_themselves(clip: Path, limits: VideoLimits, message: str):
    with pytest.raises(VideoError, match=message):
        decode(clip, limits=limits)


def test_limits_hold_where_the_header_lies(clip: Path):
    """A header that claims one frame does not hide the forty that are there."""
    data = bytearray(clip.read_bytes())
    for box in (b"mvhd", b"mdhd"):
        place = data.index(box) + 4 + 16
        data[place : place + 4] = struct.pack(">I", 1)
    clip.write_bytes(data)
    with pytest.raises(VideoError, match="frames"):
        list(iter_frames(clip, limits=VideoLimits(max_frames=12)))


@pytest.mark.parametrize(
    "text",
    ["#EXTM3U\n#EXTINF:2,\n{}\n#EXT-X-ENDLIST\n", "ffconcat version 1.0\nfile '{}'\n"],
)
def test_playlist_cannot_read_other_files(clip: Path, tmp_path: Path, text: str):
    bait = tmp_path / "playlist.mp4"
    bait.write_text(text.format(clip))
    with pytest.raises(VideoError, match="cannot be opened"):
        decode(bait)


@pytest.mark.parametrize("content", [b"", b"<html>404</html>", bytes(range(256)) * 40])
def test_what_is_no_video_is_refused_with_a_reason(tmp_path: Path, content: bytes):
    path = tmp_path / "a.mp4"
    path.write_bytes(content)
    with pytest.raises(VideoError, match=r"empty|cannot be opened"):
        probe(path)


def test_missing_file_and_folder_are_refused(tmp_path: Path):
    with pytest.raises(VideoError, match="No such file"):
        probe(tmp_path / "none.mp4")
    with pytest.raises(VideoError, match="regular file"):
        probe(tmp_path)


def test_damaged_packets_are_skipped_and_counted(tmp_path: Path):
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height = 160, 192
        for index, image in enumerate(_moving(12)):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = index, Fraction(1, 10)
            for packet in stream.encode(frame):
                if index == 6:
                    damaged = av.Packet(b"\x00" * 16)
                    damaged.pts, damaged.dts, damaged.stream = packet.pts, packet.dts, stream
                    damaged.time_base = packet.time_base
                    packet = damaged
                container.mux(packet)
    stats = DecodeStats()
    assert len(decode(path, stats=stats)) >= 11
    assert stats.corrupt_packets == 1


def test_bad_spans_are_refused(clip: Path):
    with pytest.raises(VideoError, match="no frame"):
        decode(clip, start=60)
    with pytest.raises(VideoError, match="end is"):
        decode(clip, start=1, end=0.5)
    with pytest.raises(VideoError, match="fps is"):
        decode(clip, fps=0)


def _tone(path: Path, seconds: float) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=48000, layout="mono")
        for begin in range(0, int(48000 * seconds), 1024):
            angle = 2 * np.pi * 440 * np.arange(begin, begin + 1024) / 48000
            samples = (0.3 * np.sin(angle)).astype(np.float32)[None]
            frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout="mono")
            frame.sample_rate, frame.pts = 48000, begin
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def test_sound_is_cut_to_the_length_of_the_video(tmp_path: Path):
    _tone(tmp_path / "tone.m4a", 4)
    result = encode(
        tmp_path / "a.mp4", _grey(20), fps=20, audio_from=tmp_path / "tone.m4a", audio_start=1.5
    )
    assert result.has_audio
    assert not result.audio_note
    with av.open(str(tmp_path / "a.mp4")) as container:
        samples = np.concatenate([f.to_ndarray() for f in container.decode(audio=0)], 1)
    assert samples.shape[1] / 48000 == pytest.approx(1.0, abs=0.05)
    assert np.abs(samples[:, 4800:-4800]).max() > 0.2


def test_missing_sound_does_not_stop_the_video(tmp_path: Path, clip: Path):
    for source in (clip, tmp_path / "none.mp4"):
        result = encode(tmp_path / "a.mp4", _grey(4), fps=20, audio_from=source)
        assert not result.has_audio
        assert source.name in result.audio_note
        assert probe(tmp_path / "a.mp4").num_frames == 4


def test_picture_is_turned_upright_and_transparency_is_white(tmp_path: Path):
    from PIL import Image

    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(PORTRAIT).save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), np.rot90(PORTRAIT, -1))
    Image.fromarray(np.zeros((4, 4, 4), np.uint8)).save(tmp_path / "b.png")
    assert (read_image(tmp_path / "b.png") == 255).all()


def test_bad_pictures_are_refused_with_a_reason(tmp_path: Path):
    from PIL import Image

    Image.fromarray(PORTRAIT).save(tmp_path / "a.bmp")
    (tmp_path / "b.png").write_bytes(b"no picture")
    Image.fromarray(PORTRAIT).save(tmp_path / "c.png")
    cut = (tmp_path / "c.png").read_bytes()[:2000]
    (tmp_path / "d.png").write_bytes(cut)
    for name in ("a.bmp", "b.png", "d.png", "none.png"):
        with pytest.raises(ImageError, match="expected a JPEG"):
            read_image(tmp_path / name)
    with pytest.raises(ImageError, match="pixels"):
        read_image(tmp_path / "c.png", ImageLimits(max_pixels=100))


@pytest.mark.real_data
def test_every_odd_file_decodes_upright_or_says_why(data_root: Path):
    sizes = {
        "codec_error_video.mp4": (400, 240, 300),
        "delayed_start.mp4": (480, 320, 24),
        "issue-134-rotate.mp4": (544, 1280, 240),
        "issue-195-aspect-ratio.mp4": (1024, 576, 628),
        "torchcodec_av1_video.mkv": (640, 360, 125),
        "torchcodec_bt2020_10bit.mp4": (320, 240, 60),
        "torchcodec_bt709_full_range.mp4": (1280, 720, 30),
        "torchcodec_h265_video.mp4": (128, 128, 10),
        "torchcodec_nasa_13013.mp4": (480, 270, 390),
        "torchcodec_nasa_13013_rotated.mp4": (270, 480, 17),
        "torchcodec_test_non_zero_start.mp4": (200, 112, 12),
        "torchcodec_testsrc2_hdr.mp4": (320, 180, 60),
        "torchcodec_testsrc2_mpeg4.avi": (1280, 720, 30),
    }
    for path in sorted((data_root / "odd_media").iterdir()):
        if path.name not in sizes:
            with pytest.raises(VideoError, match=r"no video|not one frame|empty|cannot be opened"):
                decode(path, end=1.0)
            continue
        info = probe(path)
        assert (info.width, info.height, info.num_frames) == sizes[path.name]
        frames = decode(path, end=0.4, max_side=128)
        landscape = info.width > info.height
        assert frames.shape[1 if not landscape else 2] == 128
        assert frames.dtype == np.uint8


@pytest.mark.real_data
def test_high_dynamic_range_keeps_pure_colours(data_root: Path):
    frame = decode(data_root / "odd_media" / "torchcodec_testsrc2_hdr.mp4", end=0.1)[0]
    red, green = frame[150, 20].astype(int), frame[150, 70].astype(int)
    assert red[0] > 200
    assert red[1:].max() < 80
    assert green[1] > 200
    assert green[[0, 2]].max() < 80

"""Decoding in chunks: the frames of one pass over the clip, in a fraction of its memory."""

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl_temporal_decoder import (
    AutoencoderKLTemporalDecoder,
    TemporalDecoder,
)
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from animator.decoder_windows import decode_windows
from animator.temporal_decoder import decode_clip, frame_bytes, temporal_reach


def random_vae(layers_per_block: int = 1, seed: int = 0) -> AutoencoderKLTemporalDecoder:
    """A small VAE whose temporal halves, norms and biases all matter."""
    torch.manual_seed(seed)
    vae = AutoencoderKLTemporalDecoder(
        down_block_types=("DownEncoderBlock2D",) * 4,
        block_out_channels=(32, 64, 64, 64),
        layers_per_block=layers_per_block,
    )
    with torch.no_grad():
        for name, parameter in vae.named_parameters():
            if name.endswith("mix_factor"):
                parameter.normal_(0, 2)
            elif name.endswith("bias"):
                parameter.normal_(0, 0.3)
            elif parameter.ndim == 1:
                parameter.normal_(1, 0.3)
    return vae.eval().requires_grad_(False)


def one_pass(decoder: TemporalDecoder, latents: Tensor) -> Tensor:
    return decoder(latents, torch.zeros(1, len(latents)), num_frames=len(latents))


def clip(num_frames: int, height: int = 4, width: int = 3) -> Tensor:
    """Latents of a picture that changes smoothly, every eighth frame drawn anew."""
    generator = torch.Generator().manual_seed(1)
    keys = torch.randn(1, 4 * height * width, num_frames // 8 + 3, generator=generator)
    still = torch.randn(4, height, width, generator=generator)
    moving = nn.functional.interpolate(keys, size=num_frames, mode="linear", align_corners=True)
    return 5 * still + 3.5 * moving[0].T.reshape(num_frames, 4, height, width)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Layers this small wait for each other's threads longer than they compute."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def decoder() -> TemporalDecoder:
    return random_vae().decoder


@pytest.mark.parametrize("layers_per_block", [1, 2])
def test_chunks_of_any_size_give_the_frames_of_one_pass(layers_per_block):
    decoder = random_vae(layers_per_block).decoder
    for num_frames in (1, 2, 7, 14, 25):
        latents = clip(num_frames)
        expected = one_pass(decoder, latents)
        for chunk_size in (1, 3, 8):
            frames = decode_clip(decoder, latents, chunk_size=chunk_size)
            torch.testing.assert_close(frames, expected, atol=1e-4, rtol=0)
            assert frames.is_contiguous()


def test_separate_chunks_are_not_the_frames_of_one_pass(decoder):
    latents = clip(16)
    separate = torch.cat([one_pass(decoder, chunk) for chunk in latents.split(8)])
    difference = (separate - one_pass(decoder, latents)).abs().amax((1, 2, 3))
    # Not at the seam alone: the statistics differ in every frame.
    assert difference.min() > 0.01
    assert difference.max() > 0.3


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 0.01), (torch.bfloat16, 0.1)])
def test_half_precision_stays_near_float32(decoder, dtype, tolerance):
    latents = clip(9)
    frames = decode_clip(copy.deepcopy(decoder).to(dtype), latents.to(dtype), chunk_size=2)
    assert frames.dtype == dtype
    torch.testing.assert_close(frames.float(), one_pass(decoder, latents), atol=tolerance, rtol=0)


@pytest.mark.parametrize("layers_per_block", [1, 2])
def test_reach_is_what_the_gradient_of_a_frame_touches(layers_per_block):
    # The norms reach over all frames: without them, what is left is the convolutions' own reach.
    decoder = random_vae(layers_per_block).decoder.double()
    for module in decoder.modules():
        if hasattr(module, "temporal_res_block"):
            module.temporal_res_block.norm1 = nn.Identity()
            module.temporal_res_block.norm2 = nn.Identity()
    reach = temporal_reach(decoder)
    middle = reach + 2
    latents = clip(2 * middle + 1, 2, 2).double().requires_grad_()
    one_pass(decoder, latents)[middle].sum().backward()
    touched = latents.grad.abs().amax((1, 2, 3)).nonzero().flatten().tolist()
    assert touched == list(range(middle - reach, middle + reach + 1))


def test_published_size_reaches_29_frames_and_keeps_151_megabytes_of_a_frame():
    with torch.device("meta"):
        vae = AutoencoderKLTemporalDecoder(
            down_block_types=("DownEncoderBlock2D",) * 4,
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
        )
        latents = torch.zeros(1, 4, 72, 128, dtype=torch.float16)
    assert temporal_reach(vae.decoder) == 29
    assert frame_bytes(vae.decoder, latents) == 128 * 576 * 1024 * 2


def peak_bytes(run: Callable[[], object]) -> int:
    """The most that is allocated at once while `run` runs, from the allocator's own records."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        run()
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        most = max(most, live)
    return most


def test_memory_is_a_fraction_of_one_pass_and_grows_by_one_buffer_a_frame(decoder):
    short, long = clip(12, 8, 8), clip(24, 8, 8)
    frame = frame_bytes(decoder, long)
    whole = peak_bytes(lambda: one_pass(decoder, long))
    streamed = peak_bytes(lambda: decode_clip(decoder, long, chunk_size=1))
    assert streamed < 0.25 * whole
    growth = streamed - peak_bytes(lambda: decode_clip(decoder, short, chunk_size=1))
    assert growth < 1.25 * 12 * frame


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a second device")
def test_frames_wait_on_the_host_as_well_as_on_the_device(decoder):
    on_device, latents = copy.deepcopy(decoder).cuda(), clip(9).cuda()
    kept = decode_clip(on_device, latents, buffer_device=torch.device("cuda"))
    moved = decode_clip(on_device, latents, buffer_device=torch.device("cpu"))
    assert moved.device.type == "cuda"
    torch.testing.assert_close(moved, kept, atol=1e-4, rtol=0)


def test_clip_within_the_limit_is_one_pass(decoder):
    latents = clip(20)
    limit = 20 * frame_bytes(decoder, latents)
    frames = decode_windows(decoder, latents, max_buffer_bytes=limit, overlap=8)
    torch.testing.assert_close(frames, one_pass(decoder, latents), atol=1e-4, rtol=0)


def test_windows_of_a_longer_clip_have_no_hard_seam(decoder):
    latents = clip(40)
    expected = one_pass(decoder, latents)
    limit = 24 * frame_bytes(decoder, latents)

    def seam(frames: Tensor) -> float:
        """The largest step from frame to frame, in the same step of one pass."""
        steps, same = ((x[1:] - x[:-1]).square().mean((1, 2, 3)).sqrt() for x in (frames, expected))
        return float((steps / same).max())

    def worst(frames: Tensor) -> float:
        return float((frames - expected).square().mean((1, 2, 3)).sqrt().max() / expected.std())

    faded = decode_windows(decoder, latents, max_buffer_bytes=limit, overlap=8)
    hard = torch.cat([one_pass(decoder, part) for part in latents.split(20)])
    assert faded.shape == expected.shape
    assert seam(faded) < 2 < 3 < seam(hard)
    assert worst(faded) < 0.15 < 0.4 < worst(hard)


@pytest.mark.parametrize("num_frames", [5, 6, 7, 23])
def test_narrow_limits_still_cover_every_frame(decoder, num_frames):
    latents = clip(num_frames, 2, 2)
    limit = 4 * frame_bytes(decoder, latents)
    frames = decode_windows(decoder, latents, max_buffer_bytes=limit, overlap=16)
    assert frames.shape == (num_frames, 3, 16, 16)
    assert frames.isfinite().all()


def test_limit_without_room_for_two_frames_says_what_is_needed(decoder):
    latents = clip(3)
    needed = 2 * frame_bytes(decoder, latents)
    with pytest.raises(ValueError, match=f"at least {needed}"):
        decode_windows(decoder, latents, max_buffer_bytes=needed - 1, overlap=1)


@pytest.mark.parametrize(("num_frames", "chunk_size"), [(0, 2), (3, 0)])
def test_no_frames_and_empty_chunks_are_refused(decoder, num_frames, chunk_size):
    with pytest.raises(ValueError, match="expected at least 1"):
        decode_clip(decoder, torch.zeros(num_frames, 4, 2, 2), chunk_size=chunk_size)

"""Latent codecs: what the weight-free one keeps, and the VAE behind the same seam."""

import copy
import itertools

import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl_temporal_decoder import (
    AutoencoderKLTemporalDecoder,
)
from skimage import data

from animator.block_dct import BlockDCT
from animator.latents import TemporalVAE, open_codec
from animator.temporal_decoder import frame_bytes
from inference.conditioning import to_tensor
from pipelines.framing import fit


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(-10 * torch.log10(((a.clamp(-1, 1) - b) / 2).square().mean()))


def test_weight_free_codec_reconstructs_a_photo():
    image = data.astronaut()
    frames = to_tensor(fit(image.shape[:2], (128, 96), "crop").image(image))[None]
    codec = BlockDCT()
    latents = codec.encode(frames)
    assert latents.shape == (1, 48, 16, 12)
    assert psnr(codec.decode(latents), frames) >= 27


@pytest.mark.real_data
def test_weight_free_codec_reconstructs_unseen_real_frames(data_root):
    from pipelines.video import decode, probe

    codec = BlockDCT()
    clips = sorted((data_root / "video").glob("*.mp4"))
    assert clips
    for clip in clips:
        second = min(1.0, probe(clip).seconds / 2)
        frame = decode(clip, start=second, end=second + 0.2, fps=5, max_side=320)[0]
        target = to_tensor(fit(frame.shape[:2], (128, 96), "crop").image(frame))[None]
        assert psnr(codec.decode(codec.encode(target)), target) >= 27, clip.name


def test_latents_have_about_unit_spread_and_encode_inverts_decode():
    frames = to_tensor(data.astronaut()[None, ::2, ::2])
    codec = BlockDCT()
    latents = codec.encode(frames)
    assert 0.5 < float(latents.std()) < 2
    torch.testing.assert_close(codec.encode(codec.decode(latents)), latents, atol=1e-4, rtol=0)


def test_codec_is_differentiable_to_the_pixels():
    frames = torch.zeros(1, 3, 16, 16, requires_grad=True)
    BlockDCT().encode(frames).sum().backward()
    assert frames.grad.abs().max() > 0


def test_sizes_that_are_no_multiple_of_a_block_are_refused():
    with pytest.raises(ValueError, match=r"20 x 16.*multiples of 8"):
        BlockDCT().encode(torch.zeros(1, 3, 20, 16))


def small_vae(**config) -> AutoencoderKLTemporalDecoder:
    torch.manual_seed(0)
    return AutoencoderKLTemporalDecoder(
        down_block_types=("DownEncoderBlock2D",) * 4,
        block_out_channels=(32, 32, 32, 32),
        layers_per_block=1,
        **config,
    )


def overflowing_vae(**config) -> AutoencoderKLTemporalDecoder:
    """Weights that float16 holds, and activations that it does not, as in the published encoder."""
    vae = small_vae(**config)
    with torch.no_grad():
        vae.encoder.conv_in.weight *= 2e5
    for parameter in vae.parameters():
        parameter.data = parameter.half().float()
    return vae


def test_temporal_vae_fits_the_same_seam(tmp_path):
    small_vae().save_pretrained(tmp_path / "vae")
    codec = open_codec("temporal_vae", tmp_path / "vae")
    assert isinstance(codec, TemporalVAE)
    frames = torch.rand(3, 3, 32, 48) * 2 - 1
    latents = codec.encode(frames)
    assert latents.shape == (3, 4, 4, 6)
    scaled = codec.encode_reference(frames) * codec.scaling_factor
    torch.testing.assert_close(latents, scaled)
    assert codec.decode(latents).shape == frames.shape


def test_temporal_vae_decodes_a_clip_as_one_pass():
    vae = small_vae()
    codec = TemporalVAE(vae, chunk_size=3)
    latents = torch.randn(20, 4, 3, 2)
    with torch.no_grad():
        expected = vae.decode(latents / codec.scaling_factor, num_frames=20).sample
    torch.testing.assert_close(codec.decode(latents), expected, atol=1e-4, rtol=0)


def test_temporal_vae_decodes_a_clip_beyond_its_limit_in_windows():
    vae, latents = small_vae(), torch.randn(20, 4, 2, 2)
    whole = TemporalVAE(vae).decode(latents)
    limit = 12 * frame_bytes(vae.decoder, latents)
    frames = TemporalVAE(vae, max_buffer_bytes=limit, overlap=4).decode(latents)
    difference = (frames - whole).abs().amax((1, 2, 3))
    assert 1e-4 < difference.max() < 0.3
    assert frames.shape == whole.shape


def test_frames_come_a_window_at_a_time_and_from_a_reader_as_from_memory():
    vae, latents = small_vae(), torch.randn(20, 4, 2, 2)
    codec = TemporalVAE(vae, max_frames=8, overlap=3)
    asked = []

    class Reader:
        def __len__(self):
            return len(latents)

        def __getitem__(self, frames):
            asked.append(frames.stop - frames.start)
            return latents[frames]

    parts = list(codec.decode_stream(Reader()))
    assert torch.equal(torch.cat(parts), codec.decode(latents))
    assert max(asked) == max(len(part) for part in parts) == 8
    spans = codec.decode_spans(latents)
    assert spans[0] == (0, 8)
    assert spans[-1] == (12, 20)
    assert all(one[1] - other[0] >= 3 for one, other in itertools.pairwise(spans))
    dct, coefficients = BlockDCT(), torch.randn(20, 48, 2, 2)
    parts = list(dct.decode_stream(coefficients))
    assert [len(part) for part in parts] == [16, 4]
    torch.testing.assert_close(torch.cat(parts), dct.decode(coefficients))


def test_gradient_flows_to_the_latents_where_it_is_asked_for():
    codec = TemporalVAE(small_vae(), gradient_frames=4)
    latents = torch.randn(6, 4, 2, 2, requires_grad=True)
    frames = codec.decode(latents)
    frames.square().sum().backward()
    assert (latents.grad.abs().amax((1, 2, 3)) > 0).all()
    short = latents.detach()[:4]
    torch.testing.assert_close(frames[:4].detach(), codec.decode(short), atol=1e-4, rtol=0)
    with torch.no_grad():
        assert not codec.decode(latents).requires_grad


def test_half_precision_encodes_as_float32_does():
    frames = torch.rand(3, 3, 32, 32) * 2 - 1
    expected = TemporalVAE(overflowing_vae()).encode(frames)
    with torch.no_grad():
        plain = overflowing_vae().half().encode(frames.half()).latent_dist.mode()
    assert not plain.isfinite().all()
    codec = TemporalVAE(overflowing_vae().half())
    latents = codec.encode(frames)
    assert latents.dtype == torch.float16
    torch.testing.assert_close(latents.float(), expected, atol=0, rtol=1e-3)
    moved = TemporalVAE(overflowing_vae()).half()
    torch.testing.assert_close(moved.encode(frames), latents)


def test_encoder_is_left_in_half_precision_where_its_configuration_allows():
    codec = TemporalVAE(small_vae(force_upcast=False).half())
    codec.encode(torch.zeros(1, 3, 16, 16))
    assert codec.vae.encoder.conv_in.weight.dtype == torch.float16


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [5e3, 3e5])
def test_latents_far_from_pictures_decode_to_finite_frames(size, dtype):
    latents = size * torch.randn(5, 4, 2, 2)
    vae = small_vae().to(dtype)
    frames = TemporalVAE(vae).decode(latents)
    assert frames.dtype == dtype
    assert frames.isfinite().all()
    wide = TemporalVAE(copy.deepcopy(vae).float()).decode(latents)
    torch.testing.assert_close(frames.float(), wide, atol=0.05, rtol=0)


@pytest.mark.parametrize("dtype", [None, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("variant", [None, "fp16"])
def test_either_weights_file_opens_in_any_precision(tmp_path, variant, dtype):
    vae = small_vae().to(torch.float16 if variant else torch.float32)
    vae.save_pretrained(tmp_path, variant=variant)
    codec = TemporalVAE.from_folder(tmp_path, dtype)
    assert codec.dtype == (dtype or torch.float32)
    encoder = codec.vae.encoder.conv_in.weight
    assert encoder.dtype == (torch.bfloat16 if dtype == torch.bfloat16 else torch.float32)
    torch.testing.assert_close(encoder, vae.encoder.conv_in.weight.to(encoder.dtype))
    decoded = codec.decode(codec.encode(torch.zeros(2, 3, 16, 16)))
    assert decoded.dtype == codec.dtype


def test_vae_folder_without_weights_says_which_files_are_expected(tmp_path):
    small_vae().save_config(tmp_path)
    with pytest.raises(ValueError, match=r"config\.json and one of .*\.fp16\.safetensors"):
        open_codec("temporal_vae", tmp_path)


def test_unknown_codec_and_missing_folder_say_what_is_expected(tmp_path):
    with pytest.raises(ValueError, match="expected block_dct or temporal_vae"):
        open_codec("jpeg")
    with pytest.raises(ValueError, match="expected a folder"):
        open_codec("temporal_vae", tmp_path / "none")


def test_framing_never_stretches():
    for mode in ("pad", "crop"):
        framing = fit((100, 300), (128, 96), mode)
        corners = framing.points(np.array([[0, 0], [1, 0], [0, 1]], np.float32))
        pixels = corners * [96, 128]
        wide, tall = pixels[1, 0] - pixels[0, 0], pixels[2, 1] - pixels[0, 1]
        assert wide / tall == pytest.approx(3, rel=1e-4)
        image = framing.image(np.full((100, 300, 3), 7, np.uint8))
        assert image.shape == (128, 96, 3)
        assert (image == 7).all()

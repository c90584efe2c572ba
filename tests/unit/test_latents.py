"""Latent codecs: what the weight-free one keeps, and the VAE behind the same seam."""

import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl_temporal_decoder import (
    AutoencoderKLTemporalDecoder,
)
from skimage import data

from animator.block_dct import BlockDCT
from animator.latents import TemporalVAE, open_codec
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


def test_temporal_vae_fits_the_same_seam(tmp_path):
    torch.manual_seed(0)
    vae = AutoencoderKLTemporalDecoder(
        down_block_types=("DownEncoderBlock2D",) * 4,
        block_out_channels=(32, 32, 32, 32),
        layers_per_block=1,
    )
    vae.save_pretrained(tmp_path / "vae")
    codec = open_codec("temporal_vae", tmp_path / "vae")
    assert isinstance(codec, TemporalVAE)
    frames = torch.rand(3, 3, 32, 48) * 2 - 1
    latents = codec.encode(frames)
    assert latents.shape == (3, 4, 4, 6)
    scaled = codec.encode_reference(frames) * codec.scaling_factor
    torch.testing.assert_close(latents, scaled)
    assert codec.decode(latents).shape == frames.shape


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

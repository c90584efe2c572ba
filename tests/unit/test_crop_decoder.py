"""Crops decoded as the whole frame shows them: what is borrowed, what the halo leaves."""

from collections.abc import Iterator

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl_temporal_decoder import (
    AutoencoderKLTemporalDecoder,
)
from torch import Tensor

from animator.block_dct import BlockDCT
from animator.crop_decoder import BorrowingDecoder, Piece, open_crop_decoder
from animator.latents import TemporalVAE

SIZE = (24, 28)
FACE = (slice(8, 16), slice(10, 18))  # cells
PIXELS = (slice(64, 128), slice(80, 144))


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def codec() -> TemporalVAE:
    torch.manual_seed(0)
    vae = AutoencoderKLTemporalDecoder(
        down_block_types=("DownEncoderBlock2D",) * 4,
        block_out_channels=(32, 32, 32, 32),
        layers_per_block=1,
    )
    with torch.no_grad():
        for name, parameter in vae.named_parameters():
            if name.endswith("mix_factor"):
                parameter.normal_(0, 2)
            elif name.endswith("bias"):
                parameter.normal_(0, 0.3)
            elif parameter.ndim == 1:
                parameter.normal_(1, 0.3)
    return TemporalVAE(vae)


@pytest.fixture(scope="module")
def latents() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    coarse = torch.randn(3, 4, SIZE[0] // 4, SIZE[1] // 4, generator=generator)
    return torch.nn.functional.interpolate(coarse, size=SIZE, mode="bilinear")


@pytest.fixture(scope="module")
def full(codec: TemporalVAE, latents: Tensor) -> Tensor:
    return codec.decode(latents)


def around(halo: int, start: int = 0, stop: int = 3) -> Piece:
    rows, columns = FACE
    return Piece(
        start=start,
        stop=stop,
        top=rows.start - halo,
        left=columns.start - halo,
        height=rows.stop - rows.start + 2 * halo,
        width=columns.stop - columns.start + 2 * halo,
    )


def of(latents: Tensor, piece: Piece) -> Tensor:
    return piece.of(latents[piece.start : piece.stop])


def inside(picture: Tensor, halo: int) -> Tensor:
    low, high = 8 * halo, 8 * halo + 64
    return picture[..., low:high, low:high]


def test_a_crop_shows_the_face_of_the_full_decode(codec, latents, full):
    decoder, piece = open_crop_decoder(codec), around(8)
    whole = decoder.look(latents, [piece])
    torch.testing.assert_close(whole, full, atol=1e-5, rtol=0)
    shown = inside(decoder.decode(of(latents, piece), 0), 8)
    torch.testing.assert_close(shown, full[:, :, *PIXELS], atol=2e-4, rtol=0)
    # Decoded as a clip of its own it is another picture.
    alone = inside(open_crop_decoder(codec, "crop").decode(of(latents, piece), 0), 8)
    assert (alone - full[:, :, *PIXELS]).abs().max() > 0.1


def test_runs_of_frames_see_their_neighbours(codec, latents, full):
    height, width = SIZE
    pieces = [
        Piece(start=a, stop=b, top=0, left=0, height=height, width=width)
        for a, b in ((0, 1), (1, 3))
    ]
    decoder = open_crop_decoder(codec)
    decoder.look(latents, pieces)
    parts = [decoder.decode(of(latents, piece), number) for number, piece in enumerate(pieces)]
    torch.testing.assert_close(torch.cat(parts), full, atol=1e-5, rtol=0)


def test_gradients_are_near_those_of_the_full_decode(codec, latents, full):
    wanted = full[:, :, *PIXELS].flip(-1)

    def off(picture: Tensor) -> Tensor:
        return (picture - wanted).square().sum()

    whole = latents.clone().requires_grad_()
    off(codec.decode(whole)[:, :, *PIXELS]).backward()
    assert whole.grad is not None
    exact = whole.grad[:, :, *FACE].flatten()

    def alike(statistics: str, halo: int) -> float:
        decoder, piece = open_crop_decoder(codec, statistics), around(halo)  # type: ignore
        decoder.look(latents, [piece])
        crop = of(latents, piece).clone().requires_grad_()
        off(inside(decoder.decode(crop, 0), halo)).backward()
        own = crop.grad[..., halo : halo + 8, halo : halo + 8].flatten()  # type: ignore
        return float(torch.nn.functional.cosine_similarity(own, exact, dim=0))

    borrowed = alike("frame", 8)
    assert borrowed > 0.9
    assert borrowed > alike("crop", 8)


def test_cells_that_are_independent_need_no_halo():
    codec = BlockDCT()
    latents = torch.randn(2, codec.latent_channels, 6, 8)
    piece = Piece(start=0, stop=2, top=2, left=3, height=2, width=4)
    decoder = open_crop_decoder(codec)
    assert decoder.look(latents, [piece]) is None
    expected = codec.decode(latents)[..., 16:32, 24:56]
    torch.testing.assert_close(decoder.decode(of(latents, piece), 0), expected)


def test_a_crop_has_nothing_to_borrow_before_the_pass(codec, latents):
    with pytest.raises(RuntimeError, match="look"):
        BorrowingDecoder(codec).decode(latents, 0)

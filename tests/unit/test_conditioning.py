"""Frozen encoders: tokens, embeddings, masks; what a model names is what it gets."""

import dataclasses

import numpy as np
import pytest
import torch
from skimage import data

from animator.config import tiny
from inference.conditioning import ReferenceEncoder, face_mask, to_frames, to_tensor
from pipelines.faces import Face

FACE_BOX = np.array([0.33, 0.1, 0.55, 0.38], np.float32)  # of scikit-image's portrait


def portrait() -> np.ndarray:
    return data.astronaut()


def test_pixels_survive_the_way_to_tensors_and_back():
    image = portrait()[None]
    assert np.array_equal(to_frames(to_tensor(image)), image)


def test_image_token_tells_pictures_apart_and_small_changes_do_not():
    encoder = ReferenceEncoder(tiny())
    image = to_tensor(portrait())[None]
    token = encoder.image_token(image)
    assert token.shape == (1, 1, tiny().cross_attention_dim)
    near = encoder.image_token(image + 0.01 * torch.randn_like(image))
    far = encoder.image_token(image.flip(-1))
    assert (token - near).norm() < 0.1 * (token - far).norm()


def test_face_embedding_ignores_brightness_and_sees_another_face():
    encoder = ReferenceEncoder(tiny())
    image = portrait()
    face = Face(box=FACE_BOX, score=1.0)
    own = encoder.face_embedding(image, face)
    darker = encoder.face_embedding((image * 0.7).astype(np.uint8), face)
    other = encoder.face_embedding(image, Face(box=FACE_BOX + 0.3, score=1.0))
    cosine = torch.nn.functional.cosine_similarity
    assert cosine(own, darker, dim=0) > 0.98
    assert cosine(own, other, dim=0) < 0.8
    assert encoder.face_embedding(image, None).abs().max() == 0


def test_face_mask_is_the_covered_share_of_each_cell():
    boxes = np.zeros((2, 1, 4), np.float32)
    boxes[0, 0] = (0.25, 0.0, 0.625, 0.5)
    mask = face_mask(boxes, (16, 32), 8)
    assert mask.shape == (2, 1, 2, 4)
    assert mask[0, 0].tolist() == [[0, 1, 0.5, 0], [0, 0, 0, 0]]
    assert mask[1].max() == 0


def test_encoders_that_are_not_there_are_named(no_models, tmp_path):
    with pytest.raises(ValueError, match="expected an image_encoder folder"):
        ReferenceEncoder(dataclasses.replace(tiny(), image_token="clip_vision"))
    with pytest.raises(ValueError, match="expected a folder with"):
        ReferenceEncoder(dataclasses.replace(tiny(), codec="temporal_vae"), tmp_path)
    with pytest.raises(ValueError, match="thumbnail or insightface"):
        ReferenceEncoder(dataclasses.replace(tiny(), face_embedding="other"))
    with pytest.raises(ValueError, match="latent channels"):
        ReferenceEncoder(dataclasses.replace(tiny(), latent_channels=4))


@pytest.mark.real_data
def test_a_real_recogniser_is_used_where_the_model_names_it(models_env):
    config = dataclasses.replace(tiny(), face_embedding="insightface", face_embedding_dim=128)
    encoder = ReferenceEncoder(config)
    assert encoder.recogniser is not None
    faces = encoder.recogniser.detect(portrait())
    own = encoder.face_embedding(portrait(), faces[0])
    assert own.shape == (128,)
    assert own.abs().max() > 0
    assert "non-commercial" in encoder.models["face_embedding"]["licence"]
    with pytest.raises(ValueError, match=r"embeddings of 128.*trained on 512"):
        ReferenceEncoder(dataclasses.replace(config, face_embedding_dim=512))


def test_a_model_taught_one_rate_is_told_that_rate():
    own = ReferenceEncoder(tiny())
    torch.testing.assert_close(own.time_ids(25.0, 1), torch.tensor([[24.0, 127, 0.02]]))
    assert own.time_ids(torch.tensor([8.0, 5.0]), 2)[:, 0].tolist() == [7.0, 4.0]
    published = dataclasses.replace(tiny(), conditioning_fps=7.0, motion_bucket=100)
    ids = ReferenceEncoder(published).time_ids(25.0, 2)
    torch.testing.assert_close(ids, torch.tensor([[6.0, 100, 0.02]] * 2))


@pytest.mark.real_data
def test_the_recognition_network_sees_the_channels_in_the_order_it_was_trained_on(models_env):
    config = dataclasses.replace(tiny(), face_embedding="insightface", face_embedding_dim=128)
    image = portrait()
    rgb = ReferenceEncoder(config)
    bgr = ReferenceEncoder(dataclasses.replace(config, face_channel_order="bgr"))
    face = rgb.recogniser.detect(image)[0]
    swapped = np.ascontiguousarray(image[..., ::-1])
    assert torch.equal(bgr.face_embedding(image, face), rgb.face_embedding(swapped, face))
    assert not torch.equal(bgr.face_embedding(image, face), rgb.face_embedding(image, face))


def test_a_picture_for_the_image_encoder_keeps_nothing_of_its_frame(tmp_path):
    from tests.unit.published_folders import WIDTH, small_svd

    folder = small_svd(tmp_path)
    config = dataclasses.replace(tiny(), image_token="clip_vision", cross_attention_dim=WIDTH)
    encoder = ReferenceEncoder(config, folder)
    assert encoder.token_takes_native
    image = to_tensor(portrait()[:300])[None]
    stacked = encoder.resize_for_token(image)
    assert stacked.shape == (1, 3, 224, 224)
    # Resized before, as in a training batch, or by the encoder itself: the same token.
    torch.testing.assert_close(
        encoder.image_token(stacked), encoder.image_token(image), atol=1e-5, rtol=0
    )
    assert encoder.models["image_token"]["name"] == "clip_vision"

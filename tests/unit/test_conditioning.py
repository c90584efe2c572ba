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


def test_encoders_that_are_not_there_are_named(no_models):
    with pytest.raises(ValueError, match="thumbnail"):
        ReferenceEncoder(dataclasses.replace(tiny(), image_token="clip_vision"))
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

"""Picture metrics: known values, boxes, shapes that do not fit."""

import numpy as np
import pytest

from inference.metrics import compare, cut, person_boxes, pixel_box, psnr, ssim


def test_psnr_of_a_known_error():
    truth = np.full((10, 10, 3), 100, np.uint8)
    assert psnr(truth + 5, truth) == pytest.approx(20 * np.log10(255 / 5))
    assert psnr(truth, truth) == 100


def test_ssim_falls_with_noise():
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 255, (32, 32, 3), np.uint8)
    noisy = np.clip(truth.astype(int) + rng.normal(0, 40, truth.shape), 0, 255).astype(np.uint8)
    assert ssim(truth, truth) == pytest.approx(1)
    assert ssim(noisy, truth) < 0.95


def test_only_the_person_counts_in_the_box():
    truth = np.zeros((2, 40, 40, 3), np.uint8)
    frames = truth.copy()
    frames[:, :, 30:] = 255
    boxes = np.array([[0.1, 0.1, 0.5, 0.9]] * 2)
    scores = compare(frames, truth, boxes)
    assert scores["psnr_person"] == 100
    assert scores["psnr"] < 10
    with pytest.raises(ValueError, match="truth has"):
        compare(frames[:1], truth, boxes)


def test_boxes_follow_visible_joints_and_stay_inside():
    keypoints = np.array([[[0.4, 0.2], [0.6, 0.8], [5.0, 5.0]]])
    box = person_boxes(keypoints, np.array([[1.0, 0.9, 0.1]]), 0.3, margin=0.1)[0]
    np.testing.assert_allclose(box, [0.38, 0.14, 0.62, 0.86], atol=1e-6)
    nobody = person_boxes(keypoints, np.zeros((1, 3)), 0.3)[0]
    np.testing.assert_allclose(nobody, [0, 0, 1, 1])
    face_too = np.concatenate([np.tile(keypoints[:, :1], (1, 18, 1)), np.ones((1, 110, 2))], 1)
    body = person_boxes(face_too, np.ones((1, 128)), 0.3)[0]
    np.testing.assert_allclose(body, [0.4, 0.2, 0.4, 0.2], atol=1e-6)
    x0, y0, x1, y1 = pixel_box(np.array([0.99, 0.99, 1.0, 1.0]), (20, 30))
    assert (x1 - x0, y1 - y0) == (8, 8)
    assert cut(np.zeros((20, 30, 3), np.uint8), np.array([0, 0, 0.5, 1.0])).shape == (20, 15, 3)

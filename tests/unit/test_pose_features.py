"""Pose images and features of a clip: made on demand, the same whoever asks, bounded in memory."""

import numpy as np
import pytest
import torch

from animator.pose_net import PoseNet
from inference.conditioning import pose_images, to_tensor
from inference.pose_features import GROUP, KEPT, PoseFeatures, PoseImages

FRAMES, SIZE = 6 * GROUP + 5, (32, 48)


@pytest.fixture
def images() -> PoseImages:
    rng = np.random.default_rng(0)
    points = rng.uniform(0.2, 0.8, (FRAMES, 1, 18, 2)).astype(np.float32)
    return PoseImages(points, np.ones((FRAMES, 1, 18), np.float32), SIZE, 0.3, "bold")


def test_pictures_are_the_same_each_time_in_any_order(images):
    whole = pose_images(images.keypoints, images.score, SIZE, 0.3, "bold")
    assert len(images) == FRAMES
    for _ in range(2):
        assert np.array_equal(images[[7, 2]], whole[[7, 2]])
    assert np.array_equal(images[range(FRAMES)], whole)


def test_features_of_a_frame_do_not_depend_on_what_else_is_asked_for(images):
    torch.manual_seed(0)
    net = PoseNet(32, (3, 16, 32, 64, 128)).eval()
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    groups = []
    net.register_forward_hook(lambda _, given, made: groups.append(len(given[0])))
    features = PoseFeatures(net, images)
    with torch.no_grad():
        expected = net(to_tensor(images[range(GROUP, 2 * GROUP)]))
    groups.clear()
    window = list(range(GROUP - 2, GROUP + 6))
    got = features[window]
    assert torch.equal(got[2:], expected[:6])
    assert torch.equal(features[[GROUP + 3, 0]][0], expected[3])
    assert groups == [GROUP, GROUP]  # each group once
    features[list(range(FRAMES))]
    assert len(features._kept) == KEPT
    assert groups[-1] == FRAMES % GROUP
    assert torch.equal(features[window], got)

"""Colours of a drawn skeleton, RGB in 0..255 at full confidence."""

import colorsys

import numpy as np

from animator.keypoints import HAND_EDGES

# Of limbs and of joints: hues of OpenPose's body model; limb 0 is red.
COLOURS = np.array(
    [
        (255, 0, 0),
        (255, 85, 0),
        (255, 170, 0),
        (255, 255, 0),
        (170, 255, 0),
        (85, 255, 0),
        (0, 255, 0),
        (0, 255, 85),
        (0, 255, 170),
        (0, 255, 255),
        (0, 170, 255),
        (0, 85, 255),
        (0, 0, 255),
        (85, 0, 255),
        (170, 0, 255),
        (255, 0, 255),
        (255, 0, 170),
        (255, 0, 85),
    ],
    np.float32,
)
# Of a hand's bones: the hues once round.
HAND_COLOURS = np.array(
    [colorsys.hsv_to_rgb(edge / len(HAND_EDGES), 1, 1) for edge in range(len(HAND_EDGES))]
) * np.float32(255)
HAND_POINT_COLOUR = np.array((0, 0, 255), np.float32)
FACE_COLOUR = np.array((255, 255, 255), np.float32)

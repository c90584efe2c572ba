"""What a clip's conditions are put together from: whose face, whose place, on which device."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from animator.keypoints import BODY
from animator.model import Animator
from inference.guidance import Conditions
from inference.people import across, faces_of_people
from inference.perception import Pose
from inference.pose_features import PoseFeatures, PoseImages
from inference.regions import ClipRegions
from inference.retarget import Retargeted
from pipelines.faces import Face


def moved(conditions: Conditions, poses: PoseImages, animator: Animator) -> Conditions:
    """Conditions for a replica of the animator, on its device."""
    place = animator.place
    return Conditions(
        conditions.context.to(place),
        PoseFeatures(animator.pose_net, poses),
        conditions.reference.to(place),
        conditions.time_ids.to(place),
        None if conditions.regions is None else conditions.regions.to(place),
    )


def faces_of(
    reference: Pose, alignment: Retargeted, face: Face | None, faces: Sequence[Face]
) -> dict[int, Face]:
    """Faces of the picture's people, by the person's number; the main person is the first."""
    if len(alignment.people) < 2:
        # Whoever is animated alone has the face that was chosen.
        return {} if face is None else {alignment.main.reference: face}
    return faces_of_people(reference.keypoints, reference.score, faces, face, reference.threshold)


def faceless_people(
    reference: Pose, alignment: Retargeted, faces: Mapping[int, Face]
) -> tuple[int, ...]:
    """Animated people of the picture without a face, by their place.

    Args:
        faces: of the picture's people, by the person's number.

    Returns:
        places among those who are animated, from left to right and from 1, as in
        `alignment.people`.
    """
    people = [person.reference for person in alignment.people]
    if len(people) > 1:
        points = torch.from_numpy(reference.keypoints[None])
        seen = torch.from_numpy(reference.score >= reference.threshold)[None].float()
        place = across(points[:, :, BODY], seen[:, :, BODY])
        people.sort(key=lambda person: float(place[person]))
    return tuple(place for place, person in enumerate(people, 1) if person not in faces)


def regions_of(alignment: Retargeted, poses: PoseImages, latents: Tensor) -> ClipRegions | None:
    """Whose place is where, in the order of the people that are animated."""
    if len(alignment.people) < 2:
        return None
    people = [person.driving for person in alignment.people]
    place = latents.shape[-2], latents.shape[-1]
    return ClipRegions(
        poses.keypoints[:, people], poses.score[:, people], place, poses.threshold, latents.device
    )

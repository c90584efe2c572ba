"""Whether to trust an alignment, in one sentence, and what to do about each warning."""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

from inference.alignment.verdict import PersonAlignment

Level = Literal["trust", "look", "reject"]

# A phrase of each warning about an alignment or a clip with cuts, and what to do about it.
ADVICE = {
    "beyond the limits": "Look at the pictures: where the person stands right, leave it so. Where "
    "they are too small, large or turned, widen --max-scale or --max-rotation, or cut the picture "
    "or the clip so that the people are of more equal size.",
    "is extreme: alignment is tested for factors": "Cut the picture or the clip closer around the "
    "person, so that both are of about the same size in their frames.",
    "is extreme: alignment is tested for up to": "Turn the picture or the clip upright; where one "
    "of them shows somebody lying down, choose another.",
    "joints are seen in both": "Choose a picture that shows what the clip shows: a whole body for "
    "a whole body, head and shoulders for head and shoulders.",
    "frames could be used": "Cut the clip to the part that shows the person, or choose a pose "
    "backend that finds them (`animator models pull dwpose`).",
    "the frames disagree": "The curves below show where. Cut the clip there where the camera cuts "
    "or zooms, or where another person is followed; where the person really comes nearer or turns "
    "away, this is as it should be, and one transform keeps it.",
    "blended across": "Cut the clip there, and animate each shot by itself.",
    "leave the picture": "What lies outside is not drawn. Legs that a half-length picture never "
    "showed are no loss; for hands or the head choose a clip with smaller movements, or give the "
    "picture a border.",
    "the alignment is unsure": "Compare the columns below in the frame most like the picture. "
    "Where another one fits, choose that: --alignment closed-form, or --no-keep-aligned where "
    "nothing was moved. Where none fits, choose a clip that begins in a pose like the picture's.",
    "neither scaled nor turned": "Choose a picture and a clip that show the same parts of the "
    "body, three joints at least; otherwise the person's size is a guess.",
    "no joint is seen in both": "Choose a picture and a clip that show the same parts of the body; "
    "these share none, and nothing can be aligned.",
}
LEVELS: tuple[Level, ...] = ("trust", "look", "reject")
# Between the learned and the closed form, from which one should compare them.
APART_SCALE, APART_DEGREES = 1.3, 12.0
_OTHER = "Look at the pictures below before you compute a video."


class Verdict(NamedTuple):
    """How far to trust an alignment."""

    level: Level
    text: str  # one sentence


def advise(warning: str) -> str:
    """What to do about a warning, in a sentence or two."""
    return next((advice for phrase, advice in ADVICE.items() if phrase in warning), _OTHER)


def decide(people: Sequence[PersonAlignment]) -> Verdict:
    """The verdict on the person who is aligned worst."""
    ranks = [LEVELS.index(_level(person)) for person in people]
    worst = ranks.index(max(ranks))
    whose = f" for person {worst + 1}" if len(people) > 1 else ""
    level = LEVELS[ranks[worst]]
    return Verdict(level, _sentence(level, people[worst], whose))


def compare_forms(learned: PersonAlignment, closed: PersonAlignment) -> str | None:
    """A note where the learned alignment and the closed form are far apart."""
    apart = math.exp(abs(math.log(learned.scale / closed.scale)))
    turned = abs((learned.degrees - closed.degrees + 180) % 360 - 180)
    if closed.method != "closed_form" or (apart < APART_SCALE and turned < APART_DEGREES):
        return None
    return (
        f"the closed form finds scale {closed.scale:.2f} and {closed.degrees:+.0f}° instead of "
        f"{learned.scale:.2f} and {learned.degrees:+.0f}°: compare the columns, and where its "
        "figure has the person's size and the other has not, use --alignment closed-form"
    )


def _level(person: PersonAlignment) -> Level:
    if person.method in ("translation", "none") or person.confidence == "low":
        return "reject"
    if person.warnings or person.confidence != "high":
        return "look"
    return "trust"


def _sentence(level: Level, person: PersonAlignment, whose: str) -> str:
    if level == "trust":
        fit = "fit as they are" if person.method == "kept" else "fit"
        return f"Trust it: the poses {fit}, and nothing speaks against them."
    if level == "reject":
        if person.method in ("translation", "none"):
            return (
                f"Do not use it{whose}: the picture and the clip have too few joints in common to "
                "align them."
            )
        if person.method == "kept":
            return f"Do not use it{whose}: nothing was moved, and it is unsure whether to."
        return f"Do not use it{whose} unless the pictures below convince you: it is unsure."
    if person.warnings:
        many = len(person.warnings)
        count = "there is a warning" if many == 1 else f"there are {many} warnings"
        return f"Look closer{whose}: {count} about this alignment."
    if person.confidence == "medium":
        return f"Look closer{whose}: the alignment is fairly sure, not more."
    return f"Look closer{whose}: this method cannot say how sure it is."

"""The size that each clip is trained at."""

import math
from collections.abc import Sequence

from pipelines.clips import ClipStore
from training.animate_config import AnimateConfig
from training.cached_latents import CachedLatents

Size = tuple[int, int]  # (height, width)


def clip_sizes(
    config: AnimateConfig, clips: ClipStore, cached: CachedLatents | None = None
) -> list[Size]:
    """(height, width) that each clip is trained at.

    Raises:
        ValueError: the latents are of other sizes than the settings ask for.
    """
    buckets = config.sizes()
    if cached is None:
        one = (config.animator.height, config.animator.width)
        return [bucket_of(clips.size(i), buckets) if buckets else one for i in range(len(clips))]
    sizes = cached.sizes()
    wanted = set(buckets or [(config.animator.height, config.animator.width)])
    if not buckets and cached.native:
        return sizes
    if other := sorted(set(sizes) - wanted):
        given, known = (
            ", ".join(f"{height}x{width}" for height, width in sorted(part))
            for part in (other, wanted)
        )
        raise ValueError(
            f"{cached.store.root} holds latents of frames of {given}, but the model is to be "
            f"trained on {known}: encode with --size, or set task.buckets, or "
            "task.animator.height and task.animator.width."
        )
    return sizes


def bucket_of(size: Size, buckets: Sequence[Size]) -> Size:
    """The bucket for clips of a size: of the nearest shape, the largest that they fill.

    A clip smaller than all buckets of that shape goes to the smallest.
    """

    def unlike(bucket: Size) -> tuple[float, bool, int]:
        shape = math.log(bucket[1] * size[0] / (bucket[0] * size[1]))
        fills = bucket[0] <= size[0] or bucket[1] <= size[1]
        area = bucket[0] * bucket[1]
        return round(abs(shape), 6), not fills, -area if fills else area

    return min(buckets, key=unlike)

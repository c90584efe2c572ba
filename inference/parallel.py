"""A clip's windows through one denoiser, or through several at the same time.

Each device has a replica of the animator and a thread. Windows are grouped and their shares handed
out in the order of the clip whoever computed them, so the number of devices changes nothing.

Shapes: B windows in one call, W frames of a window, C latent channels, h w latent size.
"""

import contextlib
import copy
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from animator.model import Animator
from inference.guidance import GuidedDenoiser
from inference.sampler import ReadFrames
from inference.windows import Window

AHEAD = 2  # calls a device that wait or are under way


def replicas(animator: Animator, devices: Sequence[str]) -> list[Animator]:
    """The animator on each device; itself where none is named, or for the first on its own.

    Raises:
        ValueError: for a device that is not there.
    """
    if not devices:
        return [animator]
    own = animator.place
    made: list[Animator] = []
    for name in devices:
        try:
            place = torch.device(name)
            if place.type == "cuda" and place.index is None:
                place = torch.device("cuda", 0)
            taken = any(replica is animator for replica in made)
            made.append(
                animator if place == own and not taken else copy.deepcopy(animator).to(place)
            )
        except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
            reason = str(error).splitlines()[0]
            raise ValueError(
                f"Got device {name!r} in devices, but expected one of this machine, such as cpu "
                f"or cuda:0 ({reason})."
            ) from None
    return made


class WindowedDenoiser:
    """D(x; sigma) of a clip (`inference.sampler.ClipDenoiser`), window by window.

    Args:
        denoisers: one a device.
        plan: the windows of a step.
        batch: windows that go through a network together.
        refresh_every: steps from one whole call of a network to the next; between them the
            denoisers' caches are used, and windows stay where they were.
    """

    def __init__(
        self,
        denoisers: Sequence[GuidedDenoiser],
        plan: Callable[[int], Sequence[Window]],
        batch: int = 1,
        refresh_every: int = 1,
    ):
        self.denoisers = denoisers
        self.plan = plan
        self.batch = batch
        self.refresh_every = refresh_every

    def __call__(
        self, read: ReadFrames, sigma: Tensor, step: int
    ) -> Iterator[tuple[tuple[int, ...], Tensor]]:
        """Frames and shares `(W, C, h, w)` of the prediction, on the host, in order."""
        since_refresh = step % self.refresh_every
        windows = list(self.plan(step - since_refresh))
        if not since_refresh:
            self._forget()
        groups = [windows[i : i + self.batch] for i in range(0, len(windows), self.batch)]
        predictions = self._predictions(groups, read, sigma, refresh=not since_refresh)
        for group, predicted in zip(groups, predictions, strict=True):
            for window, own in zip(group, predicted, strict=True):
                yield window.frames, own * window.shares.reshape(-1, 1, 1, 1)

    def _forget(self) -> None:
        """Drop the features of windows as they lay before."""
        for denoiser in self.denoisers:
            if denoiser.cache is not None:
                denoiser.cache.clear()

    def _predictions(
        self,
        groups: Sequence[Sequence[Window]],
        read: ReadFrames,
        sigma: Tensor,
        *,
        refresh: bool,
    ) -> Iterator[Tensor]:
        def predict(denoiser: GuidedDenoiser, group: Sequence[Window]) -> Tensor:
            frames = [window.frames for window in group]
            x = torch.stack([read(f) for f in frames])
            return denoiser(x, frames, sigma, refresh=refresh).cpu()

        if len(self.denoisers) == 1:
            for group in groups:
                yield predict(self.denoisers[0], group)
            return
        count = len(self.denoisers)
        with contextlib.ExitStack() as stack:
            # A group's device is fixed, so that its features of the step before are there.
            pools = [
                stack.enter_context(ThreadPoolExecutor(1, thread_name_prefix="windows"))
                for _ in self.denoisers
            ]
            waiting: deque[Future[Tensor]] = deque()
            try:
                for number, group in enumerate(groups):
                    own = number % count
                    waiting.append(pools[own].submit(predict, self.denoisers[own], group))
                    if len(waiting) >= AHEAD * count:
                        yield waiting.popleft().result()
                while waiting:
                    yield waiting.popleft().result()
            finally:
                for future in waiting:
                    future.cancel()

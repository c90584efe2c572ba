"""What a job server is asked to do, and what of it can be refused before anything is begun."""

import ipaddress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from inference.engine_factory import DEFAULT_FACTORY, absolute_alignment, absolute_changes
from inference.presets import preset
from inference.serving.jobs import MAX_ATTEMPTS
from inference.serving.uploads import UploadLimits


class ServeError(ValueError):
    """A server that cannot be started as asked; the message says what to change."""


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """How to run the job server.

    preset: of `inference.presets`, which `changes` are made to; None: the model's own settings.
    changes: of the model's own settings, as "sampling.churn=40".
    lease_seconds: the longest an engine may stay silent.
    """

    model_dir: Path
    data_dir: Path
    host: str = "127.0.0.1"
    port: int = 8000
    engines: int = 1
    face: str = "auto"
    pose: str = "auto"
    alignment: str = "auto"
    preset: str | None = None
    changes: tuple[str, ...] = ()
    engine_factory: str = DEFAULT_FACTORY
    limits: UploadLimits = field(default_factory=UploadLimits)
    max_queued: int = 1000
    max_attempts: int = MAX_ATTEMPTS
    lease_seconds: float = 900.0

    def __post_init__(self) -> None:
        for name in ("engines", "max_queued", "max_attempts"):
            if getattr(self, name) < 1:
                raise ServeError(f"{name} is {getattr(self, name)}, expected 1 or more")
        if not 0 <= self.port < 65536:
            raise ServeError(f"port is {self.port}, expected 0 to 65535")
        if self.preset is not None:
            preset(self.preset)

    @property
    def local_only(self) -> bool:
        """Whether only programs of this machine can reach the server."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    def absolute(self) -> "ServerConfig":
        """The same for processes with another working folder."""
        return replace(
            self,
            model_dir=self.model_dir.absolute(),
            data_dir=self.data_dir.absolute(),
            alignment=absolute_alignment(self.alignment),
            changes=absolute_changes(self.changes),
        )

    def engine_options(self) -> dict[str, Any]:
        """How the engine is opened."""
        options = {"preset": self.preset, "changes": self.changes}
        return {
            "face": self.face,
            "pose": self.pose,
            "alignment": self.alignment,
            **{name: value for name, value in options.items() if value},
        }

    def check_settings(self) -> None:
        """Find what is wrong with the preset and the changes now, not when jobs are taken already.

        Raises:
            ValueError: for settings that there are not, values that cannot be, and a certificate
                and key that cannot sign; for a model folder that does not say its own settings.
        """
        if self.preset is None and not self.changes:
            return
        import torch  # of a process that otherwise does without

        from animator.weights import read_config
        from inference.provenance import Signer
        from inference.settings import chosen_settings, settings_of

        own = settings_of(read_config(self.model_dir))
        device = "cuda" if torch.cuda.is_available() else "cpu"
        named = None if self.preset is None else preset(self.preset)
        _, settings = chosen_settings(own, device, named, self.changes)
        if settings.provenance.signed:
            Signer(settings.provenance)

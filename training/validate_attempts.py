"""Where a validation runs: in a child process of the driver, or as a task of Ray."""

import os
import pickle
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from training.config import TrainConfig
from training.validate_checkpoint import validate_checkpoint


class Attempt(Protocol):
    """One validation that runs elsewhere."""

    def poll(self) -> bool:
        """Whether it is over."""
        ...

    def fault(self) -> str | None:
        """Why it failed, once it is over."""
        ...

    def stop(self) -> None: ...


class ChildProcess:
    """A validation in a child process, which ends when this one does."""

    def __init__(self, config: TrainConfig, out: Path, folder: Path) -> None:
        self._log = folder / "log.txt"
        payload = {
            "sys_path": [str(Path(path).resolve()) for path in sys.path if Path(path).is_dir()],
            "arguments": pickle.dumps((config, out, folder)),
            "threads": config.run.threads_per_worker or max(1, (os.cpu_count() or 1) // 2),
        }
        command = [sys.executable, "-m", "training.validate_checkpoint"]
        root = str(Path(__file__).resolve().parents[1])
        path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env={**os.environ, "PYTHONPATH": path},
                start_new_session=True,  # Ctrl-C asks training to stop, with a checkpoint
            )
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.write(pickle.dumps(payload))
            self._process.stdin.flush()

    def poll(self) -> bool:
        return self._process.poll() is not None

    def fault(self) -> str | None:
        self._close()
        if self._process.returncode == 0:
            self._log.unlink(missing_ok=True)
            return None
        lines = self._log.read_text(errors="replace").strip().splitlines()
        return lines[-1] if lines else f"it ended with code {self._process.returncode}"

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()
        self._close()

    def _close(self) -> None:
        if self._process.stdin is not None:
            with suppress(OSError):
                self._process.stdin.close()


class RayTask:
    """A validation as a task of Ray, on whatever node has room.

    Attributes:
        slow: it has no GPU, though training has some.
    """

    def __init__(self, config: TrainConfig, out: Path, folder: Path, workers: int) -> None:
        import ray

        gpus = ray.cluster_resources().get("GPU", 0.0)
        used = gpus > 0 if config.run.use_gpu is None else config.run.use_gpu
        free = gpus - (workers if used else 0)
        share = config.validate.num_gpus
        if share is None:
            share = 1.0 if used and free >= 1 else 0.0
        self.slow = bool(used and not share)
        options = {"num_cpus": 1, "num_gpus": share, "max_retries": 1}
        remote: Any = ray.remote(**options)(validate_checkpoint)
        self._ray, self._task = ray, remote.remote(config, out, folder, Path.cwd())

    def poll(self) -> bool:
        return bool(self._ray.wait([self._task], timeout=0)[0])

    def fault(self) -> str | None:
        try:
            self._ray.get(self._task)
        except Exception as error:
            cause = getattr(error, "cause", None) or error
            lines = str(cause).strip().splitlines()
            return f"{type(cause).__name__}: {lines[0] if lines else ''}"
        return None

    def stop(self) -> None:
        with suppress(Exception):
            self._ray.cancel(self._task, force=True)

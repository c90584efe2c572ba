"""Verbs as jobs on a Ray cluster: the same arguments, checked here, run there.

A job is the verb's own command line with a runtime environment around it. The driver runs on the
cluster, so this machine may go away; what the verb has done when a job is killed, it does not do
again when the job is submitted once more.
"""

import os
import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata, resources
from pathlib import Path
from typing import Any, Literal

from inference.engine_factory import ALIGNMENT_WORDS, PATH_SETTINGS
from infra.console import HOME_PACKAGES

Ship = Literal["nothing", "code", "all"]
VERBS = ("curate", "encode", "train", "batch")
# Settings of each verb (`--set NAME=VALUE`) whose values are paths.
SETTINGS_OF_PATHS = {
    "curate": ("download.cookies_file",),
    "train": tuple(
        f"task.{name}"
        for name in ("alignment", "latents", "motion", "shards", "start", "validation")
    ),
    "batch": PATH_SETTINGS,
}
_NO_PATHS = ("", "none", "null")  # values of such a setting that leave it empty
DEFAULT_ADDRESS = "http://127.0.0.1:8265"
DISTRIBUTION = "stableanimator-pp"
# Models are one thread each and workers fill the cores; a log should not wait in a buffer.
_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
# Training's own, as infra/env has them with their reasons.
_TRAINING = {
    "NCCL_DEBUG": "WARN",
    "NCCL_IB_TIMEOUT": "22",
    "NCCL_SOCKET_IFNAME": "^lo,docker,virbr",
    "PYTORCH_ALLOC_CONF": "expandable_segments:True",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.1",
    "RAY_worker_niceness": "0",
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
    "TORCH_NCCL_TRACE_BUFFER_SIZE": "2000",
}
GRACE_SECONDS = 600  # for a checkpoint, where a job is stopped or its machine is taken
_POLL_SECONDS = 2.0
# A dashboard answers before the process beside it that starts jobs.
_START_SECONDS = 30.0
_NO_AGENT = "No available agent"  # Ray's words


class SubmitError(ValueError):
    """A job that cannot be sent or found; the message says how to mend it."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """A verb with its arguments, and what the cluster needs to run it.

    ship: `nothing` where the cluster's machines have this package, `code` to send the package's
        own files with the job, `all` to have each machine install its requirements as well.
    env: environment variables of the driver and all workers.
    cpus: of the driver itself; the workers ask for their own.
    """

    verb: str
    arguments: tuple[str, ...]
    ship: Ship = "nothing"
    env: Mapping[str, str] = field(default_factory=dict)
    cpus: float = 0.0
    name: str | None = None

    @property
    def environment(self) -> dict[str, str]:
        """Variables of the driver and all workers."""
        return {**_ENVIRONMENT, **(_TRAINING if self.verb == "train" else {}), **self.env}

    @property
    def entrypoint(self) -> str:
        """The command line that the cluster runs."""
        return shlex.join(["python", "-m", "infra", self.verb, *self.arguments])

    def runtime_env(self) -> dict[str, Any]:
        """Ray's runtime environment: variables, and the code where it is sent along."""
        found: dict[str, Any] = {"env_vars": self.environment}
        if self.ship in ("code", "all"):
            found["py_modules"] = [str(_package_folder(name)) for name in HOME_PACKAGES]
            found["excludes"] = ["**/__pycache__", "**/*.pyc"]
        if self.ship == "all":
            found["pip"] = {"packages": _requirements(), "pip_check": False}
        return found


def checked_job(verb: str, arguments: Sequence[str], command: Any, **options: Any) -> Job:
    """A job whose arguments the verb's own parser accepts and whose paths mean the same there.

    Raises:
        SubmitError: a relative path, which would be relative to the job's own temporary folder.
        UsageError: what the verb itself would say of wrong arguments.
    """
    for path in _paths(verb, arguments, command):
        if not path.is_absolute():
            raise SubmitError(
                f"got the path {str(path)!r}, which is relative; a job runs in a folder of its "
                "own: give an absolute path on storage that all machines of the cluster see."
            )
    return Job(verb=verb, arguments=tuple(arguments), **options)


def submit(job: Job, address: str) -> str:
    """Send a job; returns its id. Raises SubmitError where no cluster answers at the address."""
    deadline = time.monotonic() + _START_SECONDS
    with _client(address) as client:
        while True:
            try:
                return client.submit_job(
                    entrypoint=job.entrypoint,
                    runtime_env=job.runtime_env(),
                    submission_id=job.name,
                    metadata={"verb": job.verb},
                    entrypoint_num_cpus=job.cpus or None,
                )
            except RuntimeError as error:
                if _NO_AGENT not in str(error) or time.monotonic() > deadline:
                    raise
            time.sleep(_POLL_SECONDS)


def follow(job_id: str, address: str) -> Iterator[str]:
    """What a job prints, as it comes, to its end. A broken line to the cluster is mended."""
    seen = 0
    with _client(address) as client:
        while True:
            status = client.get_job_status(job_id)
            text = client.get_job_logs(job_id)
            # A log that was begun anew (a restarted driver) is shown from its start.
            seen = 0 if len(text) < seen else seen
            if text[seen:]:
                yield text[seen:]
            seen = len(text)
            if status.is_terminal():
                return
            time.sleep(_POLL_SECONDS)


def job_status(job_id: str, address: str) -> dict[str, Any]:
    """State, message, times and command of a job."""
    with _client(address) as client:
        info = client.get_job_info(job_id)
        return _as_row(info)


def list_jobs(address: str) -> list[dict[str, Any]]:
    """The jobs that were submitted to a cluster, newest first."""
    with _client(address) as client:
        rows = [_as_row(info) for info in client.list_jobs() if info.submission_id]
    return sorted(rows, key=lambda row: -(row["started"] or 0))


def stop_job(job_id: str, address: str) -> bool:
    """Stop a job; False where it was over already."""
    with _client(address) as client:
        return client.stop_job(job_id)


def manifest(job: Job, *, image: str, claim: str, mount: str, workers: int, gpus: int) -> str:
    """A KubeRay `RayJob` (YAML) that runs the job on a cluster of its own.

    Args:
        image: container image with this package (`infra/docker/Dockerfile` makes one).
        claim: PersistentVolumeClaim, mounted at `mount` in every pod, for sources and results.
        workers: most worker pods; the autoscaler starts as many of them as there is work for.
            Training takes exactly so many.
        gpus: GPUs of each worker pod.

    Raises:
        SubmitError: the job sends code along, which an image has already.
    """
    import jinja2
    import ray

    if job.ship != "nothing":
        raise SubmitError(
            f"got --ship {job.ship} for a manifest, whose pods take the code from their image: "
            "leave --ship out, and build the image from this checkout."
        )
    source = resources.files("infra.kuberay").joinpath("rayjob.yaml.jinja").read_text("utf-8")
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    return environment.from_string(source).render(
        name=job.name or f"animator-{job.verb}",
        entrypoint=job.entrypoint,
        env=job.environment,
        train=job.verb == "train",
        grace=GRACE_SECONDS if job.verb == "train" else 30,
        image=image,
        claim=claim,
        mount=mount,
        workers=workers,
        gpus=gpus,
        ray_version=ray.__version__,
    )


@contextmanager
def _client(address: str) -> Iterator[Any]:
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    try:
        yield JobSubmissionClient(address)
    except AuthenticationError:
        raise SubmitError(
            f"the cluster at {address} does not take this token: set RAY_AUTH_MODE=token and "
            "RAY_AUTH_TOKEN to the cluster's own."
        ) from None
    except ConnectionError:
        raise SubmitError(
            f"no Ray cluster answers at {address}: expected the address of its dashboard, as "
            f"{DEFAULT_ADDRESS}; give --address or set RAY_API_SERVER_ADDRESS."
        ) from None
    except RuntimeError as error:
        text = str(error)
        if "does not exist" in text:
            raise SubmitError(
                f"the cluster at {address} knows no such job; `animator submit status` lists them."
            ) from None
        if _NO_AGENT in text:
            raise SubmitError(
                f"the cluster at {address} has nobody to start jobs: look at its head's "
                "dashboard_agent.log; beside another cluster on one machine, give `ray start` a "
                "free --dashboard-agent-listen-port."
            ) from None
        if "already exists" in text:
            raise SubmitError(
                "a job of this name was submitted before; give another --name, or none."
            ) from None
        raise


def _as_row(info: Any) -> dict[str, Any]:
    return {
        "id": info.submission_id,
        "status": getattr(info.status, "value", str(info.status)),
        "message": info.message,
        "started": info.start_time,
        "ended": info.end_time,
        "command": info.entrypoint,
    }


def default_address() -> str:
    """Where jobs go unless told otherwise: Ray's own variable, else a cluster on this machine."""
    return os.environ.get("RAY_API_SERVER_ADDRESS") or DEFAULT_ADDRESS


def _paths(verb: str, arguments: Sequence[str], command: Any) -> Iterator[Path]:
    """Every path among the arguments, as the verb's own parser reads them."""
    rest = list(arguments)
    while children := getattr(command, "commands", None):
        # As the command line itself puts it where it may be left out.
        if getattr(command, "default", None) and (not rest or rest[0] not in children):
            rest = [command.default, *rest]
        if not rest or rest[0] not in children:
            given = repr(rest[0]) if rest else "nothing"
            raise SubmitError(f"got {given} after {verb}, expected one of {', '.join(children)}.")
        command, rest = children[rest[0]], rest[1:]
    parsed = command.make_context(f"animator {verb}", rest)
    for name, value in parsed.params.items():
        source = parsed.get_parameter_source(name)
        for item in value if isinstance(value, list | tuple) else [value]:
            if isinstance(item, Path) and source is not None and source.name != "DEFAULT":
                yield item
            elif verb == "curate" and name == "sources" and "://" not in str(item):
                yield Path(str(item))
            elif name == "alignment" and isinstance(item, str) and item not in ALIGNMENT_WORDS:
                yield Path(item)
            elif name in ("settings", "changes") and isinstance(item, str):
                yield from _path_in(verb, item)


def _path_in(verb: str, assignment: str) -> Iterator[Path]:
    """The path that a change of a setting gives, if it gives one."""
    name, _, value = (part.strip() for part in assignment.partition("="))
    is_path = name in SETTINGS_OF_PATHS.get(verb, ()) and "://" not in value
    if is_path and value.lower() not in _NO_PATHS:
        yield Path(value)


def _package_folder(name: str) -> Path:
    return Path(str(resources.files(name)))


def _requirements() -> list[str]:
    """What the package needs, at the very versions that are installed here."""
    found = []
    for line in metadata.requires(DISTRIBUTION) or []:
        requirement, _, condition = line.partition(";")
        if "extra" in condition:
            continue
        # From the first sign that no name or extra holds, it is about versions.
        name = requirement.split(">")[0].split("=")[0].split("<")[0].strip()
        found.append(f"{name}=={metadata.version(name.partition('[')[0])}")
    return found

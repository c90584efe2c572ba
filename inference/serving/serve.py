"""The job server: Ray Serve in front, engines as Ray actors behind, the job store between them.

The HTTP replica and the engines know each other only through the store, so either may die at any
moment. What this process does: hold the data folder, take jobs back from a server that died, start
the parts, and restart an engine that stops answering.
"""

import logging
import os
import secrets
import signal
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

from inference.engine_factory import open_engine
from inference.outputs import FolderLock
from inference.serving.config import ServeError, ServerConfig
from inference.serving.jobs import JobStore
from inference.serving.worker import EngineWorker, JobFiles

__all__ = ["EngineStartError", "ServeError", "ServerConfig", "serve"]

KEY_VARIABLE = "ANIMATOR_API_KEY"
# A server killed a moment ago leaves its HTTP process behind for about two seconds.
PORT_SECONDS = 10.0
STOP_SECONDS = 30.0
WATCH_SECONDS = 1.0
OBJECT_STORE_BYTES = 200 << 20  # nothing large passes through Ray: files stay on disk

log = logging.getLogger(__name__)


class EngineStartError(RuntimeError):
    """The engine could not be opened; the message is the engine's own."""


def _say(line: str) -> None:
    print(line, flush=True)


def serve(config: ServerConfig, announce: Callable[[str], None] = _say) -> None:
    """Run the server until SIGINT or SIGTERM; `announce` gets one line when it is ready.

    Raises:
        ServeError, FolderInUseError, StoreError: what was asked for cannot be started.
        ValueError: settings that there are not, or a model folder that does not say its own.
        EngineStartError: the engine cannot be opened, or ended for good.
    """
    import ray

    api_key = os.environ.get(KEY_VARIABLE, "").strip()
    if not config.local_only and not api_key:
        raise ServeError(
            f"host {config.host!r} can be reached from other machines and {KEY_VARIABLE} is not "
            f"set; set it to a long random text, or bind 127.0.0.1"
        )
    if not config.model_dir.is_dir():
        raise ServeError(f"{config.model_dir}: no such folder; give the folder of a saved model")
    started = time.monotonic()
    config.check_settings()
    config = config.absolute()  # Ray's processes need not share our working folder
    files = JobFiles(config.data_dir)
    lock = FolderLock(files.root, "server.lock", "animator serve")
    boot = secrets.token_hex(6)
    try:
        store = JobStore(files.database, max_attempts=config.max_attempts)
        returned = store.take_over(boot, files.finished)
        files.sweep(store)
        port = _free_port(config.host, config.port)
        _start_ray(config)
        engines = _Engines(config, boot)
        _start_http(config, port)
        engines.wait_until_loaded()
        again = f", {len(returned)} unfinished job(s) taken up again" if returned else ""
        host = f"[{config.host}]" if ":" in config.host else config.host
        announce(
            f"animator serves http://{host}:{port} with {config.engines} engine(s), ready in "
            f"{time.monotonic() - started:.1f} s{again}; docs at /docs, stop with Ctrl-C"
        )
        _watch(engines, store)
        store.close()
    except KeyboardInterrupt:
        pass
    finally:
        ray.shutdown()
        lock.close()


class EngineActor:
    """One engine in a process of its own; two threads, so that `stop` is heard while it works."""

    def __init__(self, config: ServerConfig, owner: str) -> None:
        self.config = config
        self.owner = owner
        self.worker: EngineWorker | None = None

    def load(self) -> None:
        """Open the engine."""
        config = self.config
        engine = open_engine(
            config.engine_factory,
            config.model_dir,
            **config.engine_options(),
        )
        files = JobFiles(config.data_dir)
        store = JobStore(files.database, max_attempts=config.max_attempts)
        self.worker = EngineWorker(
            store, files, engine, owner=self.owner, lease_seconds=config.lease_seconds
        )

    def run(self) -> None:
        """Work until `stop`. After a crash Ray starts the process and this call again."""
        if self.worker is None:
            self.load()
        assert self.worker is not None
        self.worker.run()

    def stop(self) -> None:
        """Give the current job back and end `run`."""
        if self.worker is not None:
            self.worker.stop()


class _Engines:
    """The engine actors, by the name under which they hold leases."""

    def __init__(self, config: ServerConfig, boot: str) -> None:
        import ray

        cores = _cores_each(config.engines)
        gpus = int(ray.cluster_resources().get("GPU", 0))
        if 0 < gpus < config.engines:
            raise ServeError(
                f"{config.engines} engines on {gpus} GPU(s), expected one GPU an engine; "
                f"ask for {gpus} engine(s)"
            )
        remote = ray.remote(EngineActor).options(
            num_cpus=cores,
            num_gpus=1 if gpus else 0,
            max_concurrency=2,
            max_restarts=-1,
            max_task_retries=-1,
        )
        owners = [f"{boot}/engine-{number}" for number in range(config.engines)]
        self.actors: dict[str, Any] = {owner: remote.remote(config, owner) for owner in owners}
        self._loading = [actor.load.remote() for actor in self.actors.values()]
        self.running: list[Any] = []

    def wait_until_loaded(self) -> None:
        """Wait for the models, then set the engines to work."""
        import ray
        from ray.exceptions import RayError

        try:
            ray.get(self._loading)
        except RayError as error:
            raise _engine_error(error) from None
        self.running = [actor.run.remote() for actor in self.actors.values()]

    def check(self) -> None:
        """Raises EngineStartError where an engine ended by an exception (a crash is restarted)."""
        import ray
        from ray.exceptions import RayError

        ended, _ = ray.wait(self.running, timeout=0)
        try:
            ray.get(ended)
        except RayError as error:
            raise _engine_error(error) from None

    def restart(self, owner: str) -> None:
        """Kill an engine that stopped answering; Ray starts it again."""
        import ray

        log.warning("%s did not answer within its lease and is restarted", owner)
        if owner in self.actors:
            ray.kill(self.actors[owner], no_restart=False)

    def stop(self) -> None:
        """Let every engine give its job back, as far as it answers in time."""
        import ray

        for actor in self.actors.values():
            actor.stop.remote()
        ray.wait(self.running, num_returns=len(self.running), timeout=STOP_SECONDS)


def _watch(engines: _Engines, store: JobStore) -> None:
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    while not stop.wait(WATCH_SECONDS):
        engines.check()
        for job in store.recover():
            engines.restart(job.owner or "")
    engines.stop()


def _cores_each(engines: int) -> int:
    """CPUs of an engine; Ray sets its number of threads to them."""
    return max(1, (os.cpu_count() or 1) // engines)


def _start_ray(config: ServerConfig) -> None:
    """A Ray of our own that listens on the loopback interface only."""
    import ray

    ray.init(
        address="local",
        num_cpus=max(4, _cores_each(config.engines) * config.engines),
        include_dashboard=False,
        object_store_memory=OBJECT_STORE_BYTES,
        logging_level=logging.ERROR,
        _node_ip_address="127.0.0.1",
    )


def _start_http(config: ServerConfig, port: int) -> None:
    from ray import serve as ray_serve

    def build():
        from inference.serving.web import create_app

        files = JobFiles(config.data_dir)
        return create_app(
            files,
            JobStore(files.database, max_attempts=config.max_attempts),
            limits=config.limits,
            max_queued=config.max_queued,
            api_key=os.environ.get(KEY_VARIABLE, "").strip() or None,
            local_only=config.local_only,
            preset=config.preset,
            changes=config.changes,
        )

    class Videos:
        """The HTTP replica."""

    quiet = {"log_level": "WARNING", "enable_access_log": False}
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    ray_serve.start(http_options={"host": config.host, "port": port}, logging_config=quiet)
    deployment = ray_serve.deployment(
        name="videos",
        num_replicas=1,
        max_ongoing_requests=100,
        ray_actor_options={"num_cpus": 0},
        logging_config=quiet,
        graceful_shutdown_timeout_s=5,
    )
    ingress = deployment(ray_serve.ingress(build)(Videos))
    ray_serve.run(ingress.bind(), name="animator", route_prefix="/")


def _free_port(host: str, port: int) -> int:
    """The port, once nobody listens on it; any free one for 0. Raises ServeError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    deadline = time.monotonic() + PORT_SECONDS
    while True:
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
                probe.listen(1)
                return probe.getsockname()[1]
            except OSError as error:
                if time.monotonic() > deadline or not isinstance(error.errno, int):
                    raise ServeError(
                        f"{host}:{port} cannot be bound ({error.strerror or error}); stop the "
                        "program that listens there or choose another --port"
                    ) from None
        time.sleep(0.2)


def _engine_error(error: Exception) -> Exception:
    cause = getattr(error, "cause", None) or error
    kind = ServeError if isinstance(cause, ValueError) else EngineStartError
    return kind(
        f"the engine cannot be opened: {(str(cause).strip() or repr(cause)).splitlines()[0]}"
    )

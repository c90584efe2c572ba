"""The process that fetches one video from the web: `python -m pipelines.curation.fetch_video FD`.

It reads a request as JSON from its input and answers with one line of JSON. Before anything of
yt-dlp runs, the process limits its own memory and files and closes itself off (`network_guard`).
FD is a pipe that nobody writes to: when its other end closes, the parent is dead, and so are we.
"""

import json
import os
import resource
import sys
import threading
from typing import Any

from pipelines.curation import network_guard

# Network stacks and readers of browsers' secrets that yt-dlp would use where they are installed;
# the guard would not see some of them, and urllib's is enough.
FOREIGN = ("curl_cffi", "requests", "websockets", "secretstorage", "mutagen", "xattr")
OUTPUT = "video.bin"  # the fetched file, in the request's folder
_SLACK = 1 << 20


def main() -> None:
    """Read the request, close the process, fetch, answer."""
    lifeline = int(sys.argv[1])
    threading.Thread(target=_die_with_parent, args=(lifeline,), daemon=True).start()
    request: dict[str, Any] = json.loads(sys.stdin.buffer.read())
    answer = os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nothing, stream)
    _limit(request["max_memory"], request["max_bytes"])
    for name in FOREIGN:
        sys.modules[name] = None  # type: ignore[assignment]
    os.environ["YTDLP_NO_PLUGINS"] = "1"
    network_guard.install(request["folder"], request["allow_hosts"])
    from pipelines.curation import fetch_site

    answer.write(json.dumps(fetch_site.fetch(request)).encode() + b"\n")
    answer.close()


def _die_with_parent(lifeline: int) -> None:
    os.read(lifeline, 1)
    os._exit(1)


def _limit(max_memory: int, max_bytes: int) -> None:
    for kind, value in (
        (resource.RLIMIT_AS, max_memory),
        (resource.RLIMIT_FSIZE, max_bytes + _SLACK),
        (resource.RLIMIT_CORE, 0),
    ):
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))


if __name__ == "__main__":
    main()

"""One animation in a process of its own, for tests of memory and of being killed.

`python long_video_run.py REQUEST.json`: the request, the model, and after how many calls of the
progress the process kills itself (0: never). Prints the record's memory and seams.
"""

import json
import os
import signal
import sys
from pathlib import Path


def main() -> None:
    """Run the request of the file that is named on the command line."""
    import torch

    from inference.engine import AnimationEngine
    from inference.requests import AnimationRequest

    given = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(given["threads"])  # sums are rounded by how they are shared out
    calls = 0

    def progress(share: float, stage: str) -> None:
        nonlocal calls
        calls += 1
        if calls == given["kill_after"]:
            os.kill(os.getpid(), signal.SIGKILL)

    engine = AnimationEngine(Path(given["model"]), changes=given["changes"])
    record = engine.run(
        AnimationRequest.from_json(given["request"]), progress, resumable=given["resumable"]
    )
    print(json.dumps({"memory": record["memory"], "seams": record["seams"]}))


if __name__ == "__main__":
    main()

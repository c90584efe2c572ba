"""One refinement of the benchmark of face optimisation, in a process of its own."""

import json
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from animator.latents import TemporalVAE
from inference.faces.config import FaceOptimizationConfig
from inference.faces.optimizer import FaceOptimizer
from inference.faces.places import FacePlaces
from inference.faces.similarity import FaceReader, arcface
from inference.peak_memory import PeakMemory, host_now
from inference.timing import timed
from pipelines.overrides import from_dict


def run_task(task: Path) -> None:
    """Refine once as the task's job says, and write what it took beside it."""
    job = json.loads((task / "job.json").read_text())
    torch.set_num_threads(job["threads"])
    tensors = load_file(str(task / "task.safetensors"))
    latents = tensors["latents"][: job["frames"]]
    codec = TemporalVAE.from_folder(task / "vae")
    codec.chunk_size = 1
    places = _from_tensors(tensors, (latents.shape[-2] * 8, latents.shape[-1] * 8))
    optimizer = FaceOptimizer(
        codec,
        FaceReader(arcface(Path(job["network"]), torch.device("cpu"))),
        tensors["wanted"],
        places,
        from_dict(FaceOptimizationConfig, job["config"]),
        num_steps=25,
    )
    refined: list[Tensor] = []
    peak = PeakMemory()
    held = host_now()
    used = time.process_time()
    seconds = timed(
        lambda: refined.append(optimizer.refine(latents, torch.arange(len(latents)), 0)),
        latents.device,
    )
    most = peak.record().get("host_mb", float("nan")) / 1e3
    result = {
        "seconds": seconds,
        "cpu_seconds": time.process_time() - used,
        "peak_gb": most - held / 1e9,
        "frames": len(latents),
        "record": optimizer.record(),
    }
    save_file({"latents": refined[0].contiguous()}, str(task / "result.safetensors"))
    (task / "result.json").write_text(json.dumps(result))


def as_tensors(places: FacePlaces) -> dict[str, Tensor]:
    """Places as they are handed to the process."""
    return {
        "visible": torch.from_numpy(places.visible),
        "landmarks": torch.from_numpy(places.landmarks),
        "boxes": torch.from_numpy(places.boxes),
    }


def _from_tensors(tensors: dict[str, Tensor], size: tuple[int, int]) -> FacePlaces:
    parts = {name: tensors[name].numpy() for name in ("visible", "landmarks", "boxes")}
    return FacePlaces(**parts, size=size)


if __name__ == "__main__":
    run_task(Path(sys.argv[1]))

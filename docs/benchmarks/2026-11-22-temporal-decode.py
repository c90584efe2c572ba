"""Time and peak memory of decoding 14 frames of 256x256 at the published VAE's size.

    python 2026-11-22-temporal-decode.py one_pass|streamed|separate [chunk_size]

Random weights, float32, one thread: processor seconds then depend little on what else the machine
does. One process for each line: the peak is the process's own (Linux).
"""

import sys
import time
from pathlib import Path

import torch
from diffusers.models.autoencoders.autoencoder_kl_temporal_decoder import TemporalDecoder

from animator.temporal_decoder import decode_clip


def gibibytes(field: str) -> float:
    """A line of the process's status, VmRSS (now) or VmHWM (peak)."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 2**20


def one_pass(latents: torch.Tensor) -> torch.Tensor:
    return decoder(latents, torch.zeros(1, len(latents)), num_frames=len(latents))


how, chunk_size = sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 2
torch.set_num_threads(1)
torch.manual_seed(0)
decoder = TemporalDecoder(4, 3, (128, 256, 512, 512), 2).eval()
latents = 5 * torch.randn(14, 4, 32, 32)
before, began = gibibytes("VmRSS"), time.process_time()
with torch.no_grad():
    if how == "one_pass":
        frames = one_pass(latents)
    elif how == "separate":
        frames = torch.cat([one_pass(part) for part in latents.split(chunk_size)])
    else:
        frames = decode_clip(decoder, latents, chunk_size=chunk_size)
seconds, peak = time.process_time() - began, gibibytes("VmHWM")
print(f"{how} {chunk_size}: {seconds:.0f} s, {before:.2f} GiB before, {peak - before:.2f} more")
torch.save(frames, f"{how}-{chunk_size}.pt")

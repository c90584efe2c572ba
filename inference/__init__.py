"""Inference: samplers, the animation pipeline, offline batches and the job server."""

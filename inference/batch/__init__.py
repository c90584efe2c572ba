"""Offline batches: a manifest of requests, animated on Ray Data actors."""

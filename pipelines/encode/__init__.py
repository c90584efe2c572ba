"""Latents, image tokens and face embeddings of curated clips, computed once and kept in shards."""

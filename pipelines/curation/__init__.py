"""Curation: raw video to shots, scores, verdicts and shards, as a Ray Data job."""

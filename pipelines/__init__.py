"""Data: from raw video to committed shards of clips, and random access to them."""

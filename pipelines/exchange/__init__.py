"""Other people's folders in and out: their layouts as shards, and shards in their layout."""

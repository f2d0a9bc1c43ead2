"""img2dataset as an engine, and its shards as a source."""

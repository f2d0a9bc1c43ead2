"""Token-level text embeddings, computed once and kept beside the shards of a table."""

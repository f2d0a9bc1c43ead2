"""The sample table: its rows, its shards, its versions."""

"""Speed and memory, measured against the same work done the straightforward way."""

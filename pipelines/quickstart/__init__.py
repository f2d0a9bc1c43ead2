"""The pipeline end to end, on pictures that come from the package registry."""

"""Fetching what links of strangers point to."""

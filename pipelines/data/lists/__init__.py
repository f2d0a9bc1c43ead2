"""Lists of links, read as they are."""

"""From lists of links to a table of pictures with captions."""

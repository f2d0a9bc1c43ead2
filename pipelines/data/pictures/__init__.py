"""From the bytes that were fetched to the pictures and clips that are stored."""

"""What a step trains on: which rows, in which order, and their pictures, captions and noise."""

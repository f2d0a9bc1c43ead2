"""How good a checkpoint is: pictures for a fixed prompt set, and their distance from the real ones."""

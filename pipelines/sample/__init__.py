"""Pictures for captions, made by a checkpoint."""

"""Checkpoints: atomic files, the memories beside them, resharding, and what may be resumed."""

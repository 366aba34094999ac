"""Checkpoints: the memories beside them, whole files or none, another number of workers, and what may be resumed."""

"""Horovod: the strategy, its launcher, and protection from hangs."""

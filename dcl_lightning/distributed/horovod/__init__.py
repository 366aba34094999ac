"""Horovod: the strategy, its launcher, and what keeps a job from waiting for ever."""

"""Many workers: Horovod's strategy and launcher, and the collectives that the rest of the package uses."""

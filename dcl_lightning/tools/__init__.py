"""The installer of Horovod."""

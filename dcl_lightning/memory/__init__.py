"""The rehearsal memory: torch only, no Lightning, no Horovod."""

"""A user's script with ``strategy="horovod"``: ``two_fits.py --word TEXT`` fits twice, and says so."""

from __future__ import annotations

import sys

import dcl_lightning  # noqa: F401  (registers the strategy)
from tests.distributed.toy import Toy, shard, trainer

model = Toy()
for fit in (1, 2):
    t = trainer("horovod", devices=2)
    t.fit(model, shard(t.global_rank, t.world_size, 8))
    print(f"FIT {fit} of {t.world_size} {sys.argv[2]}", flush=True)
if t.global_rank == 1:
    print("on stderr", file=sys.stderr)

"""Tensors of a checkpoint that workers have in parts: a file of each worker beside it, read by any number of workers.

In the checkpoint itself stand empty tensors in their places, of the same shape and dtype on PyTorch's device ``meta``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import Tensor

from dcl_lightning.checkpoint.io import FORMAT, KEY, STAGING, Writable, check_files, stage_files
from dcl_lightning.comm import Comm, SingleProcessComm, is_parted, own_part, part_of, raise_together
from dcl_lightning.errors import CheckpointError
from dcl_lightning.types import StateDict

__all__ = ["PARTED", "change_tensors", "check_shards", "fill_shards", "fill_whole", "stage_shards"]

# Keys of a checkpoint below which workers may have parts.
PARTED = ("state_dict", "optimizer_states", "initial_weights")
Place = tuple[Any, ...]


def change_tensors(tree: Any, change: Callable[[Place, Tensor], Tensor], place: Place = ()) -> Any:
    """Return dicts and lists with other tensors in the places of theirs; what is given stays as it is.

    Args:
        tree: nested dicts, lists and tuples.
        change: returns a tensor, given the keys that lead to the one that it replaces, and that one.
        place: the keys that lead to ``tree``.
    """
    if isinstance(tree, Mapping):
        return {key: change_tensors(value, change, (*place, key)) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(change_tensors(value, change, (*place, i)) for i, value in enumerate(tree))
    return change(place, tree) if isinstance(tree, Tensor) else tree


def _name(place: Place) -> str:
    return "/".join(map(str, place))


def stage_shards(checkpoint: StateDict, comm: Comm, folder: Path) -> None:
    """Write what workers have in parts to a staging folder; record the files in the checkpoint, and leave gaps in it.

    Args:
        checkpoint: being saved, changed in place.
        comm: the cluster; every worker calls this.
        folder: of the checkpoint.

    Raises:
        CheckpointError: on all workers, if one could not write.
    """
    shards: dict[str, Tensor] = {}

    def take(place: Place, tensor: Tensor) -> Tensor:
        if not is_parted(tensor):
            return tensor
        # A copy, since PyTorch saves all of the memory that a tensor is a view of.
        shards[_name(place)] = own_part(tensor).detach().cpu().clone()
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")

    def write(file: Writable) -> None:
        torch.save(shards, cast(IO[bytes], file))

    checkpoint |= {key: change_tensors(checkpoint[key], take, (key,)) for key in PARTED if key in checkpoint}
    ours = checkpoint.setdefault(KEY, {"format": FORMAT})
    ours["weights"] = stage_files(comm, folder / STAGING, write)


def check_shards(checkpoint: StateDict, comm: Comm) -> None:
    """Refuse a checkpoint whose parts are missing or damaged; every worker calls this, and reads some of the files.

    Raises:
        CheckpointError: on all workers alike.
    """
    record = checkpoint.get(KEY, {}).get("weights")
    if record:
        files = record["files"]
        problem = check_files(Path(record["folder"]), files, range(comm.rank, len(files), comm.size))
        raise_together(comm, problem, CheckpointError)


def fill_shards(checkpoint: StateDict, key: str, like: Callable[[Place], Tensor | None] | None = None) -> None:
    """Read what was saved in parts into the places that were left for it.

    Args:
        checkpoint: as loaded, with the folder of its files, checked; changed in place.
        key: one of ``PARTED``.
        like: returns the present tensor, or None, given the keys below ``key``: if this worker has a part of it, it
            gets such a part of what was saved. If None, all is whole.
    """
    record = checkpoint.get(KEY, {}).get("weights") or {"folder": "", "files": []}
    paths = [Path(record["folder"], file["name"]) for file in record["files"]]
    files: list[dict[str, Tensor]] = [torch.load(p, map_location="cpu", mmap=True, weights_only=True) for p in paths]

    def fill(place: Place, saved: Tensor) -> Tensor:
        value = torch.cat([file[_name(place)] for file in files]) if saved.is_meta else saved
        present = like(place[1:]) if like is not None else None
        same = present is not None and is_parted(present) and present.shape == saved.shape
        return part_of(value, present) if present is not None and same else value

    if key in checkpoint:
        checkpoint[key] = change_tensors(checkpoint[key], fill, (key,))


def fill_whole(checkpoint: StateDict) -> None:
    """Read all that was saved in parts, whole; this worker alone.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    if checkpoint.get(KEY, {}).get("weights"):
        check_shards(checkpoint, SingleProcessComm())
        for key in PARTED:
            fill_shards(checkpoint, key)

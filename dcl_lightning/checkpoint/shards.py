"""Tensors of a checkpoint that workers have in parts: files of all workers beside it, read by any number of workers.

In the checkpoint itself stand empty tensors in their places, of the same shape and dtype on PyTorch's device ``meta``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dcl_lightning.checkpoint.io import FORMAT, KEY, STAGING, check_files, digest_of, new_folder
from dcl_lightning.comm import Comm, SingleProcessComm, allgather_text, is_parted, part_of, raise_together
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
    import torch.distributed.checkpoint as dcp  # takes a while, and few runs need it

    shards: dict[str, Tensor] = {}

    def take(place: Place, tensor: Tensor) -> Tensor:
        if not is_parted(tensor):
            return tensor
        shards[_name(place)] = tensor
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")

    checkpoint |= {key: change_tensors(checkpoint[key], take, (key,)) for key in PARTED if key in checkpoint}
    place = new_folder(comm, folder / STAGING)
    error, mine = "", list[StateDict]()
    try:
        place.mkdir(parents=True, exist_ok=True)
        dcp.save(shards, checkpoint_id=place)
        names = (f"__{comm.rank}_*", ".metadata")[: 2 - (comm.rank > 0)]
        mine = [
            {"name": file.name, "bytes": file.stat().st_size, "sha256": digest_of(file)}
            for name in names
            for file in sorted(place.glob(name))
        ]
    except (OSError, dcp.CheckpointException) as failed:
        cause = failed if isinstance(failed, OSError) else OSError(str(failed).strip().splitlines()[-1])
        error = str(CheckpointError.not_written(place, cause))
    raise_together(comm, error, CheckpointError)
    files = [file for text in allgather_text(comm, json.dumps(mine)) for file in json.loads(text)]
    ours = checkpoint.setdefault(KEY, {"format": FORMAT})
    ours["weights"] = {"token": place.name, "staged": str(place), "files": files}


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


def fill_shards(checkpoint: StateDict, key: str, like: Callable[[Place, Tensor], Tensor | None] | None = None) -> None:
    """Read what was saved in parts into the places that were left for it.

    Args:
        checkpoint: as loaded, with the folder of its files, checked; changed in place.
        key: one of ``PARTED``.
        like: returns a tensor, or None, given the keys below ``key`` and the saved tensor: if workers have parts of
            it, they get such parts of what was saved; every worker calls this then. If None, all is whole.
    """
    import torch.distributed.checkpoint as dcp

    wanted: dict[str, Tensor] = {}

    def prepare(place: Place, saved: Tensor) -> Tensor:
        model = like(place[1:], saved) if like is not None else None
        if model is not None and not (is_parted(model) and model.shape == saved.shape):
            model = None
        if not saved.is_meta:
            return saved if model is None else part_of(saved, model)
        empty = torch.empty(saved.shape, dtype=saved.dtype)
        wanted[_name(place)] = empty if model is None else torch.empty_like(model, dtype=saved.dtype)
        return wanted[_name(place)]

    if key in checkpoint:
        checkpoint[key] = change_tensors(checkpoint[key], prepare, (key,))
    if wanted:
        dcp.load(wanted, checkpoint_id=checkpoint[KEY]["weights"]["folder"], no_dist=like is None)


def fill_whole(checkpoint: StateDict) -> None:
    """Read all that was saved in parts, whole; this worker alone.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    if checkpoint.get(KEY, {}).get("weights"):
        check_shards(checkpoint, SingleProcessComm())
        for key in PARTED:
            fill_shards(checkpoint, key)

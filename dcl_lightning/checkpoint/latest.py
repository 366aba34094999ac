"""The newest checkpoint of a run that is whole."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from dcl_lightning.checkpoint.io import check_seal
from dcl_lightning.checkpoint.worker_files import KEY, check_files, side_folder
from dcl_lightning.errors import CheckpointError

__all__ = ["newest_checkpoint", "problem_of"]


def problem_of(path: Path, resumes: bool = True) -> str:
    """Return why training cannot go on from a checkpoint, or why it cannot be read; empty if it can.

    Args:
        path: the checkpoint.
        resumes: whether its memory and its optimizer are needed, too.
    """
    try:
        check_seal(path)
        checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        if not resumes:
            return ""
        if "optimizer_states" not in checkpoint:
            return f"{path} has weights alone"
        memory = checkpoint.get(KEY, {}).get("memory")
        if memory is None:
            return ""
        folder = side_folder(path, memory)
    except CheckpointError as error:
        return str(error)
    except Exception as error:  # whatever reading a broken file raises
        return f"{path} cannot be read as a checkpoint ({str(error).splitlines()[0]})"
    return check_files(folder, memory["files"], list(range(len(memory["files"]))))


def newest_checkpoint(files: Iterable[Path], resumes: bool = True) -> tuple[Path | None, list[str]]:
    """Return the newest whole checkpoint of some, and what is wrong with those that are newer.

    Args:
        files: the checkpoints.
        resumes: whether its memory and its optimizer are needed, too.
    """
    found = {file.resolve() for file in files if file.is_file()}
    problems: list[str] = []
    for path in sorted(found, key=lambda file: (file.stat().st_mtime_ns, str(file)), reverse=True):
        problem = problem_of(path, resumes)
        if not problem:
            return path, problems
        problems.append(problem)
    return None, problems

"""Checks that a run is resumed by its own job and configuration, and finds its step if a step has another size."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from dcl_lightning._lightning import trainer_of
from dcl_lightning.checkpoint.directory import problem_of
from dcl_lightning.checkpoint.io import KEY
from dcl_lightning.errors import CheckpointError, ConfigurationError
from dcl_lightning.types import StateDict

__all__ = ["BEYOND_ANY_EPOCH", "move_loop_progress", "name_of", "refuse_another_run", "saved_by_this_job", "slurm_job"]

# Hyperparameters that do not change the training, and the memory's, which the memory compares or iCaRL adopts.
_HARMLESS = ("input_spec", "rehearsal", "execution", "memory_format", "compile", "_instantiator")
# A number of batches by which Lightning considers an epoch over, whatever number the next one has.
BEYOND_ANY_EPOCH = 2**60


def name_of(module: pl.LightningModule) -> str:
    """Return the name under which a checkpoint records its module: an agent's method, else the class's name."""
    method = getattr(type(module), "method", None)  # of the class, because submodules may have that name
    return str(method()) if method is not None else type(module).__name__


def refuse_another_run(agent: pl.LightningModule, checkpoint: StateDict) -> None:
    """Refuse to load weights into another network, and to resume with another agent or other hyperparameters.

    Args:
        agent: the agent that loads the checkpoint.
        checkpoint: as loaded.

    Raises:
        CheckpointError: training cannot resume because the checkpoint has weights only.
        ConfigurationError: agent, network or a hyperparameter differs.
    """
    trainer = trainer_of(agent)
    fits = trainer is not None and trainer.state.fn == TrainerFn.FITTING
    saved_agent, name = checkpoint.get(KEY, {}).get("agent"), name_of(agent)
    if fits and saved_agent not in (None, name, type(agent).__name__):
        raise ConfigurationError(f"the checkpoint's run had the agent {saved_agent}, this one has {name}: give --model")
    _refuse_another_network(checkpoint["state_dict"], agent.state_dict())
    if not fits:
        return
    if "optimizer_states" not in checkpoint:
        raise CheckpointError(
            "the checkpoint has only weights, from which training cannot resume: resume from another one, or start a "
            "new run with load_from_checkpoint"
        )
    _refuse_other_values(checkpoint.get("hyper_parameters", {}), dict(agent.hparams), "model")


def move_loop_progress(loop: StateDict, before: int, now: int, passes: int = 1) -> int:
    """Convert the saved state of Lightning's loops to another number of samples per step.

    Rounds down, so that the samples of a step done in part are repeated, and none is skipped.

    Args:
        loop: the saved state of the fit loop, changed in place.
        before: samples per step over all workers, when it was saved.
        now: samples per step now.
        passes: steps in a row with the same samples.

    Returns:
        Completed steps of the epoch in which the run resumes.
    """
    progress = loop["epoch_loop.batch_progress"]
    current = progress["current"]
    pending = current["ready"] - current["completed"]  # 1 if saved before Lightning counted the step
    over = progress["is_last_batch"]
    steps = BEYOND_ANY_EPOCH if over and not pending else current["ready"] // passes * before // now * passes
    current |= {"ready": steps, "started": steps, "processed": steps, "completed": steps - pending}
    for loader in loop["state_dict"].get("combined_loader", []):
        if "position" in loader:
            loader["position"] = steps
    return 0 if over else steps


def slurm_job() -> str | None:
    """Return the number of this process's SLURM job, the same after a requeue; None outside SLURM.

    A task of a job array has the array's number and its own, ``7_3``.
    """
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    return f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else os.environ.get("SLURM_JOB_ID")


def saved_by_this_job(path: Path) -> bool:
    """Return whether a requeued SLURM job may go on from a checkpoint; warn if it may not.

    It may if the job has saved the checkpoint itself before it was requeued, and nothing is wrong with it. Where a
    checkpoint does not record its job, or no job runs here, any will do.

    Args:
        path: a checkpoint that was saved on SLURM's signal.
    """
    problem, job = problem_of(path), slurm_job()
    if not problem and job is not None:
        saved: StateDict = torch.load(path, map_location="meta", weights_only=True)
        saver = saved.get(KEY, {}).get("slurm_job")
        if saver not in (None, job):
            problem = f"{path} is of SLURM job {saver}, and this is job {job}: to resume from it, give it as ckpt_path"
    if problem:
        rank_zero_warn(f"passed over: {problem}")
    return not problem


def _refuse_another_network(saved: Mapping[str, Tensor], present: Mapping[str, Tensor]) -> None:
    # Only the configured parts: other state of a method may change its size.
    saved, present = ({n: t for n, t in d.items() if n.startswith(("backbone.", "head."))} for d in (saved, present))
    for name, tensor in present.items():
        if name in saved and saved[name].shape != tensor.shape:
            raise ConfigurationError(
                f"the checkpoint's network has {name} of {list(saved[name].shape)}, this one of {list(tensor.shape)}: "
                "give the model.backbone and the data that the run was started with"
            )
    one_sided = sorted(set(saved) ^ set(present))
    if one_sided:
        where = "the checkpoint's network alone" if one_sided[0] in saved else "this network alone"
        raise ConfigurationError(
            f"{len(one_sided)} tensors, {one_sided[0]} among them, are in {where}: give the model.backbone and "
            "model.head that the run was started with"
        )


def _refuse_other_values(saved: Mapping[str, object], present: Mapping[str, object], prefix: str) -> None:
    for name in sorted(set(saved) & set(present) - set(_HARMLESS)):
        before, now = saved[name], present[name]
        if isinstance(before, Mapping) and isinstance(now, Mapping):
            _refuse_other_values(before, now, f"{prefix}.{name}")
        elif _plain(before) != _plain(now):
            raise ConfigurationError(
                f"{prefix}.{name}={now}: the checkpoint's run had {before}; resume with that, or start a new run"
            )


def _plain(value: object) -> object:
    """Return tuples as lists, which is how some checkpoints hold them."""
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value

"""Everything that a rehearsal memory can be told, checked when it is made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_type_hints

from dcl_lightning.errors import ConfigurationError, check_words, whole_number
from dcl_lightning.memory.size import MemorySize

__all__ = ["RehearsalConfig"]


@dataclass(frozen=True)
class RehearsalConfig(MemorySize):
    """What is stored, how it is drawn, and who does the work.

    Args:
        num_representatives: stored samples per class and worker, R; 60 if no size is given.
        buffer_size: stored samples in all, over all workers and classes.
        rehearsal_ratio: share of the training set that is stored, in (0, 1].
        num_candidates: c, samples of each batch offered to the memory; 20 if None; None for ``reservoir``
            and ``greedy``, to which all are offered.
        num_samples: r, representatives added to each batch of a worker.
        policy: which samples enter and which leave.
        quota: room of a class: ``fixed`` (all classes of the stream share from the start) or ``adaptive``
            (the classes seen so far share).
        update: samples enter at every training ``step``, or once at the ``task_end``.
        rehearse: draw from everything stored (``seen``), or only from what tasks before the present one left
            (``past``).
        loss: one ``mean`` over new and rehearsed samples, or the ``sum`` of the means of both.
        weighting: weight of a representative: ``nil`` or ``none`` (1).
        scope: draw from this worker's memory (``local``) or from those of all workers (``global``).
        execution: ``inline`` (on the training thread, after the step), ``blocking`` (one step ahead in the
            background) or ``nonblocking`` (the step never waits and may meet the last representatives again).
        stage: what the background prepares: representatives (``sample``), representatives on the device behind
            room for the new batch (``assemble``), or the next batch of the loader as well (``load``).
        store: what is stored: ``rows`` (inputs as the loader gives them, augmented anew when drawn), ``reference``
            (the ids of samples, whose inputs are read from the data set again; the same rows are drawn) or
            ``transformed`` (inputs as the network got them, never augmented again).
        storage: where rows lie: ``cpu``, ``cuda`` or a folder for a memory-mapped file.
        seed: of choice and draws, each worker adds its rank; that of ``seed_everything`` if None.
    """

    num_candidates: int | None = None
    num_samples: int = 20
    policy: Literal["nil", "class_balanced", "reservoir", "greedy", "fifo"] = "nil"
    quota: Literal["fixed", "adaptive"] = "fixed"
    update: Literal["step", "task_end"] = "step"
    rehearse: Literal["seen", "past"] = "seen"
    loss: Literal["mean", "sum"] = "mean"
    weighting: Literal["nil", "none"] = "nil"
    scope: Literal["local", "global"] = "local"
    execution: Literal["inline", "blocking", "nonblocking"] = "inline"
    stage: Literal["sample", "assemble", "load"] = "sample"
    store: Literal["rows", "reference", "transformed"] = "rows"
    storage: str = "cpu"
    seed: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_words("rehearsal", get_type_hints(RehearsalConfig), vars(self))
        if self.num_samples < 1:
            raise ConfigurationError(f"rehearsal.num_samples={self.num_samples}: give at least 1")
        if self.num_candidates is not None and self.num_candidates < 1:
            raise ConfigurationError(f"rehearsal.num_candidates={self.num_candidates}: give at least 1")
        if self.seed is not None:
            whole_number("rehearsal.seed", self.seed, 0, 1 << 32)
        offers_all = self.policy in ("reservoir", "greedy")
        if offers_all and self.num_candidates is not None:
            raise ConfigurationError(
                f"rehearsal.num_candidates={self.num_candidates} with policy={self.policy}: leave it out, all are "
                "offered"
            )
        if offers_all and self.weighting == "nil":
            raise ConfigurationError(
                f"rehearsal.weighting=nil needs candidates: with policy={self.policy} give weighting=none"
            )
        if self.scope == "global" and self.rehearse == "past" and self.update == "step":
            raise ConfigurationError(
                "rehearsal.rehearse=past with update=step goes with scope=local: a global draw knows sizes alone; give "
                "update=task_end"
            )
        if self.scope == "global" and self.quota == "adaptive":
            raise ConfigurationError("rehearsal.quota=adaptive goes with scope=local: a global draw's rows stay")
        if self.store == "transformed" and self.update == "task_end":
            raise ConfigurationError(
                "rehearsal.store=transformed goes with update=step: at a task's end nothing is augmented"
            )
        if self.stage != "sample" and self.execution == "inline":
            raise ConfigurationError(f"rehearsal.stage={self.stage} is background work: give execution=blocking")

    @property
    def candidates(self) -> int | None:
        """c, with its default."""
        offers_all = self.policy in ("reservoir", "greedy")
        return self.num_candidates if self.num_candidates is not None or offers_all else 20

    def forgets_tasks(self) -> str | None:
        """Return what becomes of tasks whose classes come again in later ones; None if the memory keeps them alike."""
        if self.policy == "reservoir":
            return None
        if self.policy == "greedy":
            return "keeps the first samples of each class, so that the memory takes none or few of the later tasks"
        return (
            "lets a class's new samples overwrite its stored ones, so that little or nothing of the earlier tasks is "
            "left in the memory"
        )

    def check_stream(self, classes_come_again: bool, boundaries: str) -> None:
        """Refuse what cannot tell the tasks of a stream apart.

        Args:
            classes_come_again: whether a class comes in several tasks.
            boundaries: whether the tasks' starts and ends are ``known``, or ``hidden``.

        Raises:
            ConfigurationError: with the remedy.
        """
        if self.rehearse == "past" and self.update == "step" and classes_come_again:
            raise ConfigurationError(
                "rehearsal.rehearse=past tells tasks by their classes, and here a class comes in several tasks: give "
                "rehearsal.update=task_end"
            )
        for name, value, remedy in (
            ("update", self.update == "task_end" and self.update, "update=step"),
            ("rehearse", self.rehearse == "past" and self.rehearse, "rehearse=seen"),
        ):
            if value and boundaries == "hidden":
                raise ConfigurationError(
                    f"rehearsal.{name}={value} needs to know where tasks end: give rehearsal.{remedy}, or "
                    "data.boundaries=known"
                )

    def check_without_agent(self, has_labels: bool, has_tasks: bool = False) -> None:
        """Refuse what needs an agent of ours, whose loss knows weights, or our data module, which knows tasks.

        Args:
            has_labels: whether it is known where a batch has its labels, and how many classes there are.
            has_tasks: whether the data come from our data module, so that the loss alone is in question.

        Raises:
            ConfigurationError: with the remedy.
        """
        if self.weighting == "nil":
            raise ConfigurationError(
                "rehearsal.weighting=nil needs an agent of ours, whose loss knows weights: give weighting='none'"
            )
        for name, value, remedy in (
            ("loss", self.loss == "sum" and self.loss, "loss='mean'"),
            ("update", self.update == "task_end" and self.update, "update='step'"),
            ("rehearse", self.rehearse == "past" and self.rehearse, "rehearse='seen'"),
            ("rehearsal_ratio", self.rehearsal_ratio, "buffer_size"),
            ("store", self.store == "reference" and self.store, "store='rows'"),
        ):
            if value and (name == "loss" or not has_tasks):
                raise ConfigurationError(
                    f"rehearsal.{name}={value} needs an agent of ours and its data module: give {remedy}"
                )
        if not (has_labels or has_tasks) and self.policy in ("nil", "class_balanced", "greedy"):
            raise ConfigurationError(
                f"rehearsal.policy={self.policy} needs labels: give Rehearsal(label=..., num_classes=...), or "
                "policy='reservoir'"
            )

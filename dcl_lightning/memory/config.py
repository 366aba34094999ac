"""Configuration of the rehearsal memory: checked on construction, completed with an agent's own values."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, TypeVar, get_type_hints

from dcl_lightning.errors import ConfigurationError, check_number, check_words, suggestion, whole_number
from dcl_lightning.memory.policies import POLICIES, PolicyName, policy_class

__all__ = ["SIZES", "MemorySize", "RehearsalConfig", "ResolvedConfig", "resolve"]


SIZES = ("num_representatives", "buffer_size", "rehearsal_ratio")  # of which at most one is given

_MOST_ROWS = 2**40  # the ids of rows have to be int64, their bytes, too

_Size = TypeVar("_Size", bound="MemorySize")


@dataclass(frozen=True)
class MemorySize:
    """Capacity of the rehearsal memory, given by at most one of three values.

    Args:
        num_representatives: stored samples per class and worker.
        buffer_size: stored samples over all workers and classes.
        rehearsal_ratio: stored share of the training set, in (0, 1].
    """

    num_representatives: int | None = None
    buffer_size: int | None = None
    rehearsal_ratio: float | None = None

    def __post_init__(self) -> None:
        given = {name: value for name, value in self.explicit.items() if name in SIZES}
        if len(given) > 1:
            said = " and ".join(f"{name}={value}" for name, value in given.items())
            raise ConfigurationError(f"rehearsal: {said} given together; give one of {', '.join(SIZES)}")
        for name, value in given.items():
            if name == "rehearsal_ratio":
                check_number(f"rehearsal.{name}", value, above=0, at_most=1)
            else:
                whole_number(f"rehearsal.{name}", value, 1, _MOST_ROWS + 1)

    @classmethod
    def of(cls: type[_Size], given: MemorySize | Mapping[str, Any] | None) -> _Size:
        """Return a configuration from a configuration, a dict of its values, or None.

        Args:
            given: a configuration, or a dict of its values.

        Raises:
            ConfigurationError: a key is unknown, or the constructor refuses a value.
        """
        if given is not None and not isinstance(given, (MemorySize, Mapping)):
            raise ConfigurationError(f"rehearsal={given!r}: give a {cls.__name__}, or a dict of its values")
        values = given.explicit if isinstance(given, MemorySize) else given or {}
        names = [field.name for field in fields(cls)]
        for key in values:
            if key not in names:
                near = suggestion(str(key), names) or f"; give one of {', '.join(names)}"
                raise ConfigurationError(f"rehearsal.{key}: no such key{near}")
        return cls(**values)

    @property
    def explicit(self) -> dict[str, Any]:
        """The values that are not None, by name."""
        return {name: value for name, value in vars(self).items() if value is not None}

    def total(self, num_classes: int, world_size: int, num_samples: int, default: int) -> int:
        """Return the capacity in samples, over all workers.

        Args:
            num_classes: classes of the whole stream.
            world_size: number of workers.
            num_samples: training samples of the whole stream.
            default: capacity if no size is given.
        """
        if self.buffer_size is not None:
            return self.buffer_size
        if self.num_representatives is not None:
            return self.num_representatives * num_classes * world_size
        if self.rehearsal_ratio is not None:
            return max(int(self.rehearsal_ratio * num_samples), 1)
        return default


_Quota = Literal["fixed", "adaptive"]
_Update = Literal["step", "task_end"]
_DrawFrom = Literal["seen", "past"]
_Loss = Literal["mean", "sum"]
_Weighting = Literal["nil", "none"]
_Scope = Literal["local", "global"]
_Execution = Literal["inline", "blocking", "nonblocking"]
_Prefetch = Literal["draw", "device", "batch"]
_RowFormat = Literal["inputs", "index", "augmented"]

_OFFERS_ALL = tuple(name for name, policy in POLICIES.items() if policy.offers_all)
_NUM_CANDIDATES = 20
# Values that contradict each other (None stands for any value), and the remedy.
_CONTRADICTIONS: tuple[tuple[dict[str, tuple[str, ...] | None], str], ...] = (
    (
        {"num_candidates": None, "policy": _OFFERS_ALL},
        "all samples are offered; leave num_candidates out, or give policy=class_balanced, fifo or nil",
    ),
    (
        {"policy": _OFFERS_ALL, "weighting": ("nil",)},
        "that weighting counts candidates, but all samples are offered; give weighting=none, or policy=nil",
    ),
    (
        {"scope": ("global",), "draw_from": ("past",), "update": ("step",)},
        "a global draw cannot exclude classes; give update=task_end, or scope=local",
    ),
    (
        {"scope": ("global",), "quota": ("adaptive",)},
        "a global draw needs a memory that never shrinks; give quota=fixed, or scope=local",
    ),
    (
        {"row_format": ("augmented",), "update": ("task_end",)},
        "no sample is augmented at the end of a task; give update=step, or row_format=inputs",
    ),
    (
        {"prefetch": ("device", "batch"), "execution": ("inline",)},
        "prefetching is background work; give execution=blocking, or prefetch=draw",
    ),
)


def _refuse_contradictions(values: Mapping[str, Any], given: Collection[str], whose: str) -> None:
    for clash, remedy in _CONTRADICTIONS:
        found = {name: values.get(name) for name in clash}
        if all(found[name] is not None and (words is None or found[name] in words) for name, words in clash.items()):
            first, *others = sorted(clash, key=lambda name: name not in given)
            said = " and ".join(f"{n}={found[n]}" + ("" if n in given else f" ({whose})") for n in others)
            raise ConfigurationError(f"rehearsal.{first}={found[first]} does not go with {said}: {remedy}")


@dataclass(frozen=True)
class RehearsalConfig(MemorySize):
    """Contents of the memory, draws from it, and execution of its work.

    For a value that is None ``resolve`` takes the agent's own, from the attribute ``memory`` of its class; for modules
    that are not agents it takes that of plain replay, a reservoir filled at each step. A given size replaces any size
    of the agent's own.

    Args:
        num_representatives: R, stored samples per class and worker; 60 if no size is given.
        buffer_size: stored samples over all workers and classes.
        rehearsal_ratio: stored share of the training set, in (0, 1].
        num_samples: r, representatives added to each batch of a worker, at least 1.
        policy: decides which samples enter the memory and which leave it.
        num_candidates: c, samples of each batch offered to the memory, at least 1. Not for policies such as
            ``reservoir``, to which all samples are offered.
        quota: share of a class: ``fixed`` (of all classes of the stream, from the start) or ``adaptive`` (of the
            classes seen so far).
        update: insert samples at every training ``step``, or once at the ``task_end``.
        draw_from: draw from all stored samples (``seen``), or only from those of earlier tasks (``past``).
        loss: one ``mean`` over new and rehearsed samples, or the ``sum`` of their two means.
        weighting: weight of a representative: ``nil``, or ``none`` (1).
        scope: draw from this worker's memory (``local``) or from those of all workers (``global``).
        execution: ``inline`` (on the training thread, after the step), ``blocking`` (in the background, one step
            ahead) or ``nonblocking`` (in the background; a step never waits and may reuse the last representatives).
        prefetch: what the background prepares: representatives (``draw``), representatives on the device with space
            for the new batch (``device``), or the loader's next batch as well (``batch``).
        row_format: what is stored: ``inputs`` (as the loader gives them, augmented anew at each draw), ``index``
            (sample ids, whose inputs are read from the data set again; the same samples are drawn) or ``augmented``
            (inputs as the network gets them, never augmented again).
        storage: of the rows: ``cpu``, ``cuda``, or a folder for memory-mapped files.
        seed: of insertions and draws, to which each worker adds its rank; the seed of ``seed_everything`` if None.

    Raises:
        ConfigurationError: a value is out of range, or values contradict each other.
    """

    num_samples: int | None = None
    policy: PolicyName | None = None
    num_candidates: int | None = None
    quota: _Quota | None = None
    update: _Update | None = None
    draw_from: _DrawFrom | None = None
    loss: _Loss | None = None
    weighting: _Weighting | None = None
    scope: _Scope | None = None
    execution: _Execution | None = None
    prefetch: _Prefetch | None = None
    row_format: _RowFormat | None = None
    storage: str | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_words("rehearsal", get_type_hints(type(self)), vars(self))
        for name, least, below in (("num_samples", 1, None), ("num_candidates", 1, None), ("seed", 0, 1 << 32)):
            if name in self.explicit:
                whole_number(f"rehearsal.{name}", self.explicit[name], least, below)
        _refuse_contradictions(vars(self), self.explicit, "")


@dataclass(frozen=True, kw_only=True)
class ResolvedConfig(RehearsalConfig):
    """A configuration in which every value is given, except that at most one size is; made by ``resolve``.

    For the values see ``RehearsalConfig``; ``num_candidates`` is None if all samples are offered to the policy.
    """

    num_samples: int
    policy: PolicyName
    quota: _Quota
    update: _Update
    draw_from: _DrawFrom
    loss: _Loss
    weighting: _Weighting
    scope: _Scope
    execution: _Execution
    prefetch: _Prefetch
    row_format: _RowFormat
    storage: str

    def forgets_tasks(self) -> str | None:
        """Return how the memory forgets tasks whose classes come again, see ``Policy.forgets``; None if it does not."""
        return policy_class(self.policy, self.quota).forgets

    def check_stream(self, classes_come_again: bool, boundaries: str, scenario: str) -> None:
        """Refuse values that a stream of tasks does not support.

        Args:
            classes_come_again: whether a class comes in several tasks.
            boundaries: whether the tasks' starts and ends are ``known`` or ``hidden``.
            scenario: what the stream is made by, for messages.

        Raises:
            ConfigurationError: with the remedy.
        """
        if self.draw_from == "past" and self.update == "step" and classes_come_again:
            raise ConfigurationError(
                f"rehearsal.draw_from=past tells tasks apart by their classes, but with data.scenario={scenario} a "
                "class comes in several tasks: give rehearsal.update=task_end"
            )
        for name, value, remedy in (
            ("update", self.update == "task_end" and self.update, "update=step"),
            ("draw_from", self.draw_from == "past" and self.draw_from, "draw_from=seen"),
        ):
            if value and boundaries == "hidden":
                raise ConfigurationError(
                    f"rehearsal.{name}={value} needs to know where tasks end: give rehearsal.{remedy}, or "
                    "data.boundaries=known"
                )

    def check_without_agent(self, has_labels: bool, has_tasks: bool = False) -> None:
        """Refuse values that need an agent, whose loss uses weights, or a ``ContinualDataModule``, which has tasks.

        Args:
            has_labels: whether ``label`` and ``num_classes`` are given.
            has_tasks: whether the data come from a ``ContinualDataModule``.

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
            ("draw_from", self.draw_from == "past" and self.draw_from, "draw_from='seen'"),
            ("rehearsal_ratio", self.rehearsal_ratio, "buffer_size"),
            ("row_format", self.row_format == "index" and self.row_format, "row_format='inputs'"),
        ):
            if value and (name == "loss" or not has_tasks):
                raise ConfigurationError(
                    f"rehearsal.{name}={value} needs an agent of ours and its data module: give {remedy}"
                )
        if not (has_labels or has_tasks) and POLICIES[self.policy].needs_labels:
            raise ConfigurationError(
                f"rehearsal.policy={self.policy} needs labels: give Rehearsal(label=..., num_classes=...), or "
                "policy='reservoir'"
            )


# Plain replay, which needs neither labels, nor tasks, nor a loss that uses weights.
_NEUTRAL = RehearsalConfig(
    num_samples=20, policy="reservoir", quota="fixed", update="step", draw_from="seen", loss="mean", weighting="none",
    scope="local", execution="inline", prefetch="draw", row_format="inputs", storage="cpu",
)  # fmt: skip


def resolve(
    given: RehearsalConfig,
    *own: RehearsalConfig,
    required: Mapping[str, Any] | None = None,
    owner: str = "",
) -> ResolvedConfig:
    """Return a complete configuration: the given values override the agent's own, which override plain replay's.

    A size replaces any other size. If the policy is offered all samples, ``num_candidates`` is dropped, unless it was
    given, which is refused.

    Args:
        given: by the user.
        *own: values of an agent; later ones override earlier ones.
        required: values that define the agent's method.
        owner: of ``own`` in messages, such as ``agent ER``; empty for plain replay.

    Raises:
        ConfigurationError: a value contradicts another one or ``required``; the message names given values first.
    """
    values: dict[str, Any] = {}
    for layer in (_NEUTRAL, *own, given):
        if any(size in layer.explicit for size in SIZES):
            values = {name: value for name, value in values.items() if name not in SIZES}
        if layer.policy in _OFFERS_ALL:
            values.pop("num_candidates", None)
        values |= layer.explicit
    if values["policy"] not in _OFFERS_ALL:
        values.setdefault("num_candidates", _NUM_CANDIDATES)
    for name, value in (required or {}).items():
        if values[name] != value:
            raise ConfigurationError(
                f"rehearsal.{name}={values[name]}: {owner} has {name}={value}; leave {name} out, or take another agent"
            )
    _refuse_contradictions(values, given.explicit, f"{owner}'s own" if owner else "the default")
    return ResolvedConfig(**values)

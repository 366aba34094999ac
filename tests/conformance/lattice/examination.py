"""One draw in all runs that have to agree, and the checks of each run."""

from __future__ import annotations

import math
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from dcl_lightning.errors import ConfigurationError
from tests.conformance.lattice.draws import ICARL, MEMORY_AXES, Draw, named_axes, obeyed, value_of
from tests.conformance.lattice.fits import Fit, Memory, Step, make_agent, make_saver, make_trainer, run_fit
from tests.conformance.lattice.policies import gdumb_counts, policy_counts
from tests.conformance.lattice.truth import Truth

Gather = Callable[[Any], list[Any]]


class Examination:
    """One draw, run in all the ways that have to agree.

    Args:
        drawn: the draw.
        folder: for its files.
        more: makes further arguments of a trainer, such as a strategy.
        gather: gives what each worker has, the same on all of them; each calls it.
    """

    def __init__(self, drawn: Draw, folder: Path, more: Callable[[], dict[str, Any]] = dict,
                 gather: Gather = lambda one: [one]) -> None:  # fmt: skip
        self.drawn, self.folder, self.more, self.gather = drawn, folder, more, gather
        self.faults: list[str] = []
        self.refused: str | None = None

    def run(self) -> Examination:
        """Run the draw and note its faults, or why it was refused."""
        drawn, folder = self.drawn, self.folder
        folder.mkdir(parents=True, exist_ok=True)
        self.truth = Truth(drawn)
        fresh_agent_state: dict[str, Tensor] = {}
        try:
            data = self.truth.datamodule(drawn, 0)
            agent = make_agent(drawn, self.truth, folder)
            fresh_agent_state = {k: v.clone() for k, v in agent.state_dict().items()}
        except (ConfigurationError, MisconfigurationException) as error:
            self._refusal(error)
            return self
        saver = make_saver(drawn, folder / "saved")
        first = self._fit("fit", data, agent, saver)
        if isinstance(first.error, (ConfigurationError, MisconfigurationException)) and not first.steps:
            files = [str(path.relative_to(folder)) for path in folder.rglob("*")]
            if files:
                self.faults.append(f"the refused fit left {files}")
            self._untouched(data, "the refused fit")
            self._refusal(first.error)
            return self
        if first.error is not None:
            return self
        self.first, self.config = first, getattr(getattr(agent, "rehearsal", None), "config", None)
        self._untouched(data, "fit")
        self._in_effect()
        self.logs = self.gather(first.steps)
        weights = [p.detach() for p in agent.parameters()]
        if any(not _same(weights, other) for other in self.gather(weights)):
            self.faults.append("workers ended with different weights")
        self._rows()
        self._order()
        self._memory()
        repeats = self.config is None or self.config.execution != "nonblocking"
        if repeats:
            self._resume(saver)
        self._second(data, agent, fresh_agent_state, repeats)
        return self

    def _fit(self, what: str, data: Any, agent: Any, saver: Any = None, ckpt: Path | None = None,
             drawn: Draw | None = None, **more: Any) -> Fit:  # fmt: skip
        drawn = self.drawn if drawn is None else drawn
        fit = run_fit(drawn, self.truth, self.folder, data, agent, saver, ckpt, **self.more(), **more)
        refused = isinstance(fit.error, (ConfigurationError, MisconfigurationException)) and not fit.steps
        errors = self.gather(None if fit.error is None else type(fit.error).__name__)
        if len(set(errors)) > 1:
            self.faults.append(f"{what}: workers ended with {errors}")
            fit.error = fit.error or RuntimeError("another worker failed")
        if fit.error is not None and not (refused and what in ("fit", "second")):
            self.faults.append(f"{what}: {type(fit.error).__name__} after {len(fit.steps)} steps: {fit.error}")
        self.faults += [f"{what} left behind: {text}" for text in fit.left]
        for step in fit.steps:
            if step.modes:
                self.faults.append(f"{what}: in training other modes of {step.modes}")
                break
        return fit

    # -- refusals --

    def _refusal(self, error: BaseException) -> None:
        self.refused = str(error)
        if len(set(self.gather(self.refused))) > 1:
            self.faults.append(f"refused with other words on other workers: {self.refused!r}")
        if "\n" in self.refused.strip():
            self.faults.append(f"refused in several lines: {self.refused!r}")
        if not named_axes(self.refused, self.drawn):
            self.faults.append(f"refused without naming what was given: {self.refused!r}")
            return
        # Without what it names, another thing may be refused, but not the same.
        other = obeyed(self.refused, self.drawn)
        again = Examination(other, self.folder.with_name("obeyed"), self.more, self.gather)
        if again.starts() == self.refused:
            self.faults.append(f"refused for what it does not name: {self.refused!r}, also of {other}")

    def starts(self) -> str | None:
        """Return why the draw is refused, None if it is not; at most one step is done."""
        self.truth = Truth(self.drawn)
        try:
            data, agent = self.truth.datamodule(self.drawn, 0), make_agent(self.drawn, self.truth, self.folder)
            trainer = make_trainer({**self.drawn, "limit": None}, self.folder, [], max_steps=1, **self.more())
            trainer.fit(agent, datamodule=data)
        except (ConfigurationError, MisconfigurationException) as error:
            return str(error)
        return None

    # -- rows --

    def _rows(self) -> None:
        truth = self.truth
        exact = not value_of(self.drawn, "augment")
        for number, step in enumerate(self.first.steps):
            where = f"epoch {step.epoch}, step {number}"
            if not torch.equal(step.written, step.ids):
                wrong = (step.written != step.ids).nonzero().flatten().tolist()
                self.faults.append(f"{where}: rows {wrong} of {step.num_new} new: inputs of {step.written.tolist()}, "
                                   f"ids {step.ids.tolist()}")  # fmt: skip
                return
            if not torch.equal(truth.labels[step.written], step.labels):
                self.faults.append(f"{where}: labels {step.labels.tolist()} of samples {step.ids.tolist()}")
                return
            if exact and not torch.equal(truth.as_the_network_gets(step.ids, step.inputs.dtype), step.inputs):
                self.faults.append(f"{where}: inputs are not those of the data set")
                return
        self._given_before()

    def _given_before(self) -> None:
        """Check what is stored of a sample as the network had it: its augmented input, and its logits."""
        if self.config is None or len(self.logs) > 1:
            return
        before: dict[str, dict[int, list[Tensor]]] = {"input": {}, "logits": {}}
        stored = {"input": self.config.row_format == "augmented", "logits": self.config.update == "step"}
        for number, step in enumerate(self.first.steps):
            old = {"input": step.inputs[step.old], "logits": step.logits}
            for name, rows in old.items():
                for sample, row in zip(step.ids[step.old].tolist(), rows if rows is not None else (), strict=False):
                    if stored[name] and not any(torch.equal(row, one) for one in before[name].get(sample, [])):
                        self.faults.append(f"step {number}: sample {sample} comes back with an {name} it never had")
                        return
            new = {"input": step.inputs[step.new], "logits": step.new_logits}
            for name, rows in new.items():
                for sample, row in zip(step.ids[step.new].tolist(), rows if rows is not None else (), strict=False):
                    before[name].setdefault(sample, []).append(row)

    # -- the order of the stream, and what may be rehearsed --

    def _order(self) -> None:
        truth, get = self.truth, lambda axis: value_of(self.drawn, axis)
        exemplars = get("agent") in ICARL
        first_task: dict[int, int] = {}  # in which a sample came first, on any worker
        per_epoch: dict[int, list[int]] = {}
        for log in self.logs:
            for step in log:
                new = step.ids[step.new][step.weights[step.new] > 0].tolist()
                per_epoch.setdefault(step.epoch, []).extend(new)
                for sample in new:
                    first_task[sample] = min(step.task, first_task.get(sample, step.task))
        task_of_epoch = {step.epoch: step.task for step in self.logs[0]}
        cut = get("limit_train_batches") != 1.0
        if truth.tasks is not None and not get("concatenate_tasksets") and not exemplars:
            for epoch, ids in per_epoch.items():
                foreign = [i for i in ids if int(truth.tasks[i]) != task_of_epoch[epoch]]
                if foreign:
                    self.faults.append(f"epoch {epoch}: samples {foreign} of other tasks are new")
                    return
        for epoch, ids in per_epoch.items():
            double = [i for i, n in Counter(ids).items() if n > 1]
            if double:
                self.faults.append(f"epoch {epoch}: samples {double} came twice")
                return
        complete = get("stopping") is None and get("limit") is None and not cut
        if complete and get("val_ratio") == 0 and not exemplars:
            missing = set(range(len(truth.labels))) - set(first_task)
            if missing:
                self.faults.append(f"samples {sorted(missing)} were never trained on")
        if self.config is None and not exemplars:
            if any(len(s.ids) > s.num_new for log in self.logs for s in log):
                self.faults.append("an agent without memory rehearses")
            return
        self._drawn_rows(first_task, complete)

    def _drawn_rows(self, first_task: dict[int, int], complete: bool) -> None:
        """Check what is rehearsed: met before, from where it may be drawn, as many as there are, none twice."""
        config, single = self.config, len(self.logs) == 1
        if config is None:
            return
        met: list[set[int]] = [set() for _ in self.logs]
        for number, steps in enumerate(zip(*self.logs, strict=True)):
            for rank, step in enumerate(steps):
                old = step.ids[step.old].tolist()
                known = set.union(*met) if config.scope == "global" or config.update == "task_end" else met[rank]
                strange = [i for i in old if i not in known] if config.update == "step" else []
                if strange:
                    self.faults.append(f"step {number}: samples {strange} are rehearsed before they came")
                    return
                # What was left out of its task is new in a later one, where that comes with the earlier ones.
                late = config.update == "task_end" and not complete and value_of(self.drawn, "concatenate_tasksets")
                if (config.update == "task_end" or config.draw_from == "past") and not late:
                    present = [i for i in old if first_task.get(i, -1) >= step.task]
                    if present:
                        self.faults.append(f"step {number}: samples {present} of the present task are rehearsed")
                        return
                if config.policy != "nil" and len(set(old)) < len(old):
                    self.faults.append(f"step {number}: a sample is rehearsed twice: {old}")
                    return
                if len(old) > config.num_samples:
                    self.faults.append(f"step {number}: {len(old)} rows are rehearsed")
                    return
                if step.memory is not None and config.scope == "local" and self._draw_is_wrong(number, step, old):
                    return
            for rank, step in enumerate(steps):
                met[rank].update(step.ids[step.new][step.weights[step.new] > 0].tolist())
            self._weights(number, steps, single)

    def _draw_is_wrong(self, number: int, step: Step, old: list[int]) -> bool:
        """Compare with the memory from which was drawn."""
        assert step.memory is not None
        allowed = step.memory.ids.tolist()
        if self.config.draw_from == "past" and self.config.update == "step":
            present = set(self.truth.labels[step.ids[step.new]].tolist()) if self.truth.tasks is None else None
            if present is None:
                assert self.truth.tasks is not None
                classes = set(self.truth.labels[self.truth.tasks == step.task].tolist())
            else:
                return False
            allowed = [i for i in allowed if int(self.truth.labels[i]) not in classes]
        if Counter(old) - Counter(allowed):
            self.faults.append(f"step {number}: {old} were drawn from {allowed}")
            return True
        if len(old) != min(self.config.num_samples, len(allowed)):
            self.faults.append(f"step {number}: {len(old)} were drawn from {len(allowed)} rows")
            return True
        return False

    def _weights(self, number: int, steps: tuple[Step, ...], single: bool) -> None:
        """Check that all workers divide by the same number, which is what their rows weigh."""
        if self.config.execution == "nonblocking" and not single:
            return  # a worker may have gone on with other rows than those that the others heard of
        new = sum(float(s.weights[s.new].sum()) for s in steps) / len(steps)
        old = sum(float(s.weights[s.old].sum()) for s in steps) / len(steps)
        expected = new if self.config.loss == "sum" else new + old
        close = 1e-5 if "16-true" not in value_of(self.drawn, "precision") else 1e-2
        if any(not math.isclose(s.normalizer, expected, rel_tol=close) for s in steps):
            self.faults.append(f"step {number}: divides by {[s.normalizer for s in steps]}, rows weigh {expected}")
        elif self.config.loss == "sum" and old and not math.isclose(old, new, rel_tol=close):
            self.faults.append(f"step {number}: rehearsed rows weigh {old}, new ones {new}")
        elif (self.config.loss, self.config.weighting) == ("mean", "none") and any(
            not bool((s.weights[s.old] == 1).all()) for s in steps
        ):
            self.faults.append(f"step {number}: weights {[s.weights.tolist() for s in steps]}")

    # -- the memory --

    def _in_effect(self) -> None:
        """Check that what was given for the memory is what it works with."""
        if self.config is None:
            return
        for axis in MEMORY_AXES:
            given, used = value_of(self.drawn, axis), getattr(self.config, axis)
            if given is not None and axis != "storage" and given != used:
                self.faults.append(f"rehearsal.{axis}={given} was given, {used} is used")

    def _memory(self) -> None:
        first = self.first
        if first.exemplars is not None:
            self._exemplars()
        if self.config is None:
            return
        size = value_of(self.drawn, "size")
        classes, workers = self.truth.num_classes, len(self.logs)
        total = size.get("buffer_size") or size.get("num_representatives", 0) * classes * workers
        total = total or max(int(size["rehearsal_ratio"] * len(self.truth.labels)), 1)
        memories = self.gather(first.memory)
        if sum(m.capacity for m in memories if m is not None) != total and all(m is not None for m in memories):
            self.faults.append(f"room for {[m.capacity for m in memories]} rows in place of {total}")
        offered: list[list[int]] = []
        for number, step in enumerate(first.steps):
            last = first.steps[number - 1].memory if number else None
            when = f"before step {number}"
            if step.memory is not None and self._memory_is_wrong(when, step.memory, offered, step.task, last):
                return
            offered.append(step.ids[step.new][step.weights[step.new] > 0].tolist())
        if first.memory is not None:
            # Its last task may have been cut off, and what enters at its end not have entered.
            task = first.steps[-1].task + 1 if value_of(self.drawn, "limit") is None else None
            self._memory_is_wrong("at the end", first.memory, offered, task)

    def _memory_is_wrong(self, when: str, memory: Memory, offered: list[list[int]], tasks: int | None,
                         before_it: Memory | None = None) -> bool:  # fmt: skip
        before = len(self.faults)
        truth, config = self.truth, self.config
        if memory.written is not None and not torch.equal(memory.written, memory.ids):
            self.faults.append(f"{when}: inputs of {memory.written.tolist()} are stored as {memory.ids.tolist()}")
        if bool((memory.ids < 0).any()):
            self.faults.append(f"{when}: rows without an id: {memory.ids.tolist()}")
        elif not torch.equal(truth.labels[memory.ids], memory.labels):
            self.faults.append(f"{when}: stored labels {memory.labels.tolist()} of samples {memory.ids.tolist()}")
        if before_it is not None and config.update == "step":
            foreign = set(memory.ids.tolist()) - set(before_it.ids.tolist()) - set(offered[-1])
            if foreign:
                self.faults.append(f"{when}: samples {foreign} have entered that were not offered")
            if (config.policy, config.quota) == ("greedy", "adaptive"):
                known = gdumb_counts(truth, memory.capacity, before_it.ids.tolist(), offered)
                if not torch.equal(known, torch.bincount(memory.labels, minlength=truth.num_classes)):
                    self.faults.append(
                        f"{when}: {memory.labels.bincount().tolist()} rows of the classes, not {known.tolist()}"
                    )
        if len(memory.ids) > memory.capacity:
            self.faults.append(f"{when}: {len(memory.ids)} rows in a memory of {memory.capacity}")
        if config.policy != "nil" and len(memory.ids.unique()) < len(memory.ids):
            self.faults.append(f"{when}: samples stored twice: {memory.ids.tolist()}")
        if config.update == "step":
            expected = policy_counts(config, truth, memory.capacity, offered)
        else:
            whole = self._tasksets(tasks)
            if whole is None:
                return len(self.faults) > before
            expected = policy_counts(config, truth, memory.capacity, whole)
        counts = torch.bincount(truth.labels[memory.ids], minlength=truth.num_classes)
        if expected.stored is not None and len(memory.ids) != expected.stored:
            self.faults.append(f"{when}: {len(memory.ids)} rows are stored, {config.policy} has {expected.stored}")
        if not bool(((expected.least <= counts) & (counts <= expected.most)).all()):
            self.faults.append(
                f"{when}: {counts.tolist()} rows of the classes; {config.policy}, {config.quota} has from "
                f"{expected.least.tolist()} to {expected.most.tolist()} of them"
            )
        return len(self.faults) > before

    def _tasksets(self, tasks: int | None) -> list[list[int]] | None:
        """Return what tasks so far offered at their ends; None where it is not known here."""
        truth = self.truth
        if tasks is None or truth.tasks is None or len(self.logs) > 1 or value_of(self.drawn, "val_ratio") > 0:
            return None
        if value_of(self.drawn, "limit_train_batches") != 1.0:
            return None  # which samples of a task the limit leaves is for the package to choose
        return [torch.nonzero(truth.tasks == task).flatten().tolist() for task in range(tasks)]

    def _exemplars(self) -> None:
        """iCaRL: of each class met the same share of the memory, of samples of the class."""
        assert self.first.exemplars is not None
        truth, exemplars = self.truth, self.first.exemplars
        for y, ids in exemplars.items():
            if len(ids.unique()) < len(ids) or not bool((truth.labels[ids] == y).all()):
                self.faults.append(f"exemplars {ids.tolist()} of class {y}")
        if exemplars:
            capacity = self.first.agent.capacity
            share = capacity // len(exemplars)
            if any(len(ids) > share for ids in exemplars.values()):
                self.faults.append(f"{ {y: len(ids) for y, ids in exemplars.items()} } exemplars, {share} a class")

    # -- repetition --

    def _resume(self, saver: ModelCheckpoint) -> None:
        steps = self._saved(saver)
        if not steps:
            return
        chosen = self._chosen(sorted(steps))
        agent = make_agent(self.drawn, self.truth, self.folder / "again", seed=7)
        data = self.truth.datamodule(self.drawn, 9)
        again = self._fit(f"resume from step {chosen}", data, agent, ckpt=steps[chosen])
        # Where the time is over before the first step Lightning starts no training, and nothing is made up for.
        over = value_of(self.drawn, "limit") == "max_time" and not again.steps
        if again.error is None and not over:
            self._agree(f"resumed from step {chosen}", again, self.first)
        if value_of(self.drawn, "limit") is None or value_of(self.drawn, "checkpoint") == "epochs":
            return  # at the end of an epoch that a limit cut off Lightning counts it as over
        # A run that a limit cut off goes on as if there had been none.
        free = {axis: value for axis, value in self.drawn.items() if axis != "limit"}
        whole = self._fit("without limit", self.truth.datamodule(free, 0),
                          make_agent(free, self.truth, self.folder / "whole"), drawn=free)  # fmt: skip
        last = max(steps)
        agent = make_agent(free, self.truth, self.folder / "on", seed=7)
        on = self._fit(f"limit lifted at step {last}", self.truth.datamodule(free, 9), agent, ckpt=steps[last],
                       drawn=free)  # fmt: skip
        if whole.error is None and on.error is None:
            self._agree(f"limit lifted at step {last}", on, whole)

    def _saved(self, saver: ModelCheckpoint) -> dict[int, Path]:
        found = sorted(Path(str(saver.dirpath)).glob("*.ckpt")) if saver.dirpath else []
        return {int(path.stem.split("=")[1].split("-")[0]): path for path in found}

    def _chosen(self, steps: list[int]) -> int:
        """Return the step to resume from, as the draw says."""
        kind, rng = value_of(self.drawn, "resume"), np.random.default_rng(value_of(self.drawn, "seed") + 1)
        every = value_of(self.drawn, "accumulate_grad_batches")
        ends, count = [], 0
        log, batch = self.first.steps, 0
        for place, step in enumerate(log):
            batch += 1
            last = place + 1 == len(log) or log[place + 1].epoch != step.epoch
            if batch % every == 0 or last:
                count += 1
                batch = 0 if last else batch
            if place + 1 < len(log) and log[place + 1].task != step.task:
                ends.append(count)
        if kind == "last":
            return steps[-1]
        wanted = {"task_end": ends, "after_task_end": [end + 1 for end in ends]}.get(kind, steps)
        among = [step for step in wanted if step in steps] or steps
        return among[int(rng.integers(len(among)))]

    def _agree(self, what: str, fit: Fit, other: Fit) -> None:
        tail = other.steps[len(other.steps) - len(fit.steps) :] if fit.steps else []
        if len(tail) != len(fit.steps):
            self.faults.append(f"{what}: {len(fit.steps)} steps in place of at most {len(other.steps)}")
            return
        for number, (ours, theirs) in enumerate(zip(fit.steps, tail, strict=True)):
            for name in ("epoch", "num_new", "ids", "draw_ids", "weights", "normalizer", "inputs", "logits", "loss"):
                if not _same(getattr(ours, name), getattr(theirs, name)) and not _both_nan(ours, theirs, name):
                    self.faults.append(
                        f"{what}: its step {number} of {len(tail)} (epoch {theirs.epoch}) differs in {name}: "
                        f"{_short(getattr(ours, name))} in place of {_short(getattr(theirs, name))}"
                    )
                    return
        for name in ("state", "matrix", "exemplars"):
            if not _same(getattr(fit, name), getattr(other, name)):
                ours, theirs = getattr(fit, name), getattr(other, name)
                which = [k for k in theirs if not _same(ours.get(k), theirs[k])] if isinstance(theirs, dict) else ""
                self.faults.append(f"{what}: another {name} {which}")
        if not fit.steps:
            return  # nothing was left to train on, and Lightning calls no hook in which a memory is taken back
        if (fit.memory is None) != (other.memory is None):
            self.faults.append(f"{what}: one has a memory")
        elif (fit.memory is not None and other.memory is not None) and not _same(
            fit.memory.columns, other.memory.columns
        ):
            self.faults.append(f"{what}: other rows: {fit.memory.ids.tolist()}, {other.memory.ids.tolist()}")

    # -- afterwards --

    def _second(self, data: Any, agent: Any, fresh_state: dict[str, Tensor], repeats: bool) -> None:
        """Fit another agent on the data module, then the first one again."""
        keep = {"num_classes", "num_tasks", "scenario", "boundaries", "sizes", "one_row_left", "inputs", "augment",
                "batch_size", "val_ratio", "sharding", "concatenate_tasksets", "seed"}  # fmt: skip
        other = {axis: value for axis, value in self.drawn.items() if axis in keep}
        name = value_of(self.drawn, "second")
        other |= {"agent": "base" if name == "nil_v2" else name}
        # Only what the data module gives is of interest here.
        brief = {"barebones": True, "limit_train_batches": 2, "limit_val_batches": 0}
        fits = []
        for place, used in (("fresh", None), ("used", data)):
            try:
                second = make_agent(other, self.truth, self.folder / place, seed=3)
            except (ConfigurationError, MisconfigurationException):
                return
            fits.append(self._fit("second", used or self.truth.datamodule(self.drawn, 0), second, drawn=other, **brief))
            if fits[0].error is not None:  # it cannot learn from such a stream
                other = {**other, "agent": "base"}
                second = make_agent(other, self.truth, self.folder / place, seed=3)
                fresh = self.truth.datamodule(self.drawn, 0)
                fits = [self._fit("second, base", fresh, second, drawn=other, **brief)]
        if fits[-1].error is None:
            self._agree(f"{other['agent']} on the used data module", fits[1], fits[0])
            self._untouched(data, f"the fit of {other['agent']}")
        if not repeats:
            return
        if value_of(self.drawn, "again") == "same":
            agent.load_state_dict(fresh_state)
        else:
            agent = make_agent(self.drawn, self.truth, self.folder / "third")
        again = self._fit("fitted again", data, agent)
        if again.error is None:
            self._agree("fitted again", again, self.first)

    def _untouched(self, data: Any, after: str) -> None:
        fresh = self.truth.datamodule(self.drawn, 0)
        fresh.setup()
        before, now = _public(fresh), _public(data)
        for name in before:
            if name in _KEPT or name not in now:
                continue
            if not _same_value(before[name], now[name]):
                self.faults.append(f"after {after} data.{name} is {_short(now[name])}, not {_short(before[name])}")


# What a data module may know after a fit.
_KEPT = {"task_id", "original_labels", "train_targets", "test_targets", "train_inputs", "test_inputs"}


def _same_value(first: Any, second: Any) -> bool:
    plain = (Tensor, dict, list, tuple, int, float, str, bool, type(None))
    return _same(first, second) if isinstance(first, plain) else type(first) is type(second)


def _both_nan(ours: Step, theirs: Step, name: str) -> bool:
    first, second = getattr(ours, name), getattr(theirs, name)
    return isinstance(first, float) and math.isnan(first) and math.isnan(second)


def _short(value: Any) -> str:
    text = str(value.tolist() if isinstance(value, Tensor) else value)
    return text if len(text) < 120 else text[:117] + "..."


def _public(thing: Any) -> dict[str, Any]:
    return {k: v for k, v in vars(thing).items() if not k.startswith("_") and k != "trainer"}


def _same(first: Any, second: Any) -> bool:
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return first.dtype == second.dtype and torch.equal(first.nan_to_num(-7), second.nan_to_num(-7))
    if isinstance(first, dict) and isinstance(second, dict):
        return first.keys() == second.keys() and all(_same(v, second[k]) for k, v in first.items())
    if isinstance(first, (list, tuple)) and isinstance(second, (list, tuple)):
        return len(first) == len(second) and all(_same(a, b) for a, b in zip(first, second, strict=True))
    return bool(first == second)


def examine(drawn: Draw, folder: Path) -> Examination:
    """Run a draw in this process, in a folder that is emptied first; return what was found."""
    shutil.rmtree(folder, ignore_errors=True)
    return Examination(drawn, folder / "run").run()


def shrunk(drawn: Draw, folder: Path) -> Draw:
    """Return a draw that fails as well, with as many axes at their defaults as can be."""
    for axis in [axis for axis in drawn if axis != "agent"]:
        smaller = {k: v for k, v in drawn.items() if k != axis}
        if examine(smaller, folder).faults:
            drawn = smaller
    return drawn

"""ContinualAgent: what all methods share, from the network and its optimizer to evaluation and prediction."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, is_dataclass
from typing import Any, ClassVar, Literal, get_type_hints
from weakref import WeakKeyDictionary

import lightning.pytorch as pl
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from typing_extensions import Self

from dcl_lightning._lightning import (
    callbacks_of,
    datamodule_of,
    dev_run_batches,
    has_progress_bar,
    loggers_write,
    monitored_by,
    set_callbacks,
    trainer_of,
)
from dcl_lightning.agents.computation import (
    Compile,
    MemoryFormat,
    compile_arguments,
    compile_networks,
    set_memory_format,
)
from dcl_lightning.agents.optimization import KeepUnseenRows, build_optimizer, epoch_schedule, rate_of
from dcl_lightning.agents.prediction import Inference
from dcl_lightning.agents.strategies import refuse_strategy
from dcl_lightning.agents.teacher import Teacher
from dcl_lightning.backbones import Backbone, CosineHead, LinearHead
from dcl_lightning.backbones.short_names import Network, network_of
from dcl_lightning.callbacks import StreamProgress, TaskClock, TaskReport
from dcl_lightning.callbacks.checkpoint import ResumableCheckpoints, scale_rates
from dcl_lightning.callbacks.evaluation import evaluation_batches
from dcl_lightning.callbacks.hooks import wrap_hook
from dcl_lightning.callbacks.loss_guard import LossGuard
from dcl_lightning.callbacks.trainer_checks import refuse_changing_accumulation, refuse_tuning
from dcl_lightning.checkpoint.resume import refuse_another_run
from dcl_lightning.comm import Comm, comm_of, is_parted
from dcl_lightning.data import ContinualDataModule
from dcl_lightning.distributed.fsdp2 import FSDP2Strategy, hold_whole, release_whole
from dcl_lightning.errors import CheckpointError, ConfigurationError, check_number, check_words, suggestion
from dcl_lightning.functional.losses import weighted_cross_entropy
from dcl_lightning.functional.schedules import ScaleLR, lr_factor, lr_scale, parameter_groups, warmup_divisor
from dcl_lightning.functional.scores import top_k_hits
from dcl_lightning.metrics.evaluation import EvaluationCounts, StreamResults
from dcl_lightning.types import Batch, InputSpec, Prediction, StateDict, Task

__all__ = ["ContinualAgent"]

_ALL = slice(None)
_HEAD_SCALE = 10.0  # of the program of ER-ACE
# For each trainer, what removes the callbacks that an agent added; called when the agent's run ends.
_CLEANUPS: WeakKeyDictionary[pl.Trainer, list[Callable[[], None]]] = WeakKeyDictionary()


class _NamedArguments:
    """Shows and checks all arguments of a class, also those that its constructor forwards by ``*args, **kwargs``."""

    __signature__: ClassVar[inspect.Signature]
    # Arguments of its bases that the class does not have: it gives them itself, or they mean nothing to it.
    fixed_arguments: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        found: dict[str, inspect.Parameter] = {}
        by_place = by_name = True
        for kind in (kind for kind in cls.__mro__ if by_name and "__init__" in vars(kind)):
            _, *parameters = inspect.signature(vars(kind)["__init__"]).parameters.values()
            for p in parameters:
                if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) and p.name not in cls.fixed_arguments:
                    found.setdefault(p.name, p if by_place else p.replace(kind=p.KEYWORD_ONLY))
            kinds = {p.kind for p in parameters}
            by_place &= inspect.Parameter.VAR_POSITIONAL in kinds
            by_name = inspect.Parameter.VAR_KEYWORD in kinds
        cls.__signature__ = inspect.Signature(sorted(found.values(), key=lambda p: p.kind))

    def __new__(cls, *args: object, **kwargs: object) -> Self:
        names = [*cls.__signature__.parameters]
        for name in kwargs.keys() - names:
            near = suggestion(name, names)
            raise TypeError(f"{cls.__name__} has no argument {name!r}: give one of {', '.join(names)}{near}")
        return super().__new__(cls)


class ContinualAgent(_NamedArguments, pl.LightningModule):
    """A learner of a stream of tasks; a subclass defines one step's loss, see ``training_loss``.

    ``num_classes`` and ``input_spec`` may be left out: the first call of a trainer takes them from its data module and
    makes the network then.

    Args:
        backbone: module from inputs ``(B, C, H, W)`` to features ``(B, feature_dim)``; or its name, such as ``mlp``,
            ``resnet18`` or one of timm's.
        num_classes: classes of the whole stream, K; the head has K outputs from the start.
        input_spec: shape of one input, for a backbone that leaves it open.
        epochs_per_task: epochs of every task, or one number per task.
        lr: learning rate at the start of each task, above 0; if None the rate of ``optimizer``, 0.05 without one.
        momentum: momentum of SGD, in [0, 1).
        weight_decay: L2 penalty in torch's convention, at least 0.
        decay_biases_and_norms: whether weight decay acts on biases and on the scales and shifts of
            normalisation layers too.
        milestones: epochs of a task after which the rate is multiplied by ``gamma``.
        gamma: that factor, above 0; one for all milestones, or a list with one for each.
        warmup_epochs: epochs at the start of each task in which the rate rises linearly with each step. It starts from
            one worker's rate: the unscaled ``lr``, or ``lr`` / N with ``scale_lr: none``.
        scale_lr: how ``lr`` grows with the number of workers N: not at all, with N, with its root, or
            with min(N, 64).
        optimizer: builds another optimizer than SGD from parameters or parameter groups, with its own momentum and
            weight decay, and with its own rate if it has one, as in ``partial(Adam, lr=0.001)``, and ``lr`` is None.
        lr_scheduler: builds a schedule from the optimizer, as ``partial(CosineAnnealingLR, T_max=10)``, in place of
            ``milestones`` and ``warmup_epochs``. It takes a step after each epoch, and starts again with each task.
        optimizer_reset: whether each task starts with a fresh optimizer state and schedule.
        reset_state_dict: whether each task starts from the initial weights (the scratch baseline).
        train_classes: train the outputs of ``all`` classes, or only of those ``seen`` so far: of the tasks that have
            started, as a head does that gets outputs for a task's classes at its start.
        memory_format: order in which convolutions compute: PyTorch's ``contiguous``, ``channels_last``, or ``auto``,
            the faster of both for the device and the precision of a trainer, see ``set_memory_format``.
        compile: mode in which ``torch.compile`` makes few kernels of backbone and head for a fit: ``default``,
            ``reduce-overhead`` (CUDA graphs) or ``max-autotune``; or a dict of its arguments.
        task_aware: whether to report also the accuracy with the task known: scores restricted to the
            classes of the sample's task (task-IL), under names that end in ``task_aware``.
        future_tasks: whether tasks not learnt yet are evaluated too, for forward transfer.
        head: logits as ``linear`` functions of the features; as scaled cosines between features and class vectors
            (``cosine``), see ``CosineHead``; or from a linear layer for each task (``per_task``), in training and in
            evaluation, where the task of each sample is known: its scores are of its task's classes alone. For tasks
            of different classes.
        head_scale: factor of the cosines, above 0; 10 if None. For ``head: cosine`` only.

    Attributes:
        tasks_seen: number of tasks whose training has started.
        seen_classes: ``(K,)`` bool, classes of the tasks so far.
        current_classes: ``(K,)`` bool, classes of the present task.

    Raises:
        ConfigurationError: a value out of range, values that contradict each other, or a backbone without
            ``feature_dim``.
        TypeError: an argument that the class does not have.
    """

    # Scenarios and boundaries of ``data`` that a method can learn from; set-up refuses others.
    scenarios: ClassVar[tuple[str, ...]] = ("class", "domain", "instance", "blurry", "none", "given")
    boundaries: ClassVar[tuple[str, ...]] = ("known",)
    # Values of ``head`` that it can learn with; ``per_task`` needs a loss by ``restrict_to_trained`` or
    # ``cross_entropy``.
    heads: ClassVar[tuple[str, ...]] = ("linear", "cosine")
    # Whether a method keeps past samples of its own.
    rehearses: ClassVar[bool] = False
    # Whether a training batch also has its samples as evaluation sees them, batch.plain; any module may have it.
    two_views: ClassVar[bool] = False
    # Whether images come in PyTorch's ``channels_last`` format; any module may have it.
    takes_channels_last: bool = False
    # Whether the loss weighs rows by batch.weights, over batch.normalizer; any module may have this attribute.
    weighs_rows: ClassVar[bool] = True
    # Whether a step goes back through one forward pass several times.
    keeps_graph: ClassVar[bool] = False
    # What a method does that takes all weights or gradients on each worker, as a predicate of "the agent"; see
    # ``strategies``.
    needs_whole_weights: ClassVar[str] = ""
    # Rate of SGD if none is given.
    sgd_lr: ClassVar[float] = 0.05
    # Of an agent of this package: its name on the command line, and the papers to cite by their keys in
    # report/references.bib.
    short_name: ClassVar[str]
    papers: ClassVar[tuple[str, ...]]

    num_classes: int
    head: LinearHead
    seen_classes: Tensor
    current_classes: Tensor
    task_of_class: Tensor

    def __init__(
        self,
        backbone: Network,
        num_classes: int | None = None,
        input_spec: InputSpec | None = None,
        epochs_per_task: int | list[int] = 1,
        lr: float | None = None,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        decay_biases_and_norms: bool = True,
        milestones: Sequence[int] = (),
        gamma: float | list[float] = 0.1,
        warmup_epochs: float = 0.0,
        scale_lr: ScaleLR = "none",
        optimizer: OptimizerCallable | None = None,
        lr_scheduler: LRSchedulerCallable | None = None,
        optimizer_reset: bool = True,
        reset_state_dict: bool = False,
        train_classes: Literal["all", "seen"] = "all",
        memory_format: MemoryFormat = "auto",
        compile: Compile = False,
        task_aware: bool = False,
        future_tasks: bool = False,
        head: Literal["linear", "cosine", "per_task"] = "linear",
        head_scale: float | None = None,
    ) -> None:
        super().__init__()
        self._keep_hyperparameters()
        for kind in type(self).__mro__:
            if issubclass(kind, ContinualAgent):
                check_words("model", get_type_hints(kind.__init__), self.hparams)
        gammas = [gamma] if isinstance(gamma, (int, float)) else list(gamma)
        if isinstance(optimizer, Optimizer):
            raise ConfigurationError(
                f"model.optimizer is a {type(optimizer).__name__} of weights that it has already: give its class, or "
                f"functools.partial({type(optimizer).__name__}, ...), from which the agent makes it"
            )
        own_lr = rate_of(optimizer)
        if lr is not None and own_lr not in (None, lr):
            raise ConfigurationError(
                f"model.lr={lr} and model.optimizer.lr={own_lr} contradict each other: give one of them"
            )
        if lr is None:
            lr = self.sgd_lr if optimizer is None else own_lr
        if isinstance(lr, (int, float)):
            check_number("model.lr", lr, above=0)
            self.hparams["lr"] = lr
        check_number("model.momentum", momentum, at_least=0, below=1)
        check_number("model.weight_decay", weight_decay, at_least=0)
        check_number("model.warmup_epochs", warmup_epochs, at_least=0)
        for factor in gammas:
            check_number("model.gamma", factor, above=0)
        if not isinstance(gamma, (int, float)) and len(gammas) != len(milestones):
            raise ConfigurationError(
                f"model.gamma={gammas}: give one number, or one for each of {len(milestones)} milestones"
            )
        if optimizer is not None and (momentum or weight_decay):
            given = {"momentum": momentum, "weight_decay": weight_decay}
            words = " and ".join(f"model.{key}={value}" for key, value in given.items() if value)
            raise ConfigurationError(
                f"{words}: model.optimizer brings its own; leave that out, and give such values to the optimizer"
            )
        if lr_scheduler is not None and (milestones or warmup_epochs):
            raise ConfigurationError(
                "model.lr_scheduler with model.milestones or model.warmup_epochs: both set the rate; give one of them"
            )
        if head_scale is not None:
            check_number("model.head_scale", head_scale, above=0)
            if head != "cosine":
                raise ConfigurationError(
                    f"model.head_scale={head_scale} scales cosines: give model.head=cosine, or leave head_scale out"
                )
        if head not in self.heads:
            raise ConfigurationError(
                f"model.head={head}: agent {type(self).__name__} learns with {', '.join(self.heads)} only, by its "
                "attribute heads"
            )
        for key, value in (("task_aware", task_aware), ("train_classes", train_classes == "seen" and train_classes)):
            if head == "per_task" and value:
                raise ConfigurationError(
                    f"model.{key}={value} adds nothing to model.head=per_task, by which only classes of a sample's own "
                    f"task are scored: leave {key} out"
                )
        self.backbone = network_of(backbone)
        self.lr, self.momentum, self.weight_decay = lr, momentum, weight_decay
        self.decay_biases_and_norms = decay_biases_and_norms
        self.milestones, self.gamma, self.warmup_epochs = list(milestones), gamma, warmup_epochs
        self.scale_lr: ScaleLR = scale_lr
        self.optimizer_factory, self.lr_scheduler_factory = optimizer, lr_scheduler
        self.reset_state_dict = reset_state_dict
        self.train_classes = train_classes
        self.memory_format: MemoryFormat = memory_format
        self._compile = compile_arguments(compile)
        self._head_scale = (head_scale or _HEAD_SCALE) if head == "cosine" else None
        if "head_scale" in self.hparams:  # else a subclass has left it out
            self.hparams["head_scale"] = self._head_scale
        self._per_task = head == "per_task"
        self.clock = TaskClock(epochs_per_task, optimizer_reset, task_aware, future_tasks)
        self.report = TaskReport()
        self.progress = StreamProgress()
        self.inference = Inference()
        self.loss_guard = LossGuard()
        self.resumable_checkpoints = ResumableCheckpoints()
        self.tasks_seen = 0
        self._step_log = _StepLog()
        self._initial: dict[str, Tensor] | None = None
        self._evaluation_counts: EvaluationCounts | None = None
        self._build_if_known(num_classes, input_spec)

    @classmethod
    def method(cls) -> str:
        """Return the name of the class that implements the method; those in ``short_names`` change defaults only."""
        return next(kind.__name__ for kind in cls.__mro__ if kind.__module__ != "dcl_lightning.agents.short_names")

    @property
    def results(self) -> StreamResults:
        """The accuracy matrix and all else that evaluation has found in the last fit; owned by the task clock."""
        return self.clock.results

    # -- what a method defines ---------------------------------------------------------------------

    def training_loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the worker's loss of one batch, and the logits ``(B, K)`` that it came from, of its last B rows."""
        raise NotImplementedError(f"{type(self).__name__} must define training_loss(batch)")

    def build(self) -> None:
        """Make the head, and in a subclass what else depends on ``self.backbone``, ``self.head`` or ``num_classes``.

        Called once, within this class's constructor if it knows the sizes, else when the trainer knows them. An
        override calls it first.
        """
        assert self._feature_dim is not None
        if self._head_scale is None:
            self.head = LinearHead(self._feature_dim, self.num_classes)
        else:
            self.head = CosineHead(self._feature_dim, self.num_classes, self._head_scale)
        if self._per_task:
            self.register_buffer("task_of_class", torch.full((self.num_classes,), -1))
        self.register_buffer("seen_classes", torch.zeros(self.num_classes, dtype=torch.bool))
        self.register_buffer("current_classes", torch.zeros(self.num_classes, dtype=torch.bool))

    def evaluate(self, batch: Batch) -> Tensor:
        """Return scores ``(B, K)``, highest for the predicted class; here the head's."""
        return self._of_tasks(self.mask_unseen(self(batch.inputs)), batch.task_ids)

    def on_task_start(self, task: Task) -> None:
        """Note the task's classes; with ``reset_state_dict`` go back to the initial weights.

        Task 0 begins a new stream: what was learnt stays in the weights alone.
        """
        if task.index == 0:
            self.seen_classes.zero_()
        self.current_classes.zero_()
        self.current_classes[list(task.classes)] = True
        self.seen_classes |= self.current_classes
        if self.reset_state_dict and task.index and self._initial is not None:
            with torch.no_grad():
                for name, tensor in self._network_state().items():
                    tensor.copy_(self._initial[name])

    def on_task_end(self, task: Task) -> None:
        """Hook called at the end of each task; does nothing by default."""

    def before_evaluation(self) -> None:
        """Hook called on every worker before each evaluation within a fit; does nothing by default."""

    # -- helpers for subclasses ---------------------------------------------------------------------

    @property
    def comm(self) -> Comm:
        """The collectives of the trainer's strategy."""
        return comm_of(self.trainer.strategy)

    def features(self, inputs: Tensor) -> Tensor:
        """Return ``(B, feature_dim)`` features."""
        return self.backbone(inputs)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return logits ``(B, K)``."""
        return self.head(self.backbone(inputs))

    def trained_columns(self) -> Tensor | None:
        """Return the mask of the outputs that are trained ``(K,)`` bool, or None for all."""
        # LearningRateFinder trains before any class was seen.
        return self.seen_classes if self.train_classes == "seen" and self.clock.has_started else None

    def restrict_to_trained(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return the columns of the logits that are trained, and the targets as places among them.

        With ``head: per_task`` the logits of other tasks' classes than a row's own are -inf.
        """
        if self._per_task:
            logits = self._of_tasks(logits, self.task_of_class[targets])
        columns = self.trained_columns()
        if columns is None:
            return logits, targets
        return logits[:, columns], (columns.cumsum(0) - 1)[targets]

    def cross_entropy(self, logits: Tensor, batch: Batch, part: slice = _ALL) -> Tensor:
        """Return the weighted cross entropy of a part of a batch's rows, 0-dim, over the samples of all workers."""
        trained, targets = self.restrict_to_trained(logits[part], batch.targets[part])
        return weighted_cross_entropy(trained, targets, batch.weights[part], batch.normalizer)

    def mask_unseen(self, scores: Tensor) -> Tensor:
        """Return scores with -inf for classes not seen yet; unchanged before the first task."""
        # Without a branch on a tensor's value, for which the host would wait for the device.
        return scores.masked_fill(~self.seen_classes & self.seen_classes.any(), -float("inf"))

    def _of_tasks(self, scores: Tensor, tasks: Tensor) -> Tensor:
        """Return scores ``(B, K)`` with -inf for classes of other tasks than each row's ``(B,)``, if ``per_task``."""
        return scores.masked_fill(self.task_of_class != tasks[:, None], -float("inf")) if self._per_task else scores

    def training_outputs(self, ids: Tensor, outputs: Callable[[Tensor], Tensor], width: int) -> tuple[Tensor, Tensor]:
        """Evaluate training samples over all workers; every worker calls it and gets the same.

        Args:
            ids: sample ids ``(n,)`` int64, the same on all workers.
            outputs: returns ``(B, width)`` of inputs ``(B, ...)``.
            width: columns of the outputs.

        Returns:
            The ids, ascending, and the outputs ``(n, width)`` float64 in their order, on the host.
        """
        found, rows = [torch.empty(0, dtype=torch.int64)], [torch.empty(0, width, dtype=torch.float64)]
        for batch in evaluation_batches(self, datamodule_of(self.trainer).train_eval_loader(ids)):
            rows.append(outputs(batch.inputs).double().cpu())
            found.append(batch.sample_ids.cpu())
        gathered, values = (torch.cat(self.comm.allgather(torch.cat(parts))) for parts in (found, rows))
        order = gathered.argsort()
        return gathered[order], values[order]

    # -- set-up ------------------------------------------------------------------------------------

    def _build_if_known(self, num_classes: int | None, input_spec: InputSpec | Sequence[int] | None) -> None:
        """Make the network as soon as its sizes are known."""
        name, backbone = type(self.backbone).__name__, self.backbone
        if isinstance(backbone, Backbone) and input_spec is not None:
            backbone.adapt(InputSpec(*input_spec))
        known = self._feature_dim is not None
        if not known and not isinstance(backbone, Backbone):
            raise ConfigurationError(f"backbone {name} has no feature_dim: set it to the length of its features")
        if known and num_classes is not None:
            self.num_classes = num_classes
            sizes = {"num_classes": num_classes, "input_spec": None if input_spec is None else list(input_spec)}
            # A subclass may have left them out.
            kept = {key: size for key, size in sizes.items() if key in self.hparams}
            self.save_hyperparameters(kept, logger=self._log_hyperparams)
            self.build()

    @property
    def _feature_dim(self) -> int | None:
        found = getattr(self.backbone, "feature_dim", None)
        return found if isinstance(found, int) else None

    @property
    def is_built(self) -> bool:
        """Whether the sizes are known and the network is made."""
        return hasattr(self, "head")

    def setup(self, stage: str) -> None:
        """Refuse a stream that the method cannot learn from, and warn of one that makes its memory pointless.

        Raises:
            ConfigurationError: the data module's scenario is not among ``scenarios``, or its boundaries are not among
                ``boundaries`` or contradict a value of this agent.
        """
        data = datamodule_of(self.trainer)
        if stage == "fit":  # else a checkpoint may bring the sizes
            self._refuse_unknown_sizes()
        # Lightning does so only after it has loaded a checkpoint, whose double precision would be lost.
        self.trainer.precision_plugin.convert_module(self)
        device = self.trainer.strategy.root_device
        refuse_strategy(self, self.trainer, dict(self.hparams))
        if self.is_built:
            wanted: MemoryFormat = self.memory_format
            if isinstance(self.trainer.strategy, FSDP2Strategy) and device.type != "cpu":
                wanted = "contiguous"  # as weights have to be there
            precision = str(self.trainer.precision)
            self.takes_channels_last = set_memory_format(self, wanted, device, precision)
        if stage == "fit" and self._compile is not None:
            parts = self.backbone, self.head
            compile_networks(self, parts, self._compile, device.type == "cpu", self.keeps_graph)
        if stage != "fit":
            if not self.inference.labels:
                self.inference.note(data)
            return
        self._step_log.start(self.trainer)
        refuse_tuning(self.trainer, self.scale_lr)
        if self.milestones or self.warmup_epochs:
            refuse_changing_accumulation(self.trainer)
        # Lightning does not check it.
        check_number("trainer.accumulate_grad_batches", self.trainer.accumulate_grad_batches, at_least=1)
        if isinstance(data, ContinualDataModule):
            self._refuse_stream(data)
            if self._per_task:
                self._note_tasks(data)

    def configure_model(self) -> None:
        """With ``trainer.strategy=fsdp2`` leave each worker its part of the weights."""
        trainer = trainer_of(self)  # None in load_from_checkpoint
        if trainer is not None and isinstance(trainer.strategy, FSDP2Strategy):
            trainer.strategy.shard(self)

    def _refuse_stream(self, data: ContinualDataModule) -> None:
        name = type(self).__name__
        self._refuse_other_labels(data.original_labels)
        if data.scenario not in self.scenarios:
            raise ConfigurationError(
                f"data.scenario={data.scenario}: agent {name} learns in scenario {', '.join(self.scenarios)} only"
            )
        if data.boundaries == "hidden":
            self._refuse_hidden_boundaries(name)
        if self.rehearses and data.concatenate_tasksets:
            rank_zero_warn(
                f"data.concatenate_tasksets=true trains on the data of all tasks so far, to which the memory of {name} "
                "adds nothing: use --model base for the transfer and scratch baselines"
            )

    def _note_tasks(self, data: ContinualDataModule) -> None:
        if data.stream.classes_come_again:
            raise ConfigurationError(
                f"model.head=per_task knows a class's task, but with data.scenario={data.scenario} a class comes in "
                "several: give data.scenario=class, or model.head=linear"
            )
        for task, classes in enumerate(data.stream.homes):
            self.task_of_class[classes] = task

    def _refuse_unknown_sizes(self) -> None:
        if not self.is_built:
            raise ConfigurationError(
                f"{type(self).__name__} does not know its classes and inputs: give the trainer a ContinualDataModule, "
                "or the agent num_classes and input_spec"
            )

    def _refuse_other_labels(self, labels: list[int | str]) -> None:
        learnt = self.inference.labels
        if len(labels) > self.num_classes:
            raise ConfigurationError(
                f"the data have {len(labels)} classes, agent {type(self).__name__} has num_classes={self.num_classes}: "
                "give it data.num_classes"
            )
        if any(a != b for a, b in zip(labels, learnt, strict=False)):
            raise ConfigurationError(
                f"the agent's outputs have learnt the labels {_shortened(learnt)}, these data have "
                f"{_shortened(labels)} in their place: go on with the same labels in the same data.class_order, or "
                "give all of them to one data module"
            )

    def _refuse_hidden_boundaries(self, name: str) -> None:
        if "hidden" not in self.boundaries:
            raise ConfigurationError(
                f"data.boundaries=hidden: agent {name} works at the ends of tasks: give data.boundaries=known"
            )
        for key, value, neutral in (
            ("milestones", self.milestones, []),
            ("warmup_epochs", self.warmup_epochs, 0),
            ("reset_state_dict", self.reset_state_dict, False),
            ("train_classes", self.train_classes, "all"),
            ("head", "per_task" if self._per_task else "linear", "linear"),
        ):
            if value != neutral:
                raise ConfigurationError(
                    f"model.{key}={value} goes by tasks, of which nothing may know with data.boundaries=hidden: give "
                    f"model.{key}={str(neutral).lower()}, or data.boundaries=known"
                )

    def configure_callbacks(self) -> list[pl.Callback]:
        """Build the network, and return the agent's callbacks that the trainer lacks.

        This is the first hook that sees the data module; callbacks such as ``WeightAveraging`` copy the network later,
        in their set-up.
        """
        trainer, data = self.trainer, datamodule_of(self.trainer)
        if not self.is_built:
            num_classes, input_spec = self.hparams.get("num_classes"), self.hparams.get("input_spec")
            if isinstance(data, ContinualDataModule):
                num_classes, input_spec = num_classes or data.num_classes, input_spec or data.input_spec
            self._build_if_known(num_classes, input_spec)
        if isinstance(data, ContinualDataModule):
            own = self.backbone.own_inputs(data.input_spec) if isinstance(self.backbone, Backbone) else None
            data.fit_inputs_to(own)
        _clean_up(trainer)

        def wrapper(on_exception: Callable[[BaseException], None]) -> Callable[[BaseException], None]:
            def hook(exception: BaseException) -> None:
                on_exception(exception)
                _clean_up(trainer)  # after the callbacks' own hooks, which may save

            return hook

        _CLEANUPS[trainer] = [wrap_hook(trainer.strategy, "on_exception", wrapper)]
        kinds = {
            "clock": TaskClock, "report": TaskReport, "progress": StreamProgress, "loss_guard": LossGuard,
            "resumable_checkpoints": ResumableCheckpoints,
        }  # fmt: skip
        return [callback for name, kind in kinds.items() for callback in self.adopt(kind, name)]

    def adopt(self, kind: type[pl.Callback], name: str) -> list[pl.Callback]:
        """Return this agent's own callback of a kind; if the trainer has one, nothing, and keep that as ``self.name``.

        Args:
            kind: class of the callback, of which the trainer may have a subclass.
            name: attribute of this agent.

        Raises:
            ConfigurationError: the trainer has several.
        """
        present = [c for c in callbacks_of(self.trainer) if isinstance(c, kind)]
        if len(present) > 1:
            names = ", ".join(type(c).__name__ for c in present)
            raise ConfigurationError(f"trainer.callbacks has {names}: give one {kind.__name__}")
        if present:
            setattr(self, name, present[0])
            return []
        trainer, own = self.trainer, vars(self)[name]
        _CLEANUPS[trainer].append(lambda: set_callbacks(trainer, [c for c in callbacks_of(trainer) if c is not own]))
        return [own]

    def teardown(self, stage: str) -> None:
        """Take this agent's callbacks from the trainer, which another module may use next."""
        _clean_up(self.trainer)

    # -- training ----------------------------------------------------------------------------------

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return the optimizer, and a schedule that is counted from the start of each task if the rate changes."""
        workers = self.trainer.world_size
        parameters = parameter_groups(self.named_parameters(), self.decay_biases_and_norms)
        if self.optimizer_factory is None:
            assert self.lr is not None
            optimizer: Optimizer = torch.optim.SGD(parameters, self.lr, self.momentum, weight_decay=self.weight_decay)
        else:
            optimizer = build_optimizer(self.optimizer_factory, parameters, self.lr)
        scale = lr_scale(self.scale_lr, workers)
        for group in optimizer.param_groups:
            group["lr"] *= scale
        if self.scale_lr != "none":
            rate = optimizer.param_groups[0]["lr"]
            factor = f"{scale:g} (scale_lr={self.scale_lr}, {workers} workers)"
            rank_zero_info(f"learning rate {rate:g}: {rate / scale:g} x {factor}")
        if self.train_classes == "seen":
            KeepUnseenRows(self).attach(optimizer)
        if self.lr_scheduler_factory is not None:
            return {"optimizer": optimizer, "lr_scheduler": epoch_schedule(self.lr_scheduler_factory(optimizer))}
        if not self.milestones and not self.warmup_epochs:
            return {"optimizer": optimizer}
        schedule = LambdaLR(optimizer, self._factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _factor(self, step: int) -> float:
        batches = self.trainer.num_training_batches
        steps = 1 if math.isinf(batches) else max(1, math.ceil(batches / self.trainer.accumulate_grad_batches))
        # During warm-up a step's rate is that of the progress after it, so that it is never 0.
        epoch, within = divmod(step, steps)
        progress = epoch + (within + 1) / steps if step < self.warmup_epochs * steps else step / steps
        start = warmup_divisor(self.scale_lr, self.trainer.world_size)
        return lr_factor(progress, self.milestones, self.gamma, self.warmup_epochs, start)

    def on_fit_start(self) -> None:
        """Keep the initial weights if tasks start from them."""
        constant = sum(len(list(part.modules())) for part in self.modules() if isinstance(part, Teacher))
        if isinstance(self.backbone, Backbone):
            constant += len(self.backbone.constant_parts)
        if constant:  # Lightning warns of modules in evaluation mode: of others than these it still does
            warnings.filterwarnings("ignore", message=rf"Found {constant} module\(s\) in eval mode")
        if self.reset_state_dict and self._initial is None:
            # Weights of which workers have parts are worker 0's already.
            self._initial = {
                name: value.detach().clone() if is_parted(value) else self.comm.broadcast(value.detach().clone())
                for name, value in self._network_state().items()
            }

    def on_train_start(self) -> None:
        """Note the labels of the data that are learnt now, and how images become inputs."""
        self.inference.note(datamodule_of(self.trainer))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the loss; log it with the accuracy on the batch and the rate, at the steps that ``_StepLog`` names."""
        loss, logits = self.training_loss(batch)
        if self._step_log.is_due(self.trainer, batch_idx):
            rows = slice(len(batch.targets) - len(logits), None)
            real = batch.weights[rows] > 0
            hits = top_k_hits(self._of_tasks(logits.detach(), batch.task_ids[rows]), batch.targets[rows], 1) & real
            values = {"train/loss": loss.detach(), "train/acc": hits.sum() / real.sum().clamp(min=1)}
            self.log_dict(values, prog_bar=self._step_log.is_shown, batch_size=len(batch.targets))
            # A tensor of the host: a number would be copied to the device, and the host would wait for it.
            rate = float(self.trainer.optimizers[0].param_groups[0]["lr"])
            self.log("train/lr", torch.tensor(rate, dtype=torch.float32, device="cpu"), batch_size=1)
        return loss

    # -- evaluation and prediction -----------------------------------------------------------------

    def on_validation_start(self) -> None:
        """Refuse an agent whose network is not built; warn of random weights; get ready to evaluate."""
        self._refuse_unknown_sizes()
        if self.trainer.state.fn != TrainerFn.FITTING and not self.tasks_seen and not bool(self.seen_classes.any()):
            rank_zero_warn(
                f"{type(self).__name__} was trained on no task and loaded from no checkpoint, its weights are random: "
                "give --ckpt_path"
            )
        if self.trainer.state.fn == TrainerFn.FITTING:
            self.before_evaluation()
        hold_whole(self)

    on_test_start = on_predict_start = on_validation_start

    def on_validation_epoch_start(self) -> None:
        """Start new counts; without a data module all loaders are of one task."""
        data = datamodule_of(self.trainer)
        tested = data.stream.homes if isinstance(data, ContinualDataModule) else [()]
        aware = tested if isinstance(data, ContinualDataModule) and self.clock.task_aware else None
        self._evaluation_counts = EvaluationCounts(len(tested), self.num_classes, aware)

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Count hits and losses of one batch of one task."""
        if len(batch.targets):
            losses = F.cross_entropy(self._of_tasks(self(batch.inputs), batch.task_ids), batch.targets, reduction="sum")
            assert self._evaluation_counts is not None
            self._evaluation_counts.add(dataloader_idx, self.evaluate(batch), batch.targets, losses)

    def on_validation_epoch_end(self) -> None:
        """Log accuracy and loss over all tasks seen and for each, over all workers."""
        release_whole(self)
        self._log_counts("val")

    on_test_epoch_start = on_validation_epoch_start
    test_step = validation_step

    def on_test_epoch_end(self) -> None:
        """Log accuracy and loss over all tasks and for each, over all workers."""
        release_whole(self)
        self._log_counts("test")

    def on_predict_epoch_end(self) -> None:
        """End what evaluation began."""
        release_whole(self)

    def _log_counts(self, prefix: str) -> None:
        assert self._evaluation_counts is not None
        self._evaluation_counts.add_up(self.comm.allreduce)
        for name, value in self._evaluation_counts.values().items():
            self.log(f"{prefix}/{name}", torch.tensor(value, dtype=torch.float32), prog_bar=name == "acc")

    def predict_step(
        self, batch: Batch | Tensor | Sequence[Tensor], batch_idx: int, dataloader_idx: int = 0
    ) -> Prediction:
        """Return original labels and probabilities of a batch of the data module's, or of any loader's inputs.

        Raises:
            ConfigurationError: the head is ``per_task``, and the batch does not say of which task a sample is.
        """
        if self._per_task and not isinstance(batch, Batch):
            raise ConfigurationError(
                "model.head=per_task needs the task of each sample: predict with a ContinualDataModule"
            )
        samples = self.inference.batch(batch)
        # A worker without rows gets a batch without rows, which not every backbone can take.
        empty = torch.zeros(0, self.num_classes, device=samples.inputs.device)
        return self.inference.prediction(self.evaluate(samples) if len(samples.targets) else empty, samples)

    # -- checkpoint --------------------------------------------------------------------------------

    def _keep_hyperparameters(self) -> None:
        """Keep the arguments as numbers, strings, lists and dicts: a checkpoint holds nothing to execute.

        A backbone that was given as a module is left out: ``load_from_checkpoint(path, backbone=...)``.
        """
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the module, which is left out
            self.save_hyperparameters(logger=False)
        kept = {n: v for n, v in self.hparams.items() if not callable(v) and n not in self.fixed_arguments}
        self.hparams.clear()
        self.save_hyperparameters({name: _plain(value) for name, value in kept.items()})

    def _network_state(self) -> dict[str, Tensor]:
        state = {f"backbone.{k}": v for k, v in self.backbone.state_dict().items()}
        return state | {f"head.{k}": v for k, v in self.head.state_dict().items()}

    def on_save_checkpoint(self, checkpoint: StateDict) -> None:
        """Add what prediction needs, and the initial weights if tasks start from them."""
        checkpoint["inference"] = self.inference.state_dict()
        checkpoint["lr_scale"] = lr_scale(self.scale_lr, self.trainer.world_size)
        checkpoint["tasks_seen"] = self.tasks_seen
        if self._initial is not None:
            checkpoint["initial_weights"] = self._initial

    def on_load_checkpoint(self, checkpoint: StateDict) -> None:
        """Refuse the checkpoint of another run; take over the initial weights and what prediction needs."""
        # Through a trainer they are whole by now, or this worker's parts.
        if any(isinstance(value, Tensor) and value.is_meta for value in checkpoint["state_dict"].values()):
            raise CheckpointError(
                "the checkpoint's weights are in parts, in the folder beside it: load it through a trainer, as by "
                "trainer.validate(agent, data, ckpt_path=...), or save it with "
                "FSDP2Strategy(save_distributed_checkpoint=False)"
            )
        if not self.is_built:
            saved = checkpoint.get("hyper_parameters", {})
            self._build_if_known(saved.get("num_classes"), saved.get("input_spec"))
        refuse_another_run(self, checkpoint)
        trainer = trainer_of(self)
        if trainer is not None and trainer.state.fn == TrainerFn.FITTING and "lr_scale" in checkpoint:
            factor = lr_scale(self.scale_lr, trainer.world_size) / checkpoint["lr_scale"]
            if factor != 1:  # now on another number of workers
                scale_rates(checkpoint, self.clock.state_key, factor)
        self._initial = checkpoint.get("initial_weights")
        self.tasks_seen = checkpoint.get("tasks_seen", 0)
        if "inference" in checkpoint:
            self.inference.load_state_dict(checkpoint["inference"])


class _StepLog:
    """Decides whether a step's loss and accuracy are computed and logged.

    Logging two values takes a good part of a small network's step. They are logged at each step where a progress bar
    shows them, a callback monitors a value of training, or a foreign callback acts after each batch and may read them;
    else at the steps that loggers write, the first and the last of an epoch, and the last of the fit.
    """

    def __init__(self) -> None:
        # As set-up found it: ``LearningRateFinder`` puts the bar away for a while, and Lightning asks for one value.
        self.is_shown = False
        self._each_step = True
        self._epoch: tuple[int, int] | None = None  # a trainer's, for which ``_each_step`` holds

    def start(self, trainer: pl.Trainer) -> None:
        """Look for a progress bar: only for one are values logged as for a bar, which makes the host wait each time."""
        self.is_shown = has_progress_bar(trainer)

    def is_due(self, trainer: pl.Trainer, batch_idx: int) -> bool:
        """Return whether the present step's values are logged."""
        epoch = id(trainer), trainer.current_epoch
        if batch_idx == 0 or self._epoch != epoch:  # also resumed within an epoch
            self._epoch = epoch
            self._each_step = self.is_shown or dev_run_batches(trainer) > 0 or any(map(_reads, callbacks_of(trainer)))
            return True
        return (
            self._each_step
            or trainer.is_last_batch
            # Counts batches that stepped, as loggers do; ``global_step`` counts each optimizer's steps.
            or loggers_write(trainer)
            or 0 < trainer.max_steps == trainer.global_step + 1
        )


def _reads(callback: pl.Callback) -> bool:
    monitored = monitored_by(callback).startswith("train/")
    known = type(callback).__module__.partition(".")[0] in ("lightning", "pytorch_lightning", "dcl_lightning")
    return monitored or (not known and type(callback).on_train_batch_end is not pl.Callback.on_train_batch_end)


def _clean_up(trainer: pl.Trainer) -> None:
    for undo in reversed(_CLEANUPS.pop(trainer, [])):
        undo()


def _shortened(labels: Sequence[int | str]) -> str:
    return str(labels if len(labels) <= 10 else [*labels[:10], "..."])


def _plain(value: object) -> object:
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value

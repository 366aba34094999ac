"""Names and behaviour of Lightning and torch that the distributed part relies on, so that a change shows."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from importlib.metadata import version
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.plugins import ClusterEnvironment, TorchCheckpointIO
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.loops.fit_loop import _FitLoop
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.plugins import AsyncCheckpointIO, LayerSync
from lightning.pytorch.strategies import ParallelStrategy
from lightning.pytorch.trainer.connectors.accelerator_connector import _AcceleratorConnector
from lightning.pytorch.trainer.connectors.logger_connector import _LoggerConnector
from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector

import dcl_lightning
from dcl_lightning import HorovodStrategy, _lightning
from dcl_lightning.distributed.horovod.environment import HorovodEnvironment

LIGHTNING = Path(pl.__file__).parent
PACKAGE = Path(dcl_lightning.__file__).parent
RELEASE = f"lightning {version('lightning')}"

IMPORTS = sorted(
    {
        (node.module, alias.name)
        for file in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in ("lightning", "torch")
        for alias in node.names
    }
)

# Everything of a strategy that Lightning 2.6.6 uses outside its strategies. New names are for us to consider.
KNOWN = """
    _configure_launcher _layer_sync _lightning_module _lightning_optimizers accelerator all_gather backward barrier
    batch_to_device block_backward_sync broadcast checkpoint_io cluster_environment connect distributed_sampler_kwargs
    global_rank handles_gradient_accumulation is_distributed is_global_zero launcher lightning_module
    lightning_module_state_dict lightning_restore_optimizer load_checkpoint load_model_state_dict
    load_optimizer_state_dict local_rank lower lr_scheduler_configs model model_sharded_context num_nodes num_processes
    on_exception on_predict_end on_predict_start on_test_end on_test_start on_train_batch_start on_train_end
    on_train_start on_validation_end on_validation_start optimizer_state optimizer_step optimizers parallel_devices
    post_training_step precision_plugin predict_step process_dataloader reduce reduce_boolean_decision
    remove_checkpoint restore_checkpoint_after_setup root_device save_checkpoint set_world_ranks setup
    setup_environment setup_optimizers teardown tensor_init_context test_step training_step validation_step
    world_size zero_stage_3 __class__
"""

# What we override, set or call, and where Lightning has to have it.
STRATEGY = """
    _configure_launcher setup_environment setup setup_optimizers setup_precision_plugin
    model_to_device on_exception teardown block_backward_sync barrier broadcast reduce all_gather
    reduce_boolean_decision on_train_start on_train_batch_start on_train_end on_validation_start pre_backward
    process_dataloader handles_gradient_accumulation optimizers accelerator precision_plugin lightning_module model
    launcher global_rank local_rank node_rank world_size is_global_zero distributed_sampler_kwargs
"""
ENVIRONMENT = """
    creates_processes_externally main_address main_port detect world_size set_world_size
    global_rank set_global_rank local_rank node_rank validate_settings teardown
"""
MEMBERS = {
    ParallelStrategy: STRATEGY.split(),
    ClusterEnvironment: ENVIRONMENT.split(),
    LayerSync: ["apply", "revert"],
    SLURMEnvironment: ["detect", "job_name", "validate_settings", "_validate_srun_used", "_validate_srun_variables"],
    _AcceleratorConnector: ["_choose_and_init_cluster_environment"],
    _SignalConnector: ["register_signal_handlers", "_has_already_handler", "_slurm_sigusr_handler_fn"],
    ModelCheckpoint: ["on_exception", "format_checkpoint_name", "CHECKPOINT_NAME_LAST"],
    _TrainingEpochLoop: ["_on_before_fetch", "_on_after_fetch"],
    pl.Trainer: ["save_checkpoint", "early_stopping_callbacks", "checkpoint_callbacks", "num_training_batches"],
}

# What Lightning does by itself, and the strategy counts on; with words of its source that show it.
CALLS = {
    "the connector keeps our environment": (_AcceleratorConnector._lazy_init_strategy, "strategy.cluster_environment"),
    "the connector knows the strategy before the environment": (
        _AcceleratorConnector.__init__,
        r"self\._strategy_flag[\s\S]*self\.cluster_environment: \w+ = self\._choose_and_init_cluster_environment\(\)",
    ),
    "workers listen to the supervisor after callbacks act on signals": (
        _FitLoop.on_run_start,
        r'_call_callback_hooks\(trainer, "on_train_start"\)[\s\S]*_call_strategy_hook\(trainer, "on_train_start"\)',
    ),
    "the connector sets num_nodes": (_AcceleratorConnector._lazy_init_strategy, "self.strategy.num_nodes ="),
    "the connector hands sync_batchnorm over": (
        _AcceleratorConnector._lazy_init_strategy,
        "self.strategy._layer_sync =",
    ),
    "the connector sets the ranks": (_AcceleratorConnector._lazy_init_strategy, "self.strategy.set_world_ranks()"),
    "the connector asks for a launcher": (
        _AcceleratorConnector._lazy_init_strategy,
        "self.strategy._configure_launcher()",
    ),
    "the connector believes is_distributed": (
        _AcceleratorConnector.is_distributed.fget,
        "self.strategy.is_distributed",
    ),
    "the strategy joins before anything is set up": (
        pl.Trainer._run,
        r"self\.strategy\.setup_environment\(\)[\s\S]*_call_setup_hook[\s\S]*self\.strategy\.setup\(self\)",
    ),
    "signals are taken after the strategy's set-up": (
        pl.Trainer._run,
        r"self\.strategy\.setup\(self\)[\s\S]*register_signal_handlers",
    ),
    "SLURM requeues by the class of the environment": (
        _SignalConnector.register_signal_handlers,
        "isinstance(environment, SLURMEnvironment) and environment.auto_requeue",
    ),
    "the signal's environment is the connector's": (
        _SignalConnector.register_signal_handlers,
        "self.trainer._accelerator_connector.cluster_environment",
    ),
    "a step's values are written when the connector says so": (
        _LoggerConnector.should_update_logs.fget,
        "loop.epoch_loop._batches_that_stepped + 1",
    ),
    "the fetcher calls the loop before and after it waits": (
        _TrainingEpochLoop.on_run_start,
        r"_start_profiler = self\._on_before_fetch\s+\w+\._stop_profiler = self\._on_after_fetch",
    ),
    "pre_backward comes before backward": (ParallelStrategy.backward, "self.pre_backward(closure_loss)"),
}


@pytest.mark.parametrize(("module", "name"), IMPORTS)
def test_every_imported_name_is_there(module: str, name: str) -> None:
    found = importlib.import_module(module)
    assert hasattr(found, name) or importlib.util.find_spec(f"{module}.{name}"), (
        f"{RELEASE}, torch {torch.__version__}: {module} has no {name}, which dcl_lightning imports"
    )


@pytest.mark.parametrize(
    ("owner", "name"), [(owner, name) for owner, names in MEMBERS.items() for name in names], ids=str
)
def test_every_member_used_is_there(owner: type, name: str) -> None:
    assert hasattr(owner, name), f"{RELEASE}: {owner.__name__} has no {name}, which HorovodStrategy relies on"


@pytest.mark.parametrize("what", CALLS)
def test_lightning_still_does_what_the_strategy_counts_on(what: str) -> None:
    function, words = CALLS[what]
    source = inspect.getsource(function)
    assert words in source or re.search(words, source), f"{RELEASE}: it can no longer be seen that {what}: {words}"


@pytest.mark.parametrize("name", ["_layer_sync", "_launcher", "_lightning_module", "_model"])
def test_every_attribute_used_is_set_by_the_constructor(name: str) -> None:
    pytest.importorskip("horovod")
    strategy = HorovodStrategy()
    assert name in vars(strategy), f"{RELEASE}: a ParallelStrategy has no {name}, which HorovodStrategy relies on"


def test_a_name_that_lightning_newly_asks_of_a_strategy_is_considered() -> None:
    used: set[str] = set()
    for file in LIGHTNING.rglob("*.py"):
        if "strategies" not in file.relative_to(LIGHTNING).parts:
            text = file.read_text()
            used |= set(re.findall(r"\bstrategy\.([A-Za-z_]\w*)", text))
            used |= set(re.findall(r'_call_strategy_hook\(\s*(?:self\.)?trainer,\s*"(\w+)"', text))
    known = set(KNOWN.split())
    assert len(used) > 40, f"{RELEASE}: strategies are no longer called as strategy.name: this test sees nothing"
    assert not used - known, (
        f"{RELEASE} newly uses {sorted(used - known)} of a strategy: see whether the inherited ones do under Horovod"
    )


@pytest.mark.parametrize(
    ("own", "base"), [(HorovodStrategy, ParallelStrategy), (HorovodEnvironment, ClusterEnvironment)]
)
def test_overridden_methods_take_the_arguments_that_lightning_gives(own: type, base: type) -> None:
    assert not own.__abstractmethods__, f"{RELEASE}: {own.__name__} lacks {sorted(own.__abstractmethods__)}"
    for name, function in vars(own).items():
        theirs = getattr(base, name, None)
        if inspect.isfunction(function) and inspect.isfunction(theirs) and name != "__init__":
            wanted, given = (list(inspect.signature(f).parameters) for f in (theirs, function))
            assert given[: len(wanted)] == wanted, f"{RELEASE}: {base.__name__}.{name} takes {wanted}, ours {given}"


def test_the_engine_still_calls_back_at_the_end_of_a_backward_pass() -> None:
    called: list[bool] = []
    parameter = torch.nn.Parameter(torch.ones(2))
    engine = torch.autograd.Variable._execution_engine
    parameter.register_post_accumulate_grad_hook(
        lambda p: engine.queue_callback(lambda: called.append(parameter.grad is not None))
    )
    (parameter * 2).sum().backward()
    assert called == [True], f"torch {torch.__version__}: gradients cannot be waited for at the end of backward"


@pytest.fixture
def trainer(tmp_path: Path) -> pl.Trainer:
    return pl.Trainer(default_root_dir=tmp_path, accelerator="cpu", devices=1, logger=False, log_every_n_steps=7)


def test_attributes_of_a_trainer_are_read_and_set(trainer: pl.Trainer) -> None:
    callbacks = [pl.Callback()]
    _lightning.set_callbacks(trainer, callbacks)
    assert _lightning.callbacks_of(trainer) is trainer.callbacks is callbacks
    assert _lightning.datamodule_of(trainer) is None
    assert _lightning.log_interval(trainer) == 7
    assert isinstance(_lightning.cluster_environment_of(trainer), ClusterEnvironment)
    assert _lightning.trainer_of(pl.LightningModule()) is None
    assert _lightning.dev_run_batches(pl.Trainer(accelerator="cpu", devices=1, fast_dev_run=2)) == 2
    assert _lightning.dev_run_batches(trainer) == _lightning.overfit_batches(trainer) == 0
    by_time = pl.Trainer(accelerator="cpu", devices=1, val_check_interval="00:00:10:00")
    assert [_lightning.validates_by_time(t) for t in (trainer, by_time)] == [False, True]


def test_callbacks_that_average_weights_are_found(trainer: pl.Trainer) -> None:
    averaging = EMAWeightAveraging()
    _lightning.set_callbacks(trainer, [pl.Callback(), averaging])
    assert _lightning.averaging_callbacks(trainer) == [averaging]
    assert _lightning.average_model_of(averaging) is None


def test_data_is_reloaded_by_numbers_that_the_loops_have(trainer: pl.Trainer) -> None:
    loops = (trainer.fit_loop, trainer.fit_loop.epoch_loop.val_loop)
    names = ("_last_train_dl_reload_epoch", "_last_val_dl_reload_epoch")
    for loop, name in zip(loops, names, strict=True):
        assert name in vars(loop), f"{RELEASE}: {type(loop).__name__} has no {name}"
    _lightning.reload_training_data(trainer)
    _lightning.reload_validation_data(trainer)
    assert all(vars(loop)[name] == float("-inf") for loop, name in zip(loops, names, strict=True))


def test_saving_is_replaced_and_restored(trainer: pl.Trainer) -> None:
    saved: list[str] = []
    _lightning.replace_save(trainer, saved.append)
    trainer.save_checkpoint("a.ckpt")
    assert saved == ["a.ckpt"]
    for _ in range(2):
        _lightning.restore_save(trainer)
    assert trainer.save_checkpoint.__func__ is pl.Trainer.save_checkpoint


def test_a_plugin_within_another_is_found_and_replaced() -> None:
    inner, other = TorchCheckpointIO(), TorchCheckpointIO()
    outer = AsyncCheckpointIO(inner)
    assert _lightning.wrapped_io(outer) is inner
    assert _lightning.wrapped_io(inner) is None
    _lightning.set_wrapped_io(outer, other)
    assert _lightning.wrapped_io(outer) is other

"""The cases of ``test_combinations.py``, run on each of two workers: one process, ddp and Horovod in turn."""

from __future__ import annotations

import itertools
import os
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset, TensorDataset

from dcl_lightning import HorovodStrategy
from tests.distributed.toy import SAMPLES, Toy, samples, trainer


@dataclass(frozen=True)
class Case:
    """One fit in up to three ways.

    Args:
        name: what the test is called.
        make: makes the module from a seed.
        options: of the trainer; a function where they hold objects that belong to one trainer.
        horovod: options of the strategy.
        ddp: the ddp strategy whose weights must be bitwise the same; None: ddp cannot do it.
        one: largest difference from one process with the double batch; None: not comparable.
        scale: factor of learning rate and clipping under Horovod alone.
    """

    name: str
    make: Callable[[int], Toy]
    options: Callable[[], dict[str, Any]] | dict[str, Any] = field(default_factory=dict)
    horovod: dict[str, Any] = field(default_factory=dict)
    ddp: str | None = "ddp"
    one: float | None = 1e-6
    scale: float = 1.0


class AdamW(Toy):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.01, weight_decay=0.1)


class Plain(Toy):
    """Without momentum and decay: twice the gradient at half the rate is the same."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class LBFGS(Toy):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=3)


class Frozen(Toy):
    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.net[2].requires_grad_(False)


class Unfrozen(Toy):
    """Trains its first layer from the second epoch on."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.net[0].requires_grad_(False)

    def on_train_epoch_start(self) -> None:
        self.net[0].requires_grad_(self.current_epoch > 0)

    def on_after_backward(self) -> None:
        pass


class Grown(Toy):
    """Gets a head after the first epoch, another one on each worker until they are made equal; drops it again."""

    def on_train_epoch_start(self) -> None:
        if self.current_epoch == 1:
            torch.manual_seed(100 + self.global_rank)
            self.extra = nn.ModuleList([nn.Linear(5, 1)])
            self.trainer.optimizers[0].add_param_group({"params": list(self.extra.parameters())})
        if self.current_epoch == 2:
            self.extra = None

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        out = self.net(batch[0])
        if self.extra is not None:
            out = out + self.extra[0](batch[0])
        return nn.functional.mse_loss(out, batch[1])


class Heads(Toy):
    """A head for each worker and one for nobody; ``late`` leaves worker 0's out of every window's last step."""

    def __init__(self, seed: int, late: bool = False) -> None:
        super().__init__(seed)
        self.late = late
        self.heads = nn.ModuleList(nn.Linear(5, 1) for _ in range(3))

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        out = self.net(batch[0])
        if not (self.late and index % 2):
            out = out + self.heads[self.global_rank](batch[0])
        return nn.functional.mse_loss(out, batch[1])


class SharedHead(Toy):
    """A head that takes part in the first step of each window only, on all workers."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.head = nn.Linear(5, 1)

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        out = self.net(batch[0])
        if index % 2 == 0:
            out = out + self.head(batch[0])
        return nn.functional.mse_loss(out, batch[1])


class Manual(Toy):
    """Two optimizers in turn; ``window`` lets the first one step at every second batch only."""

    def __init__(self, seed: int, window: int = 1) -> None:
        super().__init__(seed)
        self.automatic_optimization = False
        self.window = window
        self.other = nn.Linear(1, 1)

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        optimizers: Any = self.optimizers()
        first, second = optimizers
        last = index % self.window == self.window - 1
        with first.toggle_model(sync_grad=last):
            self.manual_backward(nn.functional.mse_loss(self.net(batch[0]), batch[1]))
            if last:
                self.clip_gradients(first, 0.5, "norm")
                first.step()
                first.zero_grad()
        with second.toggle_model():
            self.manual_backward(nn.functional.l1_loss(self.other(self.net(batch[0])), batch[1]))
            second.step()
            second.zero_grad()

    def on_after_backward(self) -> None:
        pass

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [
            torch.optim.SGD(self.net.parameters(), lr=0.1, momentum=0.9),
            torch.optim.AdamW(self.other.parameters(), lr=0.01),
        ]


class Complex(Toy):
    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.turn = nn.Parameter(torch.randn(5, dtype=torch.complex64))

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        return nn.functional.mse_loss(self.net(torch.view_as_real(batch[0] * self.turn)[..., 1]), batch[1])


class Compiled(Toy):
    def configure_model(self) -> None:
        self.net.compile(backend="aot_eager")


class Overflowing(Toy):
    """One worker's gradient is infinite once: both leave the step out."""

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        loss = super().training_step(batch, index)
        assert loss is not None
        return loss * torch.inf if self.global_step == 2 and self.global_rank == self.trainer.world_size - 1 else loss

    def on_train_epoch_end(self) -> None:
        plugin = self.trainer.precision_plugin
        assert isinstance(plugin, MixedPrecision)
        assert plugin.scaler is not None
        self.flags = torch.tensor(plugin.scaler.get_scale())


class Images(Toy):
    """A convolution, with batch normalisation if asked for."""

    def __init__(self, seed: int, norm: bool = False, channels_last: bool = False) -> None:
        super().__init__(seed)
        norms = [nn.BatchNorm2d(4), nn.BatchNorm1d(16, affine=False, momentum=None)] if norm else [nn.Identity()] * 2
        self.net = nn.Sequential(
            nn.Conv2d(3, 4, 3, bias=False), norms[0], nn.Tanh(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), norms[1],
            nn.Linear(16, 1),
        )  # fmt: skip
        self.format = torch.channels_last if channels_last else torch.contiguous_format
        self.net.to(memory_format=self.format)

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor | None:
        return super().training_step((batch[0].to(memory_format=self.format), batch[1]), index)


def images() -> TensorDataset:
    x = torch.randn(SAMPLES, 3, 6, 6, generator=torch.Generator().manual_seed(4))
    return TensorDataset(x, x.mean((1, 2, 3))[:, None].sin())


def amp() -> dict[str, Any]:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)
    return {"plugins": [MixedPrecision("16-mixed", "cpu", scaler)]}


UNUSED = {"find_unused_parameters": True}
DDP_UNUSED = "ddp_find_unused_parameters_true"
WINDOWS = {"accumulate_grad_batches": 3}  # of the 4 steps of an epoch: 3 and 1
CLIP = {"gradient_clip_val": 0.5}


def single_cases() -> Iterator[Case]:
    yield Case("sgd_40_steps", Toy, {"max_epochs": 10})
    yield Case("adamw_windows_clip", AdamW, {**WINDOWS, **CLIP})
    yield Case("sgd_windows", Toy, WINDOWS)
    yield Case("clip_by_value", Toy, {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"})
    yield Case("lbfgs", LBFGS, one=1e-5)
    yield Case("two_optimizers", Manual, horovod=UNUSED, ddp=DDP_UNUSED)
    yield Case("two_optimizers_all_used", Manual, ddp=None)
    # ddp averages the first one's half-filled window at the second one's step: the same but for rounding.
    yield Case("two_optimizers_windows", lambda seed: Manual(seed, 2), ddp=None)
    yield Case("two_optimizers_windows_unused", lambda seed: Manual(seed, 2), horovod=UNUSED, ddp=None)
    yield Case("own_heads", Heads, horovod=UNUSED, ddp=DDP_UNUSED, one=None)
    yield Case("own_heads_windows", Heads, WINDOWS, UNUSED, DDP_UNUSED, None)
    late = {"accumulate_grad_batches": 2}
    yield Case("own_heads_late", lambda seed: Heads(seed, late=True), late, UNUSED, DDP_UNUSED, None)
    yield Case("head_late", SharedHead, late, ddp=None)
    yield Case("head_late_unused", SharedHead, late, UNUSED, DDP_UNUSED)
    yield Case("frozen", Frozen)
    yield Case("unfrozen_later", Unfrozen, ddp=None)
    yield Case("unfrozen_later_unused", Unfrozen, horovod=UNUSED, ddp=None)
    yield Case("grown_later", Grown, ddp=None)
    yield Case("grown_later_unused", Grown, horovod=UNUSED, ddp=None)
    yield Case("complex", Complex, ddp=None)
    yield Case("compiled", Compiled)
    yield Case("convolution", Images)
    yield Case("channels_last", lambda seed: Images(seed, channels_last=True))
    yield Case("batchnorm", lambda seed: Images(seed, norm=True), one=None)
    for form in (False, True):
        yield Case(
            f"sync_batchnorm{'_channels_last' * form}",
            partial(Images, norm=True, channels_last=form),
            {"sync_batchnorm": True},
            ddp=None,
        )
    yield Case("sync_batchnorm_bf16", lambda seed: Images(seed, True),
               {"sync_batchnorm": True, "precision": "bf16-mixed"}, ddp=None, one=3e-2)  # fmt: skip
    yield Case("bf16_mixed", Toy, {"precision": "bf16-mixed"}, one=2e-2)
    yield Case("bf16_mixed_windows_clip", Toy, {"precision": "bf16-mixed", **WINDOWS, **CLIP}, one=2e-2)
    yield Case("16_mixed_scaler", Overflowing, amp, one=1e-2)
    yield Case("16_mixed_scaler_windows_clip", Toy, lambda: {**amp(), **WINDOWS, **CLIP}, one=1e-2)
    yield Case("64_true", Toy, {"precision": "64-true"}, one=1e-12)
    yield Case("bf16_true", Toy, {"precision": "bf16-true"}, ddp=None, one=0.1)


def table_cases() -> Iterator[Case]:
    """Every combination of the strategy's options with accumulation and clipping."""
    ways = [("average", 1.0), ("average", 3.0), ("sum", 1.0)]
    clips: dict[str, dict[str, Any]] = {
        "": {},
        "_norm": CLIP,
        "_value": {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
    }
    for (op, predivide), compression, (clip, clipping), windows, unused in itertools.product(
        ways, ("none", "fp16", "bf16"), clips.items(), (1, 3), (False, True)
    ):
        yield Case(
            f"{op}_{predivide:.0f}_{compression}{clip}{'_windows' * (windows > 1)}{'_unused' * unused}",
            Plain,
            {"max_epochs": 1, "accumulate_grad_batches": windows, **clipping},
            {
                "op": op,
                "gradient_predivide_factor": predivide,
                "compression": compression,
                "find_unused_parameters": unused,
            },
            ddp=None,
            one={"none": 1e-6, "fp16": 1e-3, "bf16": 1e-2}[compression],
            scale=0.5 if op == "sum" else 1.0,
        )


CASES = [*single_cases(), *table_cases()]


def fit(case: Case, rank: int, size: int, strategy: Any, scale: float = 1.0) -> Tensor:
    module = case.make(rank)
    options = dict(case.options() if callable(case.options) else case.options)
    if scale != 1.0 and "gradient_clip_val" in options:
        options["gradient_clip_val"] /= scale
    t = trainer(strategy, devices=size, **options)
    if scale != 1.0:
        configure = module.configure_optimizers

        def scaled() -> torch.optim.Optimizer:
            optimizer = configure()
            assert isinstance(optimizer, torch.optim.Optimizer)
            for group in optimizer.param_groups:
                group["lr"] *= scale
            return optimizer

        module.configure_optimizers = scaled  # type: ignore[method-assign]
    data = images() if isinstance(module, Images) else samples()
    t.fit(module, DataLoader(Subset(data, range(rank, SAMPLES, size)), batch_size=16 // size))
    tensors = (*module.parameters(), *module.buffers())
    return torch.cat([torch.view_as_real(x).flatten() if x.is_complex() else x.flatten().double() for x in tensors])


def horovod_fit(case: Case, rank: int) -> Tensor:
    return fit(case, rank, 2, HorovodStrategy(**case.horovod), case.scale)


def attempt(run: Callable[[], Tensor]) -> Tensor | str:
    try:
        return run().detach().clone()
    except Exception:
        return traceback.format_exc()


def run_all(folder: Path) -> None:
    """Run all cases and leave what each of them gave in ``worker_k.pt``: a tensor, or a traceback."""
    rank = int(os.environ["HOROVOD_RANK"])
    results: dict[str, dict[str, Tensor | str]] = {case.name: {} for case in CASES}
    alone: dict[str, Tensor | str] = {}
    for case in CASES:
        if case.one is not None:
            key = f"{case.make} {case.options}"
            if key not in alone:
                alone[key] = attempt(partial(fit, case, 0, 1, "auto"))
            results[case.name]["one"] = alone[key]
    port = os.environ["TORCH_PORT"]
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "NODE_RANK": "0",
             "LOCAL_RANK": str(rank)}  # fmt: skip
    os.environ.update(place)
    for case in CASES:
        if case.ddp:
            results[case.name]["ddp"] = attempt(partial(fit, case, rank, 2, case.ddp))
    torch.distributed.destroy_process_group()
    for name in place:
        os.environ.pop(name, None)
    for case in CASES:
        results[case.name]["horovod"] = attempt(partial(horovod_fit, case, rank))
    torch.save(results, folder / f"worker_{rank}.pt")

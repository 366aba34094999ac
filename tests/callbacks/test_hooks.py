"""A step's hooks: which are called, and of whom."""

from __future__ import annotations

import lightning.pytorch as pl

from dcl_lightning.callbacks.hooks import leave_out_idle_hooks


class Acts(pl.Callback):
    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        pass


def test_only_hooks_that_do_something_are_left() -> None:
    callback = leave_out_idle_hooks(Acts())
    assert callable(callback.on_after_backward)
    assert callable(callback.on_train_epoch_start), "not a hook of a step"
    assert callback.on_before_backward is None
    assert callback.on_train_batch_end is None
    assert callable(Acts().on_before_backward), "of other callbacks of the kind nothing is changed"

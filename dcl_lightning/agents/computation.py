"""How an agent's networks are computed: the memory format of convolutions, and ``torch.compile``."""

from __future__ import annotations

import inspect
import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, TypeAlias

import torch
import torch._functorch.config as functorch_config
from torch import nn

from dcl_lightning.agents.teacher import Teacher
from dcl_lightning.errors import ConfigurationError, suggestion

__all__ = ["Compile", "MemoryFormat", "compile_arguments", "compile_networks", "eager", "set_memory_format"]

MemoryFormat: TypeAlias = Literal["auto", "contiguous", "channels_last"]
Compile: TypeAlias = bool | str | dict[str, Any]

_MODES = ("default", "reduce-overhead", "max-autotune")
_KEYS = tuple(name for name in inspect.signature(torch.compile).parameters if name not in ("model", "disable"))
# Below so many input channels, oneDNN's strided 1x1 convolutions in channels_last read beyond their input (oneDNN issue
# 6035): the process crashes, or the gradients are wrong.
_SAFE_CHANNELS = 16


def set_memory_format(network: nn.Module, wanted: MemoryFormat, device: torch.device, precision: str) -> bool:
    """Choose the order in which a network's convolutions compute, which is that of their inputs or their weights.

    ``auto`` is ``channels_last`` in single or half precision on a CPU, and in half precision on a GPU. On a CPU it is
    enough that inputs, of several channels, are in this format; on a GPU the weights would be converted in each step.

    Args:
        network: the network; its weights may be converted.
        wanted: the format.
        device: on which it will compute.
        precision: of the trainer, as ``32-true`` or ``bf16-mixed``.

    Returns:
        Whether its inputs shall be in ``channels_last``.

    Raises:
        ConfigurationError: ``channels_last``, with which this network is not safe on a CPU.
    """
    convolutions = [part for part in network.modules() if isinstance(part, nn.Conv2d)]
    unsafe = next((c for c in convolutions if _is_unsafe(c)), None) if device.type == "cpu" else None
    if wanted == "channels_last" and unsafe is not None:
        raise ConfigurationError(
            f"model.memory_format=channels_last: on a CPU a strided 1x1 convolution of {unsafe.in_channels} channels "
            f"needs at least {_SAFE_CHANNELS} in this format: give contiguous or auto, or a wider network"
        )
    if wanted == "contiguous":
        network.to(memory_format=torch.contiguous_format)
        return False
    if wanted == "auto":
        fast = not precision.startswith("64") if device.type == "cpu" else device.type == "cuda" and "16" in precision
        if not convolutions or not fast or unsafe is not None:
            return False
    if wanted == "channels_last" or device.type != "cpu":
        network.to(memory_format=torch.channels_last)
    return True


def _is_unsafe(convolution: nn.Conv2d) -> bool:
    is_strided = max(convolution.kernel_size) == 1 and max(convolution.stride) > 1
    return is_strided and convolution.in_channels // convolution.groups < _SAFE_CHANNELS


def compile_arguments(value: object) -> dict[str, Any] | None:
    """Return what ``model.compile`` passes to ``torch.compile``; None if nothing is to be compiled.

    Args:
        value: False, a mode of ``torch.compile``, or its arguments by name.

    Raises:
        ConfigurationError: neither of these, or arguments that ``torch.compile`` does not take together.
    """
    if value is False or value is None:
        return None
    if not isinstance(value, Mapping):
        if value not in _MODES:
            near = suggestion(value, _MODES) if isinstance(value, str) else ""
            raise ConfigurationError(
                f"model.compile={value!r}: give false, {', '.join(_MODES)}, or a dict of torch.compile's "
                f"arguments{near}"
            )
        return {"mode": value}
    for key in value:
        if key not in _KEYS:
            raise ConfigurationError(
                f"model.compile.{key}: torch.compile has no such argument; give {', '.join(_KEYS)}"
                f"{suggestion(str(key), _KEYS)}"
            )
    arguments = dict(value)
    try:
        torch.compile(nn.Identity(), **arguments)  # checks the arguments; nothing is compiled before a call
    except Exception as error:  # of several kinds, some of them private
        raise ConfigurationError(f"model.compile={arguments}: {str(error).strip().splitlines()[0]}") from error
    return arguments


def compile_networks(
    agent: nn.Module, parts: Sequence[nn.Module], arguments: dict[str, Any], cpu: bool, keep_graph: bool = False
) -> None:
    """Compile networks and an agent's teachers in place: a call of each, forward and backward, becomes few kernels.

    ``state_dict`` and the names of parameters stay as they are, and copies of the networks are not compiled.

    Args:
        agent: whose teachers are compiled, too.
        parts: the networks.
        arguments: of ``torch.compile``.
        cpu: whether they compute on a CPU.
        keep_graph: whether one forward pass may have several backward passes.

    Raises:
        ConfigurationError: there is no C++ compiler, or PyTorch is too old.
    """
    if not hasattr(torch.compiler, "set_stance"):
        raise ConfigurationError(f"model.compile needs PyTorch 2.6 or later, not {torch.__version__}: leave it out")
    compiler = os.environ.get("CXX") or "g++"
    if cpu and arguments.get("backend", "inductor") == "inductor" and shutil.which(compiler) is None:
        raise ConfigurationError(
            f"model.compile needs a C++ compiler on a CPU, and there is no {compiler}: install one, as by `apt-get "
            "install g++`, or leave model.compile out"
        )
    if keep_graph:
        functorch_config.donated_buffer = False  # else the first backward pass takes the memory of the second
    teachers = [part for module in agent.modules() if isinstance(module, Teacher) for part in module]
    for network in (*parts, *teachers):
        network.compile(**arguments)


def eager() -> AbstractContextManager[object]:
    """Return a context in which compiled networks compute as they were written, for transforms of ``torch.func``.

    These trace a network by themselves, which the compiler gives up on for the rest of the process.
    """
    # Without it nothing is compiled.
    return torch.compiler.set_stance("force_eager") if hasattr(torch.compiler, "set_stance") else nullcontext()

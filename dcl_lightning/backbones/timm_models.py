"""Any network of the library timm (PyTorch Image Models), by its name, with its pretrained weights."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from typing_extensions import Self

from dcl_lightning.backbones.base import Backbone
from dcl_lightning.errors import ConfigurationError, check_number, suggestion, whole_number
from dcl_lightning.paths import absolute
from dcl_lightning.types import InputSpec, NetworkInputs

__all__ = ["Freeze", "TimmModel"]

Freeze: TypeAlias = Literal["none", "all", "all_but_norm"] | dict[str, int]

_FREEZE = ("none", "all", "all_but_norm")
# Before the names of weights in files: of data-parallel training, and of this package's checkpoints.
_PREFIXES = ("module.", "backbone.model.")


class TimmModel(Backbone):
    """A network of timm without its classifier; the features are the classifier's inputs.

    timm is an optional extra: ``pip install 'dcl-lightning[timm]'``. With weights of ``pretrained`` or
    ``checkpoint_path``, the data module makes images of any data set what the weights were trained on, by timm's data
    config: it repeats grey images in each channel, resizes to the network's size with its interpolation, and normalises
    with its mean and deviation. A network of random weights takes the images of the data as they are, and is built for
    their size.

    Args:
        name: name in timm, such as ``ghostnet_050`` or ``vit_tiny_patch16_224``; ``timm.list_models()`` lists all. What
            follows a point names one of several weights, as in ``vit_tiny_patch16_224.augreg_in21k``.
        pretrained: whether to start from timm's weights, which it fetches from a hub once; random weights if not.
        drop_rate: dropout in front of the head, in [0, 1).
        options: further arguments of ``timm.create_model``.
        in_channels: channels of an input; those of the weights if None, or of the data without weights.
        checkpoint_path: file of weights to start from, in place of the hub's: safetensors, or PyTorch's, of which
            nothing but weights is read.
        freeze: what is not trained: ``none``; ``all``; ``all_but_norm``, all but the scales and shifts of normalisation
            layers; or ``{blocks: N}``, the layers in front of the first block and the first N blocks. Normalisation and
            dropout that are frozen compute as in evaluation.
        img_size: height and width in pixels to which images are resized, one number for squares; that of the weights
            if None, or of the data without weights.

    Raises:
        ConfigurationError: if timm is not installed, has no such network, or cannot build it for this input; if the
            weights are not at hand or of another network; or if a value is out of range. There or in ``adapt``.
    """

    takes_any_size = True

    def __init__(
        self,
        name: str,
        pretrained: bool = False,
        drop_rate: float = 0.0,
        options: dict[str, Any] | None = None,
        in_channels: int | None = None,
        checkpoint_path: str | None = None,
        freeze: Freeze = "none",
        img_size: int | tuple[int, int] | None = None,
    ) -> None:
        for number in (img_size,) if isinstance(img_size, int) else img_size or ():
            check_number("backbone.img_size", number, at_least=1)
        super().__init__(in_channels, img_size)
        check_number("backbone.drop_rate", drop_rate, at_least=0, below=1)
        self.freeze = _checked(freeze)
        library = _timm()
        if not library.is_model(name.partition(".")[0]):
            near = library.list_models(f"*{name}*")[:5]
            hint = f"did you mean {', '.join(near)}?" if near else "timm.list_models() has all names"
            raise ConfigurationError(f"backbone timm: timm {library.__version__} has no network name={name!r}; {hint}")
        self.name, self.pretrained, self.drop_rate = name, pretrained, drop_rate
        self.checkpoint_path = None if checkpoint_path is None else absolute(checkpoint_path)
        self.options = dict(options or {})
        self.constant_parts = []
        self._build_if_known()

    def own_inputs(self, spec: InputSpec) -> NetworkInputs | None:
        """Return what the weights were trained on, in the size ``img_size``; None if images stay as they are."""
        has_weights = self.pretrained or self.checkpoint_path is not None
        if not has_weights and self.input_size is None:
            return None
        config = _timm().get_pretrained_cfg(self.name)
        known = {} if config is None else config.to_dict()
        found = _timm().data.resolve_data_config(pretrained_cfg=known)
        channels, height, width = found["input_size"]
        size = self.input_size or (height, width)
        interpolation = "bilinear" if found["interpolation"] == "bilinear" else "bicubic"
        if not has_weights:
            return NetworkInputs(InputSpec(self.in_channels or spec.channels, *size), interpolation)
        normalisation = tuple(map(float, found["mean"])), tuple(map(float, found["std"]))
        return NetworkInputs(InputSpec(self.in_channels or channels, *size), interpolation, normalisation)

    def adapt(self, spec: InputSpec) -> None:
        """Build the layers for what the network takes of images of this shape; later calls do nothing.

        Args:
            spec: shape of the data's inputs.

        Raises:
            ConfigurationError: as the class.
        """
        own = self.own_inputs(spec)
        super().adapt(spec if own is None else own.spec)

    def build(self, spec: InputSpec) -> int:
        """Make the network, freeze what is to be, and return the length of its features."""
        library = _timm()
        config = library.get_pretrained_cfg(self.name)
        arguments: dict[str, Any] = {"pretrained": self.pretrained and self.checkpoint_path is None}
        if config is not None and config.fixed_input_size:
            arguments["img_size"] = (spec.height, spec.width)
        if self.drop_rate:
            arguments["drop_rate"] = self.drop_rate
        arguments |= self.options
        try:
            self.model = library.create_model(self.name, num_classes=0, in_chans=spec.channels, **arguments)
        except (AssertionError, OSError, RuntimeError, TypeError, ValueError) as error:
            if arguments["pretrained"] and isinstance(error, OSError):
                raise ConfigurationError(self._without_hub(config, error)) from error
            raise ConfigurationError(
                f"backbone timm: {self.name} cannot be built for inputs of {spec.channels} x {spec.height} x "
                f"{spec.width}: {type(error).__name__}: {_line(error)}"
            ) from error
        if self.checkpoint_path is not None:
            self._load(self.checkpoint_path)
        frozen = self._frozen_names()
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(name not in frozen)
        self.constant_parts = [*_behind_frozen(self.model)] if self.freeze != "none" else []
        self.train(self.training)
        # Some networks have layers between pooling and classifier: ``num_features`` is the length before them.
        return int(getattr(self.model, "head_hidden_size", self.model.num_features))

    def train(self, mode: bool = True) -> Self:
        """Set the mode, but leave what is frozen in evaluation mode."""
        super().train(mode)
        for part in self.constant_parts:
            part.training = False
        return self

    def forward(self, inputs: Tensor) -> Tensor:
        """Return features ``(B, feature_dim)`` of inputs ``(B, C, H, W)``, float."""
        return self.model(inputs)

    def _without_hub(self, config: Any, error: OSError) -> str:
        where = None if config is None else config.url
        if config is not None and config.hf_hub_id:
            where = f"model.safetensors of https://huggingface.co/{config.hf_hub_id}"
        return (
            f"backbone timm: the weights of {self.name} cannot be fetched ({_line(error)}): fetch {where} on a "
            "computer with a network, put it where this job can read it, and give model.backbone.checkpoint_path=FILE"
        )

    def _load(self, path: str) -> None:
        """Load a file of weights, of which no layer of the network may lack any."""
        state = _read_weights(path)
        # timm's own conversion of older and other programs' names, and of embeddings of positions to another size.
        convert = vars(sys.modules[type(self.model).__module__]).get("checkpoint_filter_fn")
        words = f"backbone timm: checkpoint_path={path} has not the weights of {self.name}"
        try:
            missing = self.model.load_state_dict(convert(state, self.model) if convert else state, strict=False)[0]
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:  # of another shape
            raise ConfigurationError(f"{words}: {_line(error)}; give the file and the name of one network") from error
        if missing:
            raise ConfigurationError(
                f"{words}: {len(missing)} are missing, as {missing[0]}, and it has {', '.join([*state][:3])}; give the "
                "file and the name of one network"
            )

    def _frozen_names(self) -> set[str]:
        """Return the names of the parameters that are not trained."""
        names = [name for name, _ in self.model.named_parameters()]
        if isinstance(self.freeze, dict):
            from timm.models import group_parameters

            groups = group_parameters(self.model, self.model.group_matcher(coarse=False), reverse=True)
            wanted, last = self.freeze["blocks"], max(groups.values())
            if wanted > last:
                raise ConfigurationError(
                    f"model.backbone.freeze.blocks={wanted}: {self.name} has {last} blocks; give at most so many"
                )
            return {name for name in names if groups[name] <= wanted}
        if self.freeze == "none":
            return set()
        trained = set(_norm_names(self.model)) if self.freeze == "all_but_norm" else set()
        return set(names) - trained


def _checked(freeze: Freeze) -> Freeze:
    allowed = f"{', '.join(_FREEZE)}, or blocks: N"
    if isinstance(freeze, Mapping):
        if set(freeze) != {"blocks"}:
            raise ConfigurationError(f"model.backbone.freeze={dict(freeze)}: give {allowed}")
        return {"blocks": whole_number("model.backbone.freeze.blocks", freeze["blocks"], 0)}
    if freeze not in _FREEZE:
        near = suggestion(freeze, _FREEZE) if isinstance(freeze, str) else ""
        raise ConfigurationError(f"model.backbone.freeze={freeze!r}: give {allowed}{near}")
    return freeze


def _norm_names(network: nn.Module) -> Iterator[str]:
    """Yield the names of the scales and shifts of normalisation layers, which timm's kinds have in their names."""
    for name, part in network.named_modules():
        if "norm" in type(part).__name__.lower():
            yield from (f"{name}.{leaf}".lstrip(".") for leaf, _ in part.named_parameters(recurse=False))


def _behind_frozen(network: nn.Module) -> Iterator[nn.Module]:
    """Yield the parts without a trained parameter, but those without any, as dropout, only behind a frozen one."""
    frozen = False
    for part in network.modules():
        own, all_of_it = list(part.parameters(recurse=False)), list(part.parameters())
        if own:
            frozen = not any(p.requires_grad for p in own)
        if not any(p.requires_grad for p in all_of_it) if all_of_it else frozen:
            yield part


def _read_weights(path: str) -> dict[str, Tensor]:
    """Return the weights in a file by their names in the network."""
    if not os.path.isfile(path):
        raise ConfigurationError(
            f"backbone timm: checkpoint_path={path} is no file: give one of weights, safetensors or PyTorch's"
        )
    try:
        if path.endswith(".safetensors"):
            from safetensors.torch import load_file

            found: object = load_file(path)
        else:
            found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # safetensors' own kind, and several of pickle and zip files
        raise ConfigurationError(
            f"backbone timm: checkpoint_path={path} cannot be read as weights alone ({_line(error)}): give a file of "
            "safetensors, or of torch.save(network.state_dict(), file)"
        ) from error
    for key in ("state_dict_ema", "model_ema", "state_dict", "model"):
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
    state = {str(k): v for k, v in found.items() if isinstance(v, Tensor)} if isinstance(found, Mapping) else {}
    for prefix in _PREFIXES:
        if any(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): v for name, v in state.items() if name.startswith(prefix)}
    return state


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def _timm() -> Any:
    try:
        import timm
    except ImportError as error:
        raise ConfigurationError(
            "backbone timm needs the library timm, which is not installed: run `pip install 'dcl-lightning[timm]'`"
        ) from error
    return timm

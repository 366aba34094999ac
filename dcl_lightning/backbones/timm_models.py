"""Any network of the library timm (PyTorch Image Models), by its name."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from dcl_lightning.backbones.base import Backbone
from dcl_lightning.errors import ConfigurationError
from dcl_lightning.types import InputSpec

__all__ = ["TimmModel"]


class TimmModel(Backbone):
    """A network of timm without its classifier; the features are the classifier's inputs.

    timm is an optional extra: ``pip install 'dcl-lightning[timm]'``. Networks of a fixed input size, such as vision
    transformers, are built for the size of the data.

    Args:
        name: name in timm, such as ``ghostnet_050`` or ``vit_tiny_patch16_224``; ``timm.list_models()`` lists all.
        pretrained: whether to start from timm's weights, which it downloads once; random weights if not.
        drop_rate: dropout in front of the head, in [0, 1).
        options: further arguments of ``timm.create_model``.
        in_channels: channels of an input; taken from the data if None.
        input_size: height and width in pixels, one number for squares; taken from the data if None.

    Raises:
        ConfigurationError: if timm is not installed, has no such network, or cannot build it for this input,
            there or in ``adapt``.
    """

    takes_any_size = True

    def __init__(
        self,
        name: str,
        pretrained: bool = False,
        drop_rate: float = 0.0,
        options: dict[str, Any] | None = None,
        in_channels: int | None = None,
        input_size: int | tuple[int, int] | None = None,
    ) -> None:
        super().__init__(in_channels, input_size)
        if not 0 <= drop_rate < 1:
            raise ConfigurationError(f"drop_rate={drop_rate}: give a share from 0 to below 1")
        library = _timm()
        if not library.is_model(name.partition(".")[0]):
            near = library.list_models(f"*{name}*")[:5]
            hint = f"did you mean {', '.join(near)}?" if near else "timm.list_models() has all names"
            raise ConfigurationError(f"backbone timm: timm {library.__version__} has no network name={name!r}; {hint}")
        self.name, self.pretrained, self.drop_rate = name, pretrained, drop_rate
        self.options = dict(options or {})
        self._build_if_known()

    def build(self, spec: InputSpec) -> int:
        """Make the network and return the length of its features."""
        library = _timm()
        config = library.get_pretrained_cfg(self.name)
        sized = config is not None and config.fixed_input_size
        arguments: dict[str, Any] = {"img_size": (spec.height, spec.width)} if sized else {}
        if self.drop_rate:
            arguments["drop_rate"] = self.drop_rate
        arguments |= self.options
        try:
            self.model = library.create_model(
                self.name, pretrained=self.pretrained, num_classes=0, in_chans=spec.channels, **arguments
            )
        except (AssertionError, OSError, RuntimeError, TypeError, ValueError) as error:
            raise ConfigurationError(
                f"backbone timm: {self.name} cannot be built for inputs of {spec.channels} x {spec.height} x "
                f"{spec.width}: {type(error).__name__}: {error}"
            ) from error
        # Some networks have layers between pooling and classifier: ``num_features`` is the length before them.
        return int(getattr(self.model, "head_hidden_size", self.model.num_features))

    def forward(self, inputs: Tensor) -> Tensor:
        """Return features ``(B, feature_dim)`` of inputs ``(B, C, H, W)``, float."""
        return self.model(inputs)


def _timm() -> Any:
    try:
        import timm
    except ImportError as error:
        raise ConfigurationError(
            "backbone timm needs the library timm, which is not installed: run `pip install 'dcl-lightning[timm]'`"
        ) from error
    return timm

"""``Backbone``, which builds its layers once the shape of an input is known, and the heads."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from dcl_lightning.errors import ConfigurationError, check_number
from dcl_lightning.types import InputSpec, NetworkInputs

__all__ = ["Backbone", "CosineHead", "LinearHead", "ProjectionHead"]

# What a shorter vector is divided by. Half precision has no number as small as torch's default.
_SHORTEST = 1e-5


class Backbone(nn.Module):
    """A network from inputs ``(B, C, H, W)`` to features ``(B, feature_dim)``.

    A subclass keeps its arguments, calls ``self._build_if_known()`` at the end of its constructor, makes its layers in
    ``build`` and returns the length of its features from there.

    Args:
        in_channels: channels of an input; taken from the data if None.
        input_size: height and width in pixels, one number for squares; taken from the data if None.

    Raises:
        ConfigurationError: if a given number is below 1.

    Attributes:
        feature_dim: length of a feature vector; set when the layers are built.
        input_spec: shape of an input; None until the layers are built.
        constant_parts: modules within it that stay in evaluation mode.
    """

    feature_dim: int
    constant_parts: Sequence[nn.Module] = ()
    # Whether layers built for one height and width accept others.
    takes_any_size: ClassVar[bool] = False

    def __init__(self, in_channels: int | None = None, input_size: int | tuple[int, int] | None = None) -> None:
        super().__init__()
        if isinstance(input_size, int):
            input_size = (input_size, input_size)
        given = (in_channels, *(input_size or ()))
        for key, number in zip(("in_channels", "input_size", "input_size"), given, strict=False):
            if number is not None:
                check_number(f"backbone.{key}", number, at_least=1)
        self.in_channels = in_channels
        self.input_size = None if input_size is None else (input_size[0], input_size[1])
        self.input_spec: InputSpec | None = None

    def own_inputs(self, spec: InputSpec) -> NetworkInputs | None:
        """Return what the data module is to make of images of this shape for the network; None to leave them so."""
        return None

    def adapt(self, spec: InputSpec) -> None:
        """Build the layers, taking from ``spec`` what the constructor left open; later calls do nothing.

        Args:
            spec: shape of the data's inputs.

        Raises:
            ConfigurationError: the constructor was given another number of channels or another size, or the layers do
                not fit into memory.
        """
        name = f"backbone {type(self).__name__.lower()}"
        if self.in_channels not in (None, spec.channels):
            raise ConfigurationError(
                f"{name}: in_channels={self.in_channels}, but the data have {spec.channels} channels: leave it out"
            )
        if not self.takes_any_size and self.input_size not in (None, (spec.height, spec.width)):
            raise ConfigurationError(
                f"{name}: input_size={self.input_size}, but the data have {spec.height} x {spec.width} pixels: leave "
                "input_size out"
            )
        if self.input_spec is not None:
            return
        height, width = self.input_size or (spec.height, spec.width)
        self.input_spec = InputSpec(self.in_channels or spec.channels, height, width)
        try:
            self.feature_dim = self.build(self.input_spec)
        except (MemoryError, OverflowError, RuntimeError, TypeError) as error:  # torch's, of a size
            self.input_spec = None
            reason = str(error).splitlines()[0]
            raise ConfigurationError(f"{name} cannot be built ({reason}): give smaller sizes") from error

    @abstractmethod
    def build(self, spec: InputSpec) -> int:
        """Make the layers for inputs of this shape and return ``feature_dim``; called once."""

    def _build_if_known(self) -> None:
        if self.in_channels is not None and self.input_size is not None:
            self.adapt(InputSpec(self.in_channels, *self.input_size))


class LinearHead(nn.Linear):
    """One linear layer from features ``(B, feature_dim)`` to logits ``(B, num_classes)`` of all classes of the stream.

    Args:
        feature_dim: length of a feature vector, at least 1.
        num_classes: number of classes, at least 1.
        bias: whether each logit has a bias.

    Raises:
        ConfigurationError: if one of the two numbers is below 1.
    """

    def __init__(self, feature_dim: int, num_classes: int, bias: bool = True) -> None:
        if feature_dim < 1 or num_classes < 1:
            raise ConfigurationError(f"feature_dim={feature_dim} and num_classes={num_classes} must be at least 1")
        super().__init__(feature_dim, num_classes, bias)


class CosineHead(LinearHead):
    r"""Logits that are scaled cosines of the angles between the features and a vector of each class, without a bias.

    .. math:: z_k = s \, \langle f / |f|, \ w_k / |w_k| \rangle

    Hou, Pan, Loy, Wang and Lin, "Learning a Unified Classifier Incrementally via Rebalancing", CVPR 2019, section 3.2.
    They learn the scale; here it is a constant, as in the program of ER-ACE (Caccia et al. 2022).

    Args:
        feature_dim: length of a feature vector f, at least 1.
        num_classes: number of classes, at least 1.
        scale: s, above 0: all logits are in [-s, s].

    Raises:
        ConfigurationError: if one of the two numbers is below 1.
    """

    def __init__(self, feature_dim: int, num_classes: int, scale: float) -> None:
        super().__init__(feature_dim, num_classes, bias=False)
        self.scale = scale

    def forward(self, input: Tensor) -> Tensor:
        """Return logits ``(B, num_classes)`` of features ``(B, feature_dim)``."""
        directions = F.normalize(input, dim=1, eps=_SHORTEST), F.normalize(self.weight, dim=1, eps=_SHORTEST)
        return self.scale * F.linear(*directions)


class ProjectionHead(LinearHead):
    """Projections of norm 1 for a contrastive loss: by a hidden layer of ``feature_dim`` units, and a linear one.

    Khosla et al., "Supervised Contrastive Learning", NeurIPS 2020, section 3.1, with the hidden layer of the program of
    SCR (Mai et al. 2021).

    Args:
        feature_dim: length of a feature vector, at least 1.
        projection_dim: length of a projection, at least 1.

    Raises:
        ConfigurationError: if one of the two numbers is below 1.
    """

    def __init__(self, feature_dim: int, projection_dim: int) -> None:
        super().__init__(feature_dim, projection_dim)
        self.hidden = nn.Linear(feature_dim, feature_dim)

    def forward(self, input: Tensor) -> Tensor:
        """Return projections ``(B, projection_dim)`` of features ``(B, feature_dim)``."""
        return F.normalize(super().forward(self.hidden(input).relu()), dim=1, eps=_SHORTEST)

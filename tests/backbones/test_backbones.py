import copy

import pytest
import torch
from torchvision import models

from dcl_lightning.backbones import MLP, LinearHead, MNISTNet, ResNet, presets
from dcl_lightning.errors import ConfigurationError
from dcl_lightning.types import InputSpec


def count(*modules):
    return sum(p.numel() for module in modules for p in module.parameters())


CASES = [
    (MLP, {}, InputSpec(1, 8, 8), 100),
    (MLP, {"hidden": [7]}, InputSpec(1, 1, 30), 7),
    (MNISTNet, {}, InputSpec(1, 28, 28), 50),
    (ResNet, {"depth": 20}, InputSpec(1, 8, 8), 64),
    (ResNet, {"depth": 32, "width": 4}, InputSpec(3, 32, 32), 16),
    (ResNet, {"depth": 18, "width": 20}, InputSpec(3, 64, 64), 160),
    (ResNet, {"width": 8}, InputSpec(3, 32, 32), 256),
]


@pytest.mark.parametrize(("kind", "kwargs", "spec", "dim"), CASES)
def test_features_and_late_building(kind, kwargs, spec, dim):
    backbone = kind(**kwargs)
    assert not list(backbone.parameters())
    assert not hasattr(backbone, "feature_dim")
    backbone.adapt(spec)
    assert backbone.feature_dim == dim
    parameters = list(backbone.parameters())
    backbone.adapt(InputSpec(9, 99, 99))
    assert all(a is b for a, b in zip(parameters, backbone.parameters(), strict=True))
    features = backbone(torch.randn(3, *spec))
    assert features.shape == (3, dim)
    features.sum().backward()
    assert all(p.grad is not None for p in parameters)
    assert copy.deepcopy(backbone).feature_dim == dim


@pytest.mark.parametrize(("kind", "kwargs", "spec", "dim"), CASES)
def test_early_building_is_the_same(kind, kwargs, spec, dim):
    late = kind(**kwargs)
    late.adapt(spec)
    early = kind(**kwargs, in_channels=spec.channels, input_size=(spec.height, spec.width))
    early.load_state_dict(late.state_dict())
    x = torch.randn(2, *spec)
    assert torch.equal(early.eval()(x), late.eval()(x))


def test_what_is_given_wins_over_the_data():
    backbone = MLP(input_size=6)
    backbone.adapt(InputSpec(1, 4, 4))
    assert backbone.input_spec == InputSpec(1, 6, 6)


def test_mnistnet_parameters_and_features():
    backbone = MNISTNet(in_channels=1, input_size=28)
    assert count(backbone, LinearHead(50, 10)) == 99_376
    assert (backbone.eval()(torch.randn(4, 1, 28, 28)) >= 0).all()
    with pytest.raises(ConfigurationError, match="8 x 8"):
        MNISTNet().adapt(InputSpec(1, 8, 8))


@pytest.mark.parametrize(
    ("depth", "parameters"), [(20, 269_722), (32, 464_154), (44, 658_586), (56, 853_018), (110, 1_727_962)]
)
def test_cifar_family_parameters(depth, parameters):
    # He et al. 2016, table 6: 0.27, 0.46, 0.66, 0.85 and 1.7 million.
    backbone = ResNet(depth, in_channels=3, input_size=32)
    assert count(backbone, LinearHead(64, 10)) == parameters


@pytest.mark.parametrize("depth", [18, 50])
def test_imagenet_family_is_torchvisions(depth):
    theirs = models.get_model(f"resnet{depth}", weights=None)
    ours = ResNet(depth, in_channels=3, input_size=64)
    state = {k: v for k, v in theirs.state_dict().items() if not k.startswith("fc.")}
    ours.load_state_dict(state)
    theirs.fc = torch.nn.Identity()
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))


@pytest.mark.parametrize("depth", [34, 101, 152])
def test_imagenet_family_parameters(depth):
    with torch.device("meta"):
        theirs = models.get_model(f"resnet{depth}", weights=None)
        ours = ResNet(depth, in_channels=3, input_size=224)
    assert count(ours) == count(theirs) - count(theirs.fc)


def test_stem_follows_the_input():
    def stride(**kwargs):
        return ResNet(18, width=8, in_channels=3, **kwargs).conv1.stride

    assert stride(input_size=32) == (1, 1)
    assert stride(input_size=64) == (2, 2)
    assert stride(input_size=64, stem="cifar") == (1, 1)
    assert stride(input_size=32, stem="imagenet") == (2, 2)
    assert ResNet(20, in_channels=3, input_size=64).conv1.stride == (1, 1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ResNet(19), "18, 20, 32, 34, 44, 50, 56, 101, 110, 152"),
        (lambda: ResNet(32, stem="imagenet"), "18, 34, 50"),
        (lambda: ResNet(stem="small"), "imagenet"),
        (lambda: ResNet(width=0), "width=0"),
        (lambda: MLP(hidden=[]), "hidden"),
        (lambda: MLP(in_channels=0), "in_channels=0"),
        (lambda: LinearHead(0, 10), "feature_dim=0"),
    ],
)
def test_wrong_arguments_say_what_is_allowed(make, message):
    with pytest.raises(ConfigurationError, match=message):
        make()


def test_short_names_are_the_classes():
    for name, kind in (("mlp", MLP), ("mnistnet", MNISTNet), ("resnet", ResNet)):
        assert issubclass(getattr(presets, name), kind)
    assert presets.resnet(depth=20, in_channels=3, input_size=32).feature_dim == 64


def test_channels_that_the_data_do_not_have_are_refused():
    with pytest.raises(ConfigurationError, match=r"in_channels=3.*1 channels"):
        MLP(in_channels=3, input_size=8).adapt(InputSpec(1, 8, 8))

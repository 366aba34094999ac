"""Backbones: feature sizes, layers, numbers of parameters, and users' own networks."""

import copy
import sys

import pytest
import torch
from torchvision import models

from dcl_lightning import cli
from dcl_lightning.backbones import MLP, CandleNet, LinearHead, MNISTNet, ResNet, TimmModel, short_names
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
    (CandleNet, {"filters": 4, "hidden": 5}, InputSpec(1, 1, 90), 20),
    (CandleNet, {"filters": 4, "hidden": 5, "features": 3}, InputSpec(2, 8, 8), 3),
    (TimmModel, {"name": "ghostnet_050"}, InputSpec(3, 64, 64), 1280),
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
    size = {"img_size" if kind is TimmModel else "input_size": (spec.height, spec.width)}
    early = kind(**kwargs, in_channels=spec.channels, **size)
    early.load_state_dict(late.state_dict())
    x = torch.randn(2, *spec)
    assert torch.equal(early.eval()(x), late.eval()(x))


def test_a_size_that_is_given_is_the_datas_where_the_network_takes_no_other():
    with pytest.raises(ConfigurationError, match=r"input_size=\(6, 6\), but the data have 4 x 4 pixels"):
        MLP(input_size=6).adapt(InputSpec(1, 4, 4))
    any_size = ResNet(depth=20, input_size=64)
    any_size.adapt(InputSpec(3, 32, 32))
    assert any_size.input_spec == InputSpec(3, 64, 64)


# Parameters with the head, the length of the features, and the shape of the last map before pooling, of the networks
# that are meant to agree with the original program's, with the paper of residual networks (He et al. 2016, table 6:
# 0.27, 0.46, 0.66, 0.85 and 1.7 million) and with torchvision, also with a first layer of 3 x 3 for small images. The
# original's networks for CIFAR are not: their number of layers did not depend on the depth.
# kind, arguments, input, classes: parameters, feature_dim, map
TABLE = [
    (MNISTNet, {}, (1, 28, 28), 10, 99_376, 50, None),
    (CandleNet, {}, (1, 1, 60_483), 2, 154_922_918, 20, None),
    (ResNet, {"depth": 18, "width": 20}, (3, 224, 224), 1000, 1_256_540, 160, (7, 7)),
    (ResNet, {"depth": 18, "width": 20}, (3, 64, 64), 200, 1_127_740, 160, (2, 2)),
    (ResNet, {"depth": 18, "width": 20}, (3, 224, 224), 100, 1_111_640, 160, (7, 7)),
    (ResNet, {"depth": 34, "width": 40}, (3, 224, 224), 1000, 8_641_520, 320, (7, 7)),
    (ResNet, {"depth": 34, "width": 40}, (3, 64, 64), 200, 8_384_720, 320, (2, 2)),
    (ResNet, {"depth": 34, "width": 40}, (3, 224, 224), 100, 8_352_620, 320, (7, 7)),
    (ResNet, {"depth": 50}, (3, 224, 224), 1000, 25_557_032, 2048, (7, 7)),
    (ResNet, {"depth": 50}, (3, 64, 64), 200, 23_917_832, 2048, (2, 2)),
    (ResNet, {"depth": 50}, (3, 224, 224), 100, 23_712_932, 2048, (7, 7)),
    (ResNet, {"depth": 101}, (3, 224, 224), 1000, 44_549_160, 2048, (7, 7)),
    (ResNet, {"depth": 101}, (3, 64, 64), 200, 42_909_960, 2048, (2, 2)),
    (ResNet, {"depth": 101}, (3, 224, 224), 100, 42_705_060, 2048, (7, 7)),
    (ResNet, {"depth": 152}, (3, 224, 224), 1000, 60_192_808, 2048, (7, 7)),
    (ResNet, {"depth": 152}, (3, 64, 64), 200, 58_553_608, 2048, (2, 2)),
    (ResNet, {"depth": 152}, (3, 224, 224), 100, 58_348_708, 2048, (7, 7)),
    # Others' numbers.
    (ResNet, {"depth": 18}, (3, 224, 224), 1000, 11_689_512, 512, (7, 7)),
    (ResNet, {"depth": 34}, (3, 224, 224), 1000, 21_797_672, 512, (7, 7)),
    (ResNet, {"depth": 18}, (3, 32, 32), 10, 11_173_962, 512, (4, 4)),
    (ResNet, {"depth": 34}, (3, 32, 32), 10, 21_282_122, 512, (4, 4)),
    (ResNet, {"depth": 50}, (3, 32, 32), 10, 23_520_842, 2048, (4, 4)),
    (ResNet, {"depth": 101}, (3, 32, 32), 10, 42_512_970, 2048, (4, 4)),
    (ResNet, {"depth": 152}, (3, 32, 32), 10, 58_156_618, 2048, (4, 4)),
    (ResNet, {"depth": 50, "stem": "cifar"}, (3, 64, 64), 10, 23_520_842, 2048, (8, 8)),
    (ResNet, {"depth": 50, "stem": "imagenet"}, (3, 32, 32), 10, 23_528_522, 2048, (1, 1)),
    (ResNet, {"depth": 20}, (3, 32, 32), 10, 269_722, 64, (8, 8)),
    (ResNet, {"depth": 32}, (3, 32, 32), 10, 464_154, 64, (8, 8)),
    (ResNet, {"depth": 44}, (3, 32, 32), 10, 658_586, 64, (8, 8)),
    (ResNet, {"depth": 56}, (3, 32, 32), 10, 853_018, 64, (8, 8)),
    (ResNet, {"depth": 110}, (3, 32, 32), 10, 1_727_962, 64, (8, 8)),
    (MLP, {}, (1, 8, 8), 10, 17_610, 100, None),
    (MLP, {"hidden": [400, 400]}, (1, 28, 28), 10, 478_410, 400, None),
    (TimmModel, {"name": "resnet50"}, (3, 224, 224), 1000, 25_557_032, 2048, None),
    (TimmModel, {"name": "vit_tiny_patch16_224"}, (3, 224, 224), 1000, 5_717_416, 192, None),
]


@pytest.mark.parametrize(("kind", "kwargs", "shape", "classes", "parameters", "dim", "last_map"), TABLE)
def test_parameters_and_shapes(kind, kwargs, shape, classes, parameters, dim, last_map):
    # On the meta device shapes are computed and nothing is allocated: candlenet alone would take 620 MB.
    with torch.device("meta"):
        backbone = kind(**kwargs)
        backbone.adapt(InputSpec(*shape))
        head = LinearHead(backbone.feature_dim, classes)
        inputs = torch.empty(2, *shape)
    seen = []
    if last_map:
        backbone.get_submodule(f"layer{backbone.num_stages}").register_forward_hook(
            lambda module, args, out: seen.append(tuple(out.shape[2:]))
        )
    backbone.eval()
    assert count(backbone, head) == parameters
    assert backbone.feature_dim == dim
    features = backbone(inputs)
    assert features.shape == (2, dim)
    assert head(features).shape == (2, classes)
    assert seen == ([last_map] if last_map else [])


def test_mnistnet_features():
    backbone = MNISTNet(in_channels=1, input_size=28)
    assert (backbone.eval()(torch.randn(4, 1, 28, 28)) >= 0).all()
    with pytest.raises(ConfigurationError, match="8 x 8"):
        MNISTNet().adapt(InputSpec(1, 8, 8))


def test_candlenet_layer_by_layer():
    backbone = CandleNet(filters=3, hidden=4, features=2, in_channels=1, input_size=(1, 79)).eval()
    layers, x = dict(backbone.layers.named_children()), torch.randn(2, 1, 1, 79)
    lengths = []
    for layer in layers.values():
        x = layer(x)
        lengths.append(tuple(x.shape[1:]))
    # 79 - 19, - 9, then windows of ten of 51: the rest is left out.
    assert [lengths[i] for i in (1, 3, 5, 6, 7, 10)] == [(3, 60), (3, 51), (3, 5), (15,), (4,), (2,)]
    with pytest.raises(ConfigurationError, match="at least 38 values a channel, got 36"):
        CandleNet().adapt(InputSpec(1, 6, 6))
    smallest = CandleNet(filters=2, hidden=2, in_channels=1, input_size=(1, 38))
    assert smallest(torch.randn(1, 1, 1, 38)).shape == (1, 20)


@pytest.mark.parametrize("depth", [18, 50])
def test_imagenet_family_is_torchvisions(depth):
    theirs = models.get_model(f"resnet{depth}", weights=None)
    ours = ResNet(depth, in_channels=3, input_size=64)
    state = {k: v for k, v in theirs.state_dict().items() if not k.startswith("fc.")}
    ours.load_state_dict(state)
    theirs.fc = torch.nn.Identity()
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))


def test_stem_follows_the_input():
    def stride(**kwargs):
        return ResNet(18, width=8, in_channels=3, **kwargs).conv1.stride

    assert stride(input_size=32) == (1, 1)
    assert stride(input_size=64) == (2, 2)
    assert stride(input_size=64, stem="cifar") == (1, 1)
    assert stride(input_size=32, stem="imagenet") == (2, 2)
    assert ResNet(20, in_channels=3, input_size=64).conv1.stride == (1, 1)


@pytest.mark.parametrize("depth", [18, 20])
def test_weights_of_convolutions_are_drawn_as_asked(depth):
    def convolutions(**kwargs):
        torch.manual_seed(0)
        backbone = ResNet(depth, width=32, in_channels=3, input_size=32, **kwargs)
        return [module for module in backbone.modules() if isinstance(module, torch.nn.Conv2d)]

    pairs = list(zip(convolutions(init="he"), convolutions(init="torch"), convolutions(), strict=True))
    for he, default, unset in pairs:
        pixels = he.kernel_size[0] * he.kernel_size[1]
        assert torch.equal(he.weight, unset.weight)
        # Four standard errors of a normal sample's deviation; that of a uniform one is smaller.
        close = {"rel": 4 / (2 * he.weight.numel()) ** 0.5}
        assert he.weight.std().item() == pytest.approx((2 / (pixels * he.out_channels)) ** 0.5, **close)
        bound = (pixels * he.in_channels) ** -0.5
        assert default.weight.std().item() == pytest.approx(bound / 3**0.5, **close)
        assert default.weight.abs().max() <= bound


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ResNet(init="xavier"), "init='xavier': give he or torch"),
        (lambda: ResNet(19), "18, 20, 32, 34, 44, 50, 56, 101, 110, 152"),
        (lambda: ResNet(32, stem="imagenet"), "18, 34, 50"),
        (lambda: ResNet(stem="small"), "imagenet"),
        (lambda: ResNet(width=0), "width=0"),
        (lambda: MLP(hidden=[]), "hidden"),
        (lambda: MLP(in_channels=0), "in_channels=0"),
        (lambda: LinearHead(0, 10), "feature_dim=0"),
        (lambda: CandleNet(filters=0), "filters=0"),
        (lambda: TimmModel("ghostnet_5"), "no network name='ghostnet_5'"),
        (lambda: TimmModel("ghostnet"), "did you mean ghostnet_050"),
        (lambda: TimmModel("ghostnet_050", drop_rate=1.0), "drop_rate=1.0"),
        (
            lambda: TimmModel("ghostnet_050", options={"nonsense": 1}, in_channels=3, img_size=64),
            "3 x 64 x 64.*nonsense",
        ),
    ],
)
def test_wrong_arguments_say_what_is_allowed(make, message):
    with pytest.raises(ConfigurationError, match=message):
        make()


def test_short_names_are_the_classes():
    kinds = {"candlenet": CandleNet, "mlp": MLP, "mnistnet": MNISTNet, "resnet": ResNet, "timm": TimmModel}
    assert sorted(short_names.__all__) == sorted(kinds)
    for name, kind in kinds.items():
        assert issubclass(getattr(short_names, name), kind)
    assert short_names.resnet(depth=20, in_channels=3, input_size=32).feature_dim == 64


def test_channels_that_the_data_do_not_have_are_refused():
    with pytest.raises(ConfigurationError, match=r"in_channels=3.*1 channels"):
        MLP(in_channels=3, input_size=8).adapt(InputSpec(1, 8, 8))


@pytest.mark.parametrize(
    # One number for each way that timm's networks end.
    ("name", "size"),
    [("mobilenetv3_small_050", 64), ("resnet10t", 32), ("vit_tiny_patch16_224", 32), ("efficientvit_m0", 64)],
)
def test_timm_feature_dim_is_the_length_of_the_features(name, size):
    backbone = TimmModel(name, options={"depth": 1} if "vit_tiny" in name else None)
    backbone.adapt(InputSpec(1, size, size))
    assert backbone.eval()(torch.randn(2, 1, size, size)).shape == (2, backbone.feature_dim)


def test_timm_is_the_library_s_own_network():
    import timm

    ours = TimmModel("resnet10t", in_channels=3, img_size=32)
    theirs = timm.create_model("resnet10t", num_classes=7).eval()
    ours.model.load_state_dict({k: v for k, v in theirs.state_dict().items() if not k.startswith("fc.")})
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(theirs.fc(ours.eval()(x)), theirs(x))


def test_without_timm_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ConfigurationError, match=r"pip install 'dcl-lightning\[timm\]'"):
        TimmModel("resnet10t")


NETWORKS = """
from torch import nn

class Mine(nn.Module):
    feature_dim = 5

    def __init__(self, slope: float = 0.1) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(64, 5), nn.LeakyReLU(slope))

    def forward(self, inputs):
        return self.layers(inputs)

class Without(nn.Module):
    pass
"""


def test_any_module_by_its_class_path(tmp_path, monkeypatch, capsys, caplog):
    caplog.set_level("INFO", "lightning.pytorch")
    (tmp_path / "networks_of_mine.py").write_text(NETWORKS)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    flags = ["--trainer.fast_dev_run", "2", "--trainer.accelerator", "cpu"]
    mine = ["--model.backbone", "networks_of_mine.Mine", "--model.backbone.slope", "0.3"]
    assert cli.main(["fit", *mine, *flags]) == 0
    assert "Mine, 385 trained" in caplog.text  # 64 x 5 + 5 parameters of the backbone, 5 x 10 + 10 of the head
    assert cli.main(["fit", "--model.backbone", "networks_of_mine.Without", *flags]) == 2
    assert "backbone Without has no feature_dim" in capsys.readouterr().err

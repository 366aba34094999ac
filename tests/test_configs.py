"""Every file in configs/ parses, round-trips, and learns two tasks through the real reader of its data."""

from __future__ import annotations

import csv
import json
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from dcl_lightning import FineTuning, cli
from dcl_lightning.agents import short_names
from dcl_lightning.backbones import MLP
from dcl_lightning.memory.config import MemorySize
from tests.data import small_sets

ROOT = Path(__file__).parent.parent

# A sweep is no configuration of a fit, and what makes a fit fast on a GPU follows one.
GPU = ROOT / "configs" / "gpu.yaml"
CONFIGS = sorted(p for p in (ROOT / "configs").rglob("*.yaml") if not p.stem.startswith("sweep_") and p != GPU)
REGIMES = ROOT / "configs" / "regimes"
# Protocols of published numbers.
REPRODUCED = ROOT / "configs" / "reproduce"


def read(config: Path) -> dict[str, Any]:
    return yaml.safe_load(config.read_text(encoding="utf-8"))


def print_config(config: Path, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as end:
        cli.main(["fit", "--config", str(config), "--print_config"])
    out, err = capsys.readouterr()
    assert end.value.code == 0, err
    return out


@pytest.mark.parametrize("config", CONFIGS, ids=lambda p: p.stem)
def test_print_config_round_trips(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = print_config(config, capsys)
    if config.parent == REPRODUCED:  # of many that differ in a few values, that they are valid is enough
        assert read(config)["trainer"]["logger"]["init_args"]["name"] == config.stem
        return
    (tmp_path / "printed.yaml").write_text(first)
    assert yaml.safe_load(first) == yaml.safe_load(print_config(tmp_path / "printed.yaml", capsys))
    if config.parent != REGIMES:
        assert read(config)["trainer"]["logger"]["init_args"]["name"] == config.stem


# What writes a data set in its published layout and format, small, and what tells the reader of its being a part.
# Whoever adds a file with another data set adds its writer.
PART = ["--data.source_options", '{"num_classes": 4}']
PART_SMALL = ["--data.source_options", '{"num_classes": 4, "size": 40}']
WRITERS: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "digits": (lambda root: None, []),
    "synthetic": (lambda root: None, []),
    "mnist": (lambda root: small_sets.mnist(root, 40, 20), []),
    "cifar10": (lambda root: small_sets.cifar(root, 10), []),
    "cifar100": (lambda root: small_sets.cifar(root, 100, 200, test_rows=20), []),
    "tinyimagenet": (small_sets.tinyimagenet, PART),
    "imagenet": (small_sets.imagenet, PART_SMALL),
    "imagenet_blurred": (lambda root: small_sets.imagenet(root, "ImageNet_blurred"), PART_SMALL),
    "candle": (lambda root: small_sets.candle(root, rows=16), []),
}
# Of four classes: tasks of two in place of tasks of 250.
FOUR_CLASSES = {"tinyimagenet", "imagenet", "imagenet_blurred"}
# Few steps on few workers' worth of memory; everything else is the file's own.
BATCH = 4
SMALL = ["--data.batch_size", str(BATCH), "--data.num_workers", "0", "--model.epochs_per_task", "1"]
SMALL += ["--trainer.limit_train_batches", "2", "--trainer.accelerator", "cpu", "--trainer.log_every_n_steps", "1"]
# 9.7 million parameters in place of 154.9, a quarter of the channels; one ResNet is as wide as it stands in the file.
NARROW = {"candlenet": ["--model.backbone.filters", "8"], "resnet": ["--model.backbone.width", "16"]}
AS_WIDE_AS_IT_IS = "nil_imagenet_blurred"


def shrunk(config: Path, root: Path) -> list[str]:
    """Write the file's data set below ``root``; return the flags that make two small tasks of it."""
    data = read(config).get("data", {}).get("init_args", {})
    dataset = data.get("dataset", "digits")
    write, flags = WRITERS[dataset]
    write(root)
    if data.get("scenario", "class") == "class" and dataset in FOUR_CLASSES:
        flags = [*flags, "--data.increment", "2"]
    model = read(config)["model"]["init_args"]
    backbone = model.get("backbone", "mlp")
    name = backbone if isinstance(backbone, str) else backbone["class_path"]
    wide = isinstance(backbone, str) or backbone["init_args"].get("width", 64) > 20
    if wide and config.stem != AS_WIDE_AS_IT_IS:
        flags = [*flags, *NARROW.get(name, [])]
    # Few images have no tenth.
    flags = [*flags, *(["--data.val_ratio", "0.5"] if data.get("val_ratio") else [])]
    # The rate follows the size of the batch, as it has to: iCaRL's of 2.0 is one for 128 images.
    if "lr" in model:  # else steps train nothing
        flags = [*flags, "--model.lr", str(model["lr"] * BATCH / data.get("batch_size", 64))]
    # Two tasks of two steps each.
    return [*SMALL, *flags, "--trainer.max_steps", "4"]


def run_here(config: Path, flags: list[str], tmp_path: Path, version: int = 0) -> dict[str, Any]:
    """Fit in this process; return the report, once the losses are numbers and the last state is there."""
    assert cli.main(["fit", "--config", str(config), *flags]) == 0
    name = "dcl" if config.parent == REGIMES else config.stem
    folder = tmp_path / "runs" / name / f"version_{version}"
    with (folder / "metrics.csv").open() as file:
        losses = [float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]]
    report = json.loads((folder / "report" / "accuracy_matrix.json").read_text())
    assert len(losses) == report["optimizer_steps"]
    assert all(map(math.isfinite, losses))
    assert (folder / "checkpoints" / "last.ckpt").exists()
    shutil.rmtree(folder / "checkpoints")  # pytest keeps folders, and these are large
    return report


def without_other_sizes() -> list[Path]:
    """Return the files without those of published numbers whose agent has the words and switches of another one."""
    kinds: dict[str, Path] = {}
    for config in CONFIGS:
        content = read(config)
        model, data = content["model"], content.get("data", {}).get("init_args", {})
        words = {key: value for key, value in model["init_args"].items() if isinstance(value, (str, bool))}
        kind = f"{model.get('class_path')}, {data.get('scenario')}, {words}"
        kinds.setdefault(kind if config.parent == REPRODUCED else config.stem, config)
    return [*kinds.values()]


# Of the published protocols the ordinary suite only checks that they are valid; benchmarks/reproduce.py runs them.
RUN = [
    pytest.param(config, id=config.stem, marks=[pytest.mark.exhaustive] if config.parent == REPRODUCED else [])
    for config in without_other_sizes()
]


@pytest.mark.parametrize("config", RUN)
def test_two_tasks_of_a_few_steps(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    flags = shrunk(config, tmp_path / "datasets")
    report = run_here(config, flags, tmp_path)
    if read(config).get("data", {}).get("init_args", {}).get("scenario") == "none":
        # One task, as the file has it; then the same as a stream of two, but for an agent that takes no stream.
        assert len(report["matrix"]) == 1
        if read(config)["model"]["class_path"] == "joint":
            return
        half = sum(map(len, report["task_classes"])) // 2
        flags += ["--data.scenario", "class", "--data.increment", str(half)]
        report = run_here(config, flags, tmp_path, version=1)
    assert report["optimizer_steps"] == 4
    assert [sum(value is not None for value in row) for row in report["matrix"][:2]] == [1, 2]


def test_every_file_that_the_documents_name_is_there() -> None:
    files = {config.name for config in CONFIGS}
    for page in (ROOT / "README.md", ROOT / "docs" / "from_the_original.md", ROOT / "docs" / "data.md"):
        named = set(re.findall(r"\b[a-z0-9_]+\.yaml", page.read_text(encoding="utf-8"))) - {"config.yaml"}
        assert named <= files, page.name
        if page.stem == "from_the_original":
            # One for each of the nine example commands; the three baselines besides.
            assert (
                len(re.findall(r"^\| `--model \w+.*\.yaml` \|$", page.read_text(encoding="utf-8"), re.MULTILINE)) == 9
            )


@pytest.mark.exhaustive
def test_a_config_of_many_workers_on_two(tmp_path: Path) -> None:
    config = ROOT / "configs" / f"{AS_WIDE_AS_IT_IS}.yaml"
    flags = [*shrunk(config, tmp_path / "datasets"), *NARROW["resnet"], "--trainer.strategy", "horovod"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "cli.py"), "fit", "--config", str(config), *flags, "--trainer.devices", "2"],
        cwd=tmp_path, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "runs" / config.stem / "version_0/report/accuracy_matrix.json").read_text())
    assert (report["world_size"], report["optimizer_steps"]) == (2, 4)
    assert [sum(value is not None for value in row) for row in report["matrix"]] == [1, 2]
    # From the second step on: seven from both memories for each worker, as far as there are so many.
    assert report["samples_seen"]["rehearsed"] > 0


# -- regimes ---------------------------------------------------------------------------------------------------

# Epoch of a task after warm-up: factor of the rate of N workers; worked out by hand from the programs' own tables.
PHASES = {
    "constant": {0: 1, 500: 1},
    "cifar": {0: 1, 80: 1, 81: 0.1, 121: 0.1, 122: 0.01, 163: 0.01, 164: 0.001, 500: 0.001},
    "imagenet": {5: 1, 29: 1, 30: 0.1, 44: 0.1, 45: 0.01, 79: 0.01, 80: 0.001, 89: 0.001},
    "imagenet_30_epochs": {5: 1, 20: 1, 21: 0.5, 25: 0.5, 26: 0.05, 27: 0.05, 28: 0.01, 29: 0.01},
}
# One worker's rate; what it is multiplied with on 4 and on 128 workers; momentum; weight decay, and that of biases.
VALUES = {
    "constant": (0.01, 4, 128, 0.5, 0, 0),
    "cifar": (0.1, 1, 1, 0.9, 1e-4, 0),
    "imagenet": (0.01, 4, 128, 0.9, 1e-5, 0),
    "imagenet_30_epochs": (0.0125, 4, 64, 0.9, 5e-5, 5e-5),
}
STEPS = 5


@pytest.mark.parametrize("workers", [1, 4, 128])
@pytest.mark.parametrize("name", PHASES)
def test_rates_and_decays_of_the_regimes(name: str, workers: int) -> None:
    agent = FineTuning(MLP(in_channels=1, input_size=8), 10, **read(REGIMES / f"{name}.yaml")["model"]["init_args"])
    agent._trainer = SimpleNamespace(world_size=workers, num_training_batches=STEPS, accumulate_grad_batches=1)
    optimizer = agent.configure_optimizers()["optimizer"]
    lr, four, many, momentum, decay, decay_of_biases = VALUES[name]
    rate = lr * {1: 1, 4: four, 128: many}[workers]

    def rate_at(epoch: int, step: int) -> float:
        group = optimizer.param_groups[0]  # of a constant rate, without a schedule
        return group.get("initial_lr", group["lr"]) * agent._factor(epoch * STEPS + step)

    for epoch, factor in PHASES[name].items():
        for step in (0, STEPS - 1):
            assert rate_at(epoch, step) == pytest.approx(rate * factor)
    if min(PHASES[name]) == 5:
        # Goyal et al. 2017: from one worker's rate to that of all, by the epoch and the step within it.
        for epoch in range(5):
            for step in range(STEPS):
                progress = (epoch + (step + 1) / STEPS) / 5
                assert rate_at(epoch, step) == pytest.approx(lr + (rate - lr) * progress)
    decays = {p.ndim > 1: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decays == {True: decay, False: decay_of_biases}
    assert optimizer.defaults["momentum"] == momentum


@pytest.mark.parametrize(
    ("regime", "files"),
    [
        ("constant", ["joint_mnist", "base_mnist", "base_candle"]),
        ("cifar", ["joint_cifar10", "joint_cifar100", "nil_cifar100"]),
        ("cifar", ["base_cifar10", "transfer_cifar10", "scratch_cifar10"]),
        ("imagenet", ["joint_tinyimagenet"]),
        ("imagenet_30_epochs", [f"{kind}_imagenet_blurred" for kind in ("nil", "base", "transfer", "scratch")]),
    ],
)
def test_files_have_the_regime_of_their_network(regime: str, files: list[str]) -> None:
    values = read(REGIMES / f"{regime}.yaml")["model"]["init_args"]
    for file in files:
        assert values.items() <= read(ROOT / "configs" / f"{file}.yaml")["model"]["init_args"].items(), file


def test_a_regime_follows_any_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--config", str(ROOT / "configs/nil_digits.yaml"), "--config", str(REGIMES / "cifar.yaml")]
    with pytest.raises(SystemExit):
        cli.main(["fit", *flags, "--print_config"])
    model = yaml.safe_load(capsys.readouterr().out)["model"]
    assert model["class_path"].endswith("nil_v1")
    assert (model["init_args"]["milestones"], model["init_args"]["lr"]) == ([81, 122, 164], 0.1)
    assert model["init_args"]["rehearsal"]["buffer_size"] == 200


@pytest.mark.parametrize("path", [path for path in CONFIGS if path.parent != REPRODUCED], ids=lambda path: path.stem)
def test_files_say_of_the_memory_only_what_differs_from_the_agents_own(path: Path) -> None:
    model = read(path).get("model", {})
    given = model.get("init_args", {}).get("rehearsal", {})
    own = getattr(getattr(short_names, str(model.get("class_path")), None), "memory", MemorySize())
    assert not given.items() & own.explicit.items()


def test_nil_on_imagenet_is_the_published_run() -> None:
    config = read(ROOT / "configs" / "nil_imagenet_blurred.yaml")
    model, data = config["model"]["init_args"], config["data"]["init_args"]
    assert (data["increment"], data["batch_size"], model["backbone"]["init_args"]) == (250, 56, {"depth": 50})
    wanted = {
        "rehearsal_ratio": 0.3, "num_candidates": 14, "num_samples": 7, "policy": "class_balanced",
        "scope": "global", "execution": "blocking",
    }  # fmt: skip
    agent = short_names.nil_global(MLP([4], 1, 4), 4, model["rehearsal"])
    assert wanted.items() <= asdict(agent.rehearsal.config).items()
    assert config["trainer"]["precision"] == "bf16-mixed"
    shared = {key: value for key, value in model.items() if key != "rehearsal"}
    for twin in ("base", "transfer", "scratch"):
        other = read(ROOT / "configs" / f"{twin}_imagenet_blurred.yaml")
        own = {"reset_state_dict": True} if twin == "scratch" else {}
        assert other["model"]["init_args"] == shared | own
        assert other["data"]["init_args"] == data | ({} if twin == "base" else {"concatenate_tasksets": True})
        assert other["trainer"]["precision"] == "bf16-mixed"


# -- what follows any configuration ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["icarl_digits", "icarl_cifar100"])
def test_what_is_fast_on_a_gpu_changes_how_a_fit_computes_and_nothing_else(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = ROOT / "configs" / f"{name}.yaml"
    plain = yaml.safe_load(print_config(config, capsys))
    with pytest.raises(SystemExit):
        cli.main(["fit", "--config", str(config), "--config", str(GPU), "--print_config"])
    fast = yaml.safe_load(capsys.readouterr().out)
    expected = {"accelerator": "gpu", "devices": 1, "precision": "bf16-mixed", "benchmark": True}
    assert plain["model"]["init_args"].pop("compile") is False
    assert fast["model"]["init_args"].pop("compile") == "default"
    assert fast["trainer"] == plain["trainer"] | expected
    assert {key: value for key, value in fast.items() if key != "trainer"} == {
        key: value for key, value in plain.items() if key != "trainer"
    }


def test_a_dict_of_arguments_for_the_compiler_comes_through_the_command_line(tmp_path: Path) -> None:
    flags = ["--model", "base", "--data.dataset", "digits", "--data.increment", "5", "--trainer.max_steps", "2"]
    flags += ["--model.compile", "{backend: eager, dynamic: true}", "--trainer.logger.save_dir", str(tmp_path / "runs")]
    assert cli.main(["fit", *flags, "--trainer.accelerator", "cpu"]) == 0

"""Benchmarks run, all sides do the same work, and a failing one is named; no test asserts a time."""

from __future__ import annotations

import copy
import importlib
import importlib.metadata
import json
import logging
import random
import re
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import convnet
import end_to_end
import gpu_day
import peers
import plain
import protocol
import pytest
import results
import scale
import search
import torch
from common import quiet_trainer

from dcl_lightning import ContinualDataModule, FineTuning, ICaRL
from dcl_lightning.backbones import MLP, ResNet
from dcl_lightning.functional.losses import nil_weights
from dcl_lightning.memory.exchange import plan_draws, plan_of

run_all = importlib.import_module("all")


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    """Benchmarks set these for a process of their own."""
    logger, threads = logging.getLogger("lightning.pytorch"), torch.get_num_threads()
    level = logger.level
    torch.set_num_threads(1)
    yield
    logger.setLevel(level)
    torch.set_num_threads(threads)


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small networks and one thread for ``convnet``: several wait for each other where other tests use the cores."""
    for sides in (convnet.Online, convnet.Exemplars):
        monkeypatch.setattr(sides, "backbone", lambda self: ResNet(20, width=4))
    monkeypatch.setattr(convnet, "THREADS", (1,))


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize(
    ("name", "options", "count"),
    [
        ("convnet", ["--rounds", "1"], 6),
        ("cost", [], 6),
        # The steps of the residual network are those of the perceptron, and take a minute.
        ("end_to_end", ["--only", "mcsb"], 13),
        ("scale", ["--images-per-s", "1000"], 6),
        ("time_to_accuracy", ["--increment", "5"], 9),
    ],
)
def test_a_quick_run_writes_its_rows(
    name: str, options: list[str], count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    file = tmp_path / "rows.json"
    monkeypatch.setattr(sys, "argv", [name, "--quick", "--json", str(file), *options])
    monkeypatch.setattr(end_to_end, "has_avalanche", lambda: False)
    importlib.import_module(name).main()
    rows = json.loads(file.read_text())
    assert len({row["name"] for row in rows}) == count
    assert all(row["value"] > 0 and row["ratio"] > 0 and row["unit"] for row in rows)
    printed = capsys.readouterr().out
    assert all(f"| {row['name']} | " in printed for row in rows)


def test_the_parts_for_a_gpu_name_what_there_is(tmp_path: Path) -> None:
    for part in gpu_day.parts(tmp_path):
        for command in (*part.commands, *part.small):
            files = [word for word in command if word.endswith((".py", ".yaml"))]
            assert files
            assert all((gpu_day.ROOT / file).is_file() for file in files), part.name


def test_a_part_for_a_gpu_ends_at_its_limit_and_leaves_what_it_has_found(tmp_path: Path) -> None:
    says = "print('found', flush=True); import time; time.sleep(60)"
    part = gpu_day.Part("slow", 5, [["-c", says], ["-c", "raise SystemExit(3)"]], [])
    shown = gpu_day.show(part, tmp_path, 6, small=False)
    assert shown["codes"] == [-15, 3]
    assert shown["seconds"] < 30
    assert (tmp_path / "slow-0.log").read_text() == "found\n"


def test_the_sides_of_a_step_train_to_the_same_weights(tmp_path: Path) -> None:
    data = end_to_end.one_task(6)
    batches = end_to_end.made(data)
    agent = FineTuning(MLP(), data.num_classes, input_spec=data.input_spec, lr=plain.LR)
    before = torch.nn.utils.parameters_to_vector(agent.parameters()).clone()
    networks = [torch.nn.Sequential(*copy.deepcopy([agent.backbone, agent.head])) for _ in range(2)]
    quiet_trainer(str(tmp_path)).fit(agent, datamodule=data)
    plain.by_hand(networks[0], end_to_end.cropped, [batches], None)
    module = plain.Plain(networks[1], end_to_end.cropped, [batches], None)
    quiet_trainer(str(tmp_path), max_epochs=1).fit(module)
    ours = torch.nn.utils.parameters_to_vector(agent.parameters())
    assert (ours - before).abs().max() > 1e-3
    for network in networks:
        torch.testing.assert_close(torch.nn.utils.parameters_to_vector(network.parameters()), ours)


def test_the_memory_by_hand_keeps_its_labels_and_weighs_as_ours() -> None:
    torch.manual_seed(0)
    memory = plain.Memory(torch.zeros(1, 1), stored=30, classes=3)
    assert len(memory.draw()[1]) == 0
    for _ in range(40):
        targets = torch.randint(3, (plain.NEW,))
        memory.add(targets[:, None].float(), targets)
    assert memory.size == 30
    rows, labels, weights, slots = memory.draw()
    assert len(slots.unique()) == 30
    assert rows[:, 0].tolist() == labels.tolist()
    assert int(memory.offered.sum()) == 40 * plain.CANDIDATES
    expected = nil_weights(memory.offered, labels, 30, plain.NEW, plain.CANDIDATES)
    assert expected.max() > 1
    torch.testing.assert_close(weights, expected)


# -- convolutional networks ------------------------------------------------------------------------


def test_icarl_by_hand_learns_what_ours_learns(tmp_path: Path) -> None:
    """One batch an epoch: the order of its samples is the only difference, and the crops are of the same draws."""
    data = convnet.read(convnet.SMALL.icarl, str(tmp_path), batch_size=64)
    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-3}
    common = {"num_classes": data.num_classes, "input_spec": data.input_spec, "epochs_per_task": 2, "nme_flip": True}
    agent = ICaRL(ResNet(20, width=4), rehearsal={"buffer_size": 8}, **common, **options)
    before = torch.nn.utils.parameters_to_vector(agent.parameters()).clone()
    network = torch.nn.Sequential(*copy.deepcopy([agent.backbone, agent.head]))
    rehearsed = convnet.Counted(agent.backbone), convnet.Counted(network[0])
    quiet_trainer(str(tmp_path)).fit(agent, datamodule=data)
    accuracy = plain.icarl_by_hand(network, data, 2, 8, partial(torch.optim.SGD, **options))
    # 20 images and, in the second task, 4 of each of 2 classes, for 2 epochs.
    assert [counted.images for counted in rehearsed] == [2 * (20 + 28)] * 2
    ours, theirs = (
        torch.nn.utils.parameters_to_vector([*part[0].parameters(), *part[1].parameters()])
        for part in ((agent.backbone, agent.head), network)
    )
    assert (ours - before[: len(ours)]).abs().max() > 1e-2
    torch.testing.assert_close(theirs, ours, rtol=1e-3, atol=1e-3)
    assert accuracy == pytest.approx(float(agent.clock.matrix.pooled[-1]))


def test_the_reservoir_by_hand_keeps_each_row_as_often() -> None:
    random.seed(0)
    torch.manual_seed(0)
    kept, runs = torch.zeros(6), 600
    for _ in range(runs):
        reservoir = plain.Reservoir(torch.zeros(1, 1), stored=2, drawn=5)
        assert len(reservoir.draw()[1]) == 0
        for targets in torch.arange(6).split(3):
            reservoir.add(targets[:, None].float(), targets)
        rows, labels, weights, slots = reservoir.draw()
        assert rows[:, 0].tolist() == labels.tolist()
        assert weights.tolist() == [1.0, 1.0]
        assert sorted(slots.tolist()) == [0, 1]
        kept[labels] += 1
    # Each with probability 1/3: 200 with a deviation of 11.5.
    assert (kept - runs / 3).abs().max() < 50


@pytest.mark.usefixtures("narrow")
def test_images_of_workers_are_as_many(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The side that runs on a GPU only."""
    monkeypatch.setattr(convnet, "WORKERS", 0)
    setting, images = convnet.Setting(1, "contiguous"), convnet.SMALL.online._replace(per_class=5)
    online = convnet.Online(convnet.read(images, str(tmp_path), convnet.NEW), images.stored)
    monkeypatch.setattr(convnet, "present", lambda *sides: {"workers": sides[-1]})
    assert online.rates(setting)["workers"]() > 0  # which refuses other numbers
    exemplars = convnet.Exemplars(convnet.read(images, str(tmp_path), convnet.BATCH), 4, epochs=1)
    network = setting.network(exemplars.backbone(), exemplars.data)
    counted = convnet.Counted(network[0])
    assert 0 <= exemplars.one_by_one(setting, network) <= 1
    assert counted.images == 10 + 10 + 4


def test_the_target_of_steps_is_that_of_the_fastest_order(capsys: pytest.CaptureFixture[str]) -> None:
    orders = [convnet.Setting(1, order) for order in convnet.ORDERS]
    milliseconds = dict(zip(orders, (3.0, 2.0), strict=True))
    rows = convnet.rows_of(
        "step", "ms", [orders], 2,
        lambda setting: {"ours": lambda: 4.0, "loop": lambda: milliseconds[setting]},
        {"loop": "<= 1.05"}, of_the_fastest="loop",
    )  # fmt: skip
    assert [row["ratio"] for row in rows] == [pytest.approx(4 / 3), 2.0]
    slow, fast = capsys.readouterr().out.splitlines()
    assert "| reported |" in slow
    assert "channels_last" in fast
    assert "| <= 1.05 |" in fast


def test_avalanche_as_it_comes_meets_ours_as_it_comes(capsys: pytest.CaptureFixture[str]) -> None:
    orders = [convnet.Setting(1, order) for order in convnet.ORDERS]
    ours, theirs = ({order: value[k] for k, order in enumerate(orders)} for value in ((30.0, 40.0), (20.0, 25.0)))
    rows = convnet.rows_of(
        "fit", "images/s", [orders], 2,
        lambda setting: {"ours": lambda: ours[setting], convnet.AVALANCHE: lambda: theirs[setting]},
        {convnet.AVALANCHE: ">= 1.5"},
    )  # fmt: skip
    assert [row["ratio"] for row in rows] == [2.0, pytest.approx(1.6)]
    as_they_come, in_one_order = capsys.readouterr().out.splitlines()
    assert "ours over Avalanche in its contiguous | 40.000" in as_they_come
    assert "| >= 1.5 |" in as_they_come
    assert "| reported |" in in_one_order


def test_what_convnet_lacks_is_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(end_to_end, "has_avalanche", lambda: False)
    monkeypatch.setattr(sys, "argv", ["convnet", "--root", str(tmp_path)])
    convnet.main()
    printed = capsys.readouterr().out
    assert all(f"Left out ({part}): " in printed for part in "fsi")
    assert "cifar100" in printed
    assert "Avalanche is not installed" in printed
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["convnet", "--gpu"])
    with pytest.raises(SystemExit, match="2"):
        convnet.main()
    assert "--gpu needs a GPU" in capsys.readouterr().err


NETWORK = scale.Network(spread=0.0, latency=0.001, bandwidth=1000.0, classes=0)


@pytest.mark.parametrize(
    ("costs", "expected"),
    [
        # A third is forward; a ring of 4 workers has 6 messages of 1 ms, and 6 parts of 100 / 4 bytes.
        (scale.Costs(), 0.1 + 6 * (0.001 + 0.025)),
        (scale.Costs(rows=0.09), 0.1 + 6 * (0.001 + 0.025)),  # there before the gradients begin
        (scale.Costs(rows=0.15), 0.15 + 6 * (0.001 + 0.025)),
        (scale.Costs(plan=0.05, messages=0.02, headers=0.05), 0.12 + 6 * (0.001 + 0.025)),
        (scale.Costs(memory=0.4), 0.4),
    ],
)
def test_a_simulated_step_by_hand(costs: scale.Costs, expected: float) -> None:
    assert scale.step_seconds(0.3, 4, 100, NETWORK, costs) == pytest.approx(max(expected, 0.3))


def test_simulated_workers_send_what_the_plan_says() -> None:
    sizes, step = [50] * 6, 3
    draws = plan_draws(sizes, scale.DRAWN, 0, step)
    sent = [len(plan_of(rank, sizes, draws).positions) for rank in range(6)]
    assert scale.most_sent(6, 50, step) == max(sent)
    assert sum(sent) == 6 * scale.DRAWN


def test_rehearsal_is_seen_first_where_its_messages_are_many() -> None:
    seen = scale.first_seen(
        lambda workers: scale.simulate(workers, (1000, 2), NETWORK._replace(bandwidth=1e12), 0.0, 0.0, 2, 50)
    )
    # b + r images take 63 ms, forward 21 of them, and a message 1 ms: the ring is seen from 32 on, the exchange then.
    assert seen == (32, "messages")


def test_one_that_fails_is_named_and_the_others_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    head, main = '"""{}\n\nMore."""\nimport os, sys\n', "\ndef main():\n    {}\nmain()\n"
    scripts = {
        "a": head.format("First.") + main.format("print(sys.argv[1:])") + 'KNOWN = "--quick"\n',
        "b": head.format("Second.")
        + main.format("print('| x |\\n|---|\\n| 1 |\\nbelow', flush=True); sys.exit('broken')"),
        "c": head.format("Third.") + main.format("os.kill(os.getpid(), 9)"),
        "d": head.format("Fourth.") + main.format("print(sys.argv[1:], 'the last')"),
        "helper": "raise RuntimeError\n",
        "protocol": main.format("raise RuntimeError"),
    }
    for name, text in scripts.items():
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.setattr(sys, "argv", ["all.py", "--quick"])
    assert run_all.main(tmp_path) == 1
    text = (tmp_path / "RESULTS.md").read_text()
    assert [line for line in text.splitlines() if line.startswith("## ")] == [f"## {name}.py" for name in "abcd"]
    assert re.search(r"First.\n\n`python benchmarks/a.py --quick`, .* UTC, .*\n\n\['--quick'\]\n", text)
    assert "| x |\n|---|\n| 1 |\n\nbelow\n\n**Failed** with exit code 1: `broken`\n" in text
    assert "**Failed** with exit code 137" in text
    assert re.search(r"`python benchmarks/d.py`, .*\n\n\[\] the last\n", text)
    versions = f"torch {importlib.metadata.version('torch')}, lightning {importlib.metadata.version('lightning')}"
    assert all(word in text for word in ("cores", "GiB", "python 3", versions, " UTC", *run_all.LONG))

    monkeypatch.setattr(sys, "argv", ["all.py", "--only", "d.py"])
    (tmp_path / "d.py").write_text(head.format("Anew.") + main.format("print('measured anew')"))
    assert run_all.main(tmp_path) == 0
    anew = (tmp_path / "RESULTS.md").read_text()
    before, after = text.split("## d.py")[0], "measured anew\n"
    assert anew.startswith(before)
    assert anew.endswith(after)


# -- results ---------------------------------------------------------------------------------------


def test_peers_stand_beside_cases_that_there_are() -> None:
    assert set(peers.cases()) <= set(protocol.CASES)


def test_the_page_of_results_has_ours_a_peer_and_two_workers_seed_by_seed() -> None:
    def rows(*finals: float) -> results.Rows:
        common = {"incremental": 95.0, "forgetting": None, "train_s": 1.0, "peak_mib": 900.0}
        return [common | {"seed": 100 + k, "final": final} for k, final in enumerate(finals)]

    one, two = "derpp, 50 stored", "derpp, 50 stored, two workers"
    digits = {one: rows(90.0, 92.0), two: rows(91.0, 94.0), "joint": rows(95.0)}
    found = {"derpp, factors": {f"alpha 1.0, beta 1.0, {size} stored": [88.0, 90.0] for size in (50, 200)}}
    page = results.page({"digits": digits}, {"digits": {one: [80.0, 82.0]}}, found, "The published numbers.\n\n")
    assert page.index("The published numbers.") < page.index("## The quick check") < page.index("## Digits")
    beside = "81.0 ± 1.4 (Avalanche, 2): +10.0 [+10.0, +10.0]; 85.3 (Mammoth)"
    assert f"| `derpp` | 50 | 91.0 ± 1.4 | 95.0 ± 0.0 |  | +4.0 | 1.0 ± 0.0 | 900 | 2 | {beside} |" in page
    # Differences 1 and 2; Student's t with one degree of freedom at 95 % is 6.314.
    half = 6.314 * 0.5
    assert (
        f"| `derpp, two workers` | 50 | 92.5 ± 2.1 | 95.0 ± 0.0 | +1.5 [{1.5 - half:+.1f}, {1.5 + half:+.1f}] | 2 |"
        in page
    )
    assert "`joint`" in page
    assert "| `derpp, factors` | alpha 1.0, beta 1.0 | 89.0 ± 1.4 | 89.0 ± 1.4 | yes | 2 |" in page
    assert "alpha 0.5" not in page


def test_what_the_cases_have_is_among_the_candidates() -> None:
    builds = search.candidates()
    assert all(any(choice in choices for choices in builds.values()) for choice in search.CHOSEN)
    assert set(builds) == {
        "nil", "er of the tasks' ends, sum", "derpp_task_end", "der, factors", "derpp, factors",
        "derpp_task_end, factors",
    }  # fmt: skip
    data = ContinualDataModule("digits_dev", increment=2, batch_size=16)
    for name, case in (("nil", "nil, 50 stored, tuned"), ("derpp_task_end", "derpp_task_end, tuned, 50 stored")):
        ours, theirs = (made.build(data) for made in (builds[name][search.CHOSEN[0]](50), protocol.CASES[case]))
        assert (ours.lr, ours.momentum, ours.rehearsal.config) == (theirs.lr, theirs.momentum, theirs.rehearsal.config)


def test_on_other_data_nothing_is_called_tuned() -> None:
    ours = [case for case in protocol.CASES if results.is_of(case, "mnist5k")]
    assert "derpp, 50 stored" in ours
    assert not [case for case in ours if "tuned" in case or protocol.CASES[case].workers > 1]

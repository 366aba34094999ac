"""The engine: order, failures, no thread left behind."""

from __future__ import annotations

import threading
import time

import pytest

from dcl_lightning.memory.prefetch import MemoryEngine


@pytest.mark.parametrize("background", [False, True])
def test_results_come_in_order(background: bool) -> None:
    engine: MemoryEngine[int] = MemoryEngine(background)
    for value in range(5):
        engine.submit(lambda value=value: value)
        assert engine.collect() == value
    engine.submit(lambda: 7)
    engine.submit(lambda: 8)
    assert engine.flush() == 8
    assert engine.collect() is None
    engine.close()


@pytest.mark.parametrize("background", [False, True])
def test_failure_surfaces_with_its_own_traceback(background: bool) -> None:
    def fail() -> int:
        raise RuntimeError("the memory is broken")

    engine: MemoryEngine[int] = MemoryEngine(background)
    engine.submit(fail)
    with pytest.raises(RuntimeError, match="broken") as error:
        engine.collect()
    assert any(entry.name == "fail" for entry in error.traceback)
    engine.close()


def test_latest_never_waits_and_tells_its_age() -> None:
    engine: MemoryEngine[int] = MemoryEngine(True)
    gate = threading.Event()
    engine.submit(lambda: 1)
    time.sleep(0.1)
    assert (engine.latest(), engine.staleness) == (1, 0)
    engine.submit(lambda: 2 if gate.wait(5) else 0)
    assert (engine.latest(), engine.staleness) == (1, 1)
    assert (engine.latest(), engine.staleness) == (1, 2)
    gate.set()
    time.sleep(0.1)
    assert (engine.latest(), engine.staleness) == (2, 0)
    engine.close()


def test_a_job_that_waits_for_ever_does_not_keep_the_engine_from_closing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dcl_lightning.memory.prefetch._CLOSE_TIMEOUT_S", 0.2)
    engine: MemoryEngine[bool] = MemoryEngine(True)
    gate = threading.Event()
    engine.submit(gate.wait)
    thread = engine._thread
    started = time.monotonic()
    engine.close()
    assert time.monotonic() - started < 5
    gate.set()
    thread.join(10)
    assert not thread.is_alive()


def test_a_hundred_engines_leave_no_thread() -> None:
    before = threading.active_count()
    for _ in range(100):
        engine: MemoryEngine[int] = MemoryEngine(True)
        engine.submit(lambda: 1)
        engine.close()
    assert threading.active_count() == before

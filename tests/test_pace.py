"""Pace: a call takes several decode steps only if the host would hold up the device."""

import contextlib
from types import SimpleNamespace

import pytest

from nanovllm_jax.engine import pace
from nanovllm_jax.engine.pace import Pace
from nanovllm_jax.engine.scheduler import Batch


class Clock:
    """A clock that goes on when it is told to."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(pace.time, "perf_counter", lambda: self.now)

    def during(self, context, seconds):
        with context:
            self.now += seconds


@pytest.fixture
def clock(monkeypatch):
    monkeypatch.setattr(pace, "MOST_LOAD", {"cpu": 0.0, "gpu": 0.75})
    return Clock(monkeypatch)


def make(platform="gpu", steps=4, eager=False):
    return Pace(SimpleNamespace(enforce_eager=eager, num_scheduler_steps=steps), platform)


def run(clock, pace, *, step, dispatch, each_round, calls=100):
    """Run calls of as many steps as the pace says: times of a step, a dispatch and a round, in ms.

    The device computes the next call while the host dispatches the one behind it and hands out the
    tokens of the one before it.
    """
    sizes = []
    for _ in range(calls):
        steps = pace.num_steps
        clock.during(pace.dispatching(), dispatch)
        clock.during(contextlib.nullcontext(), steps * each_round)
        left = max(0, steps * step - dispatch - steps * each_round)
        clock.during(pace.waiting(Batch.empty(num_steps=steps)), left)
        sizes.append(steps)
    return sizes


def test_a_quick_host_gives_single_steps(clock):
    pace = make()
    sizes = run(clock, pace, step=2.0, dispatch=0.5, each_round=0.1)
    assert sizes[0] == 4 and sizes[-50:] == [1] * 50
    assert pace.load == pytest.approx(0.3, abs=0.01)


def test_a_slow_host_gives_calls_of_several_steps(clock):
    pace = make()
    sizes = run(clock, pace, step=1.3, dispatch=2.5, each_round=0.1)
    assert sizes == [4] * 100
    assert pace.load == pytest.approx(2.6 / 1.3, abs=0.05), "as if calls were single steps"


def test_the_load_is_the_same_whatever_the_size_of_calls(clock):
    loads = []
    for steps in (1, 2, 8):
        pace = make(steps=steps)
        pace.most_load = -1.0
        run(clock, pace, step=1.0, dispatch=0.5, each_round=0.05)
        loads.append(pace.load)
    assert loads == pytest.approx([0.55] * 3, abs=0.01)


def test_it_follows_what_changes(clock):
    pace = make()
    run(clock, pace, step=2.0, dispatch=0.5, each_round=0.1)
    assert run(clock, pace, step=0.6, dispatch=0.5, each_round=0.1)[-1] == 4
    assert run(clock, pace, step=2.0, dispatch=0.5, each_round=0.1)[-1] == 1


def test_a_prefill_says_nothing(clock):
    pace = make()
    for _ in range(20):
        clock.during(pace.dispatching(), 30)
        clock.during(pace.waiting(Batch.empty(is_prefill=True)), 0)
        clock.during(pace.waiting(Batch.empty()), 1)  # it began with the prefill
    assert pace.load == 1.0


def test_a_cpu_always_takes_several_steps(clock):
    """It is host and device at once."""
    sizes = run(clock, make("cpu"), step=2.0, dispatch=0.1, each_round=0.1)
    assert sizes == [4] * 100


def test_one_step_where_there_is_no_program_for_more(clock):
    assert make(steps=1).num_steps == make(eager=True).num_steps == 1

"""When an executor counts as lost: pure looks at heartbeats and clocks."""

from __future__ import annotations

import pytest

from common.fleet import Fleet
from common.messages import Beat, ServiceState
from services.gateway.executor_watch import CHECK_PERIOD_S, ExecutorWatch


class Recorder:
    """A stream that only counts."""

    def __init__(self, executor_id: str, admitted_at: float) -> None:
        self.executor_id = executor_id
        self.admitted_at = admitted_at
        self.num_lost = 0

    def lose_executor(self) -> None:
        self.num_lost += 1


def heard(executor_id: str, state: ServiceState = "ready") -> Beat:
    return Beat(role="executor", instance_id=executor_id, state=state, sent_at=0.0, period_s=1.0)


def test_only_silent_executors_are_lost() -> None:
    watch = ExecutorWatch(Fleet(), heartbeat_s=1.0)
    silent, alive, fresh, unplaced = (Recorder(name, at) for name, at in (("a", 0.0), ("b", 0.0), ("c", 9.0), ("", 0.0)))
    for stream in (silent, alive, fresh, unplaced):
        watch.add(stream)
    watch.observe(heard("a"), 5.0)
    watch.observe(heard("b"), 8.0)
    watch.look(10.0, is_connected=True, since_last_s=CHECK_PERIOD_S)
    assert [stream.num_lost for stream in (silent, alive, fresh, unplaced)] == [1, 0, 0, 0]


@pytest.mark.parametrize(("is_connected", "since_last_s"), [(False, CHECK_PERIOD_S), (True, 60.0)])
def test_a_gateway_that_heard_nobody_blames_nobody(is_connected: bool, since_last_s: float) -> None:
    watch = ExecutorWatch(Fleet(), heartbeat_s=1.0)
    stream = Recorder("a", 0.0)
    watch.add(stream)
    watch.observe(heard("a"), 0.0)
    watch.look(100.0, is_connected=is_connected, since_last_s=since_last_s)
    watch.look(102.0, is_connected=True, since_last_s=CHECK_PERIOD_S)
    assert stream.num_lost == 0
    watch.look(103.5, is_connected=True, since_last_s=CHECK_PERIOD_S)
    assert stream.num_lost == 1


def test_a_starting_executor_has_forgotten_its_requests() -> None:
    watch = ExecutorWatch(Fleet(), heartbeat_s=1.0)
    mine, other = Recorder("a", 0.0), Recorder("b", 0.0)
    watch.add(mine)
    watch.add(other)
    watch.observe(heard("a", "starting"), 1.0)
    assert (mine.num_lost, other.num_lost) == (1, 0)
    assert not watch.is_ready("a", 1.0)

"""The queue is fair and bounded; results are kept as long as configured."""

from __future__ import annotations

import asyncio
import time
from types import SimpleNamespace

import pytest

from fastface_cli.errors import UsageError
from fastface_cli.server.fair_queue import FairQueue
from fastface_cli.server.limits import Limits, parse_keep
from fastface_cli.server.runs import BusyError, MissingError, Person, Registry, ServedRun
from fastface_cli.server.schema import RunBody


def run(client: str = "a") -> ServedRun:
    return ServedRun(RunBody(prompts=("x",)), SimpleNamespace(), SimpleNamespace(name="r"), client, Person())


def test_clients_take_turns():
    queue = FairQueue(9)
    runs = [run(client) for client in "aaabbc"]
    for each in runs:
        queue.put(each)
    assert [queue.position(each) for each in runs] == [0, 3, 5, 1, 4, 2]
    assert "".join(queue.take(0).client for _ in runs) == "abcaba"
    assert queue.take(0) is None


def test_a_full_queue_names_a_time():
    queue = FairQueue(2)
    queue.put(run())
    queue.put(run("b"))
    with pytest.raises(BusyError, match="the queue is full") as caught:
        queue.put(run("c"))
    assert caught.value.seconds >= 1


def test_a_removed_run_is_not_taken():
    queue = FairQueue(3)
    first, second = run(), run()
    queue.put(first)
    queue.put(second)
    assert queue.remove(first)
    assert not queue.remove(first)
    assert queue.take(0) is second


def test_results_are_kept_by_count():
    registry = Registry(Limits(keep_runs=2))
    runs = [run() for _ in range(3)]
    for each in runs:
        registry.add(each)
        each.end("finished", "finished", {})
    registry.prune()
    assert registry.all() == [runs[2], runs[1]]
    with pytest.raises(MissingError):
        registry.find(runs[0].id)


def test_results_are_kept_by_time_and_waiting_runs_always():
    registry = Registry(Limits(keep_runs=None, keep_hours=1))
    old, waiting = run(), run()
    registry.add(old)
    registry.add(waiting)
    old.end("finished", "finished", {})
    old.ended = time.time() - 3601
    assert registry.all() == [waiting]


def test_photos_are_dropped_when_a_run_ends():
    ended = run()
    ended.person = Person(photos=(object(),))
    ended.end("failed", "failed", {})
    assert ended.person == Person()


def test_only_the_newest_progress_of_a_download_is_kept():
    downloading = run()
    downloading.publish("queued", {"position": 0})
    downloading.publish("started", {})
    for done in (1, 2, 3):
        downloading.publish("download", {"file": "a", "done": done, "total": 3})
    downloading.end("finished", "finished", {})

    async def collected() -> list[tuple[int, str]]:
        return [(event.number, event.name) async for event in downloading.events()]

    expected = [(1, "queued"), (2, "started"), (5, "download"), (6, "finished")]
    assert asyncio.run(collected()) == expected


def test_keep_is_a_count_or_hours():
    assert parse_keep("7") == (7, None)
    assert parse_keep("24h") == (None, 24.0)
    for wrong in ("0", "x", "3d", "-1", ""):
        with pytest.raises(UsageError, match="neither a count nor a time"):
            parse_keep(wrong)

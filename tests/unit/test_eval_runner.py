"""A run from plan to numbers, with stand-ins for people, workers and metrics."""

from __future__ import annotations

import gc
import io
import itertools
import json
import multiprocessing
import pathlib
import random
import subprocess
import sys
import time
import tracemalloc
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from support import eval_stand_ins as stand_in

from fastface_cli.errors import DeviceError, FastFaceError, ModelUnavailableError, UsageError
from fastface_cli.evaluation import runs
from fastface_cli.evaluation.engines import LocalPool, RayPool, make_all
from fastface_cli.evaluation.maker import ImageTask
from fastface_cli.evaluation.merge import merge
from fastface_cli.evaluation.rows import Row, image_seed, row_key
from fastface_cli.evaluation.runner import RunObserver, generate, joined, score
from fastface_cli.evaluation.runs import RowLog, Run, compare, read_lines
from fastface_cli.evaluation.scoring import CHUNK, Chunks


def run_all(folder: Path, plan, *, pool=None, people=None, metric=None, **options) -> list[Row]:
    """A whole run; its joined rows."""
    metric = metric or stand_in.Brightness()
    with Run.open(folder, stand_in.info(plan)) as run:
        generate(
            run,
            plan,
            lambda: pool or stand_in.Here(),
            people or stand_in.People(),
            stand_in.scoring(metric),
            **options,
        )
        return joined(run, [metric])


# ------------------------------------------------------------------------------------------------- rows


def test_row_survives_a_json_round_trip():
    row = Row(
        "r/a/0000-0", "r", "a", "p", 0, 0, 7, attributes={"x": "1"}, scores={"id": 0.5, "bad": float("nan")}
    )
    again = Row.from_json(json.loads(json.dumps(row.to_json(), allow_nan=False)) | {"of a later version": 1})
    assert again == replace(row, scores={"id": 0.5, "bad": None})


def test_image_seeds_are_fixed_and_differ_between_images():
    assert image_seed("anna", "a café", 0) == 1106974609
    seeds = {image_seed(name, prompt, index) for name in "ab" for prompt in "cd" for index in range(3)}
    assert len(seeds) == 12
    assert image_seed("ab", "c", 0) != image_seed("a", "bc", 0)


def test_plan_combines_people_prompts_seeds_recipes_and_stresses():
    plan = stand_in.plan(2, 3, recipes=("one", "two"), seeds=2, stresses=("blur",))
    rows = list(plan.rows())
    assert len(rows) == plan.count() == 2 * 2 * 2 * 3 * 2
    assert len({row.key for row in rows}) == len(rows)
    assert rows[0].key == row_key("one", "p000", 0, 0) == "one/p000/0000-0"
    assert rows[12].key == "one/p000/0000-0+blur"
    assert rows[12].degraded == "references/p000+blur.png"
    by_place = {(row.identity, row.prompt_index, row.seed_index): set() for row in rows}
    for row in rows:
        by_place[row.identity, row.prompt_index, row.seed_index].add(row.seed)
    assert all(len(seeds) == 1 for seeds in by_place.values())  # the same noise for every recipe and stress


def test_shards_are_complete_chunks_that_add_up_to_the_run():
    whole = stand_in.plan(7, 9)
    shards = [replace(whole, shard=(part, 3)) for part in (1, 2, 3)]
    keys = [[row.key for row in shard.rows()] for shard in shards]
    assert [len(part) for part in keys] == [shard.count() for shard in shards]
    assert sorted(itertools.chain(*keys)) == sorted(row.key for row in whole.rows())
    chunks = Chunks(stand_in.info(whole))
    complete = [rows for row in shards[0].rows() if (rows := chunks.add(row))]
    assert sum(map(len, complete)) == len(keys[0])


def test_small_runs_are_sharded_too():
    """One chunk a recipe: the second shard makes the second recipe, and there is nothing for a third."""
    whole = stand_in.plan(2, 2, recipes=("one", "two"))
    shards = [list(replace(whole, shard=(part, 3)).rows()) for part in (1, 2, 3)]
    assert [{row.recipe for row in rows} for rows in shards] == [{"one"}, {"two"}, set()]


def test_merged_shards_equal_the_complete_run(tmp_path):
    whole = stand_in.plan(7, 9)
    expected = run_all(tmp_path / "whole", whole)
    folders = []
    for part in (1, 2, 3):
        shard, folder = replace(whole, shard=(part, 3)), tmp_path / str(part)
        shard_info = stand_in.info(shard)
        shard_info["options"]["shard"] = f"{part}/3"
        with Run.open(folder, shard_info) as run:
            generate(run, shard, stand_in.Here, stand_in.People(), stand_in.scoring())
        folders.append(folder)
    for _ in range(2):  # the second time nothing is added
        merge([*folders, folders[1]], tmp_path / "merged")
        with Run.reopen(tmp_path / "merged") as run:
            assert joined(run, [stand_in.Brightness()]) == expected
    assert len(list(read_lines(tmp_path / "merged" / "generated.jsonl"))) == len(expected)
    shard_info = json.loads((folders[0] / "run.json").read_text())
    shard_info["options"]["seeds"] = 3
    (folders[0] / "run.json").write_text(json.dumps(shard_info))
    with pytest.raises(UsageError, match="not shards of one run"):
        merge(folders, tmp_path / "other")


# ------------------------------------------------------------------------------------------ the folder


def test_incomplete_lines_are_ignored_and_overwritten(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"a": 1}\n' + b"\0" * 9 + b'\n{"a": 2}\n{"a": 3')
    assert [record["a"] for _, record in read_lines(path)] == [1, 2]
    log = RowLog(path)
    log.append([{"a": 4}])
    log.close()
    assert [record["a"] for _, record in read_lines(path)] == [1, 2, 4]
    path.write_bytes(b"x" * 200_000)
    RowLog(path).close()
    assert path.read_bytes() == b""


def test_partial_writes_are_completed(tmp_path, monkeypatch):
    """A nearly full disk writes only a part of the data, without an error."""

    class Partial(io.FileIO):
        def write(self, data):
            return super().write(data[:3])

    monkeypatch.setattr(runs, "open_log", lambda path: Partial(path, "ab"))
    log = RowLog(tmp_path / "log.jsonl")
    log.append([{"a": 1}, {"a": 2}])
    log.close()
    assert [record["a"] for _, record in read_lines(tmp_path / "log.jsonl")] == [1, 2]


def test_interrupted_start_can_be_repeated(tmp_path):
    (tmp_path / ".fastface-1.tmp").write_text("{")
    with Run.open(tmp_path, stand_in.info(stand_in.plan())) as run:
        assert run.rows() == {}


def test_rows_without_an_image_are_generated_again(tmp_path):
    plan = stand_in.plan()
    whole = run_all(tmp_path / "run", plan)
    (tmp_path / "run" / str(whole[3].file)).unlink()
    (tmp_path / "run" / str(whole[5].file)).write_bytes(b"")  # after a power cut
    pool = stand_in.Here()
    assert run_all(tmp_path / "run", plan, pool=pool) == whole
    assert pool.sent == 2


def test_resuming_with_other_inputs_names_the_differences(tmp_path):
    plan = stand_in.plan()
    run_all(tmp_path / "run", plan)
    before = (tmp_path / "run" / "generated.jsonl").read_bytes()
    other = stand_in.info(stand_in.plan(seeds=2)) | {"versions": {"fastface": "1"}, "hardware": "another"}
    other["recipes"]["pocket"]["guidance"]["text"] = 3.0
    with pytest.raises(UsageError) as caught:
        Run.open(tmp_path / "run", other)
    assert caught.value.message.splitlines()[1:] == [
        "  options.seeds: 1 before, 2 now",
        "  recipes.pocket.guidance.text: 1.0 before, 3.0 now",
        '  versions.fastface: "0" before, "1" now',
    ]
    assert (tmp_path / "run" / "generated.jsonl").read_bytes() == before


def test_compare_reports_added_and_removed_entries():
    assert list(compare({"a": 1, "b": {"c": 2}}, {"b": {}, "d": 3})) == [
        "  a: 1 before, absent now",
        "  b.c: 2 before, absent now",
        "  d: absent before, 3 now",
    ]


def test_compare_reports_changed_list_entries():
    known = {"prompts": [f"prompt {number}" for number in range(50)], "names": ["a", "b"]}
    expected = {"prompts": [*known["prompts"][:49], "another"], "names": ["b", "a"]}
    assert list(compare(known, expected)) == [
        "  names: same entries in another order or number",
        '  prompts: "prompt 49" only before, "another" only now',
    ]


def test_only_one_process_can_write(tmp_path):
    with (
        Run.open(tmp_path / "run", stand_in.info(stand_in.plan())),
        pytest.raises(UsageError, match="another process"),
    ):
        Run.open(tmp_path / "run", stand_in.info(stand_in.plan()))
    Run.open(tmp_path / "run", stand_in.info(stand_in.plan())).__exit__(None, None, None)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("notes.txt", "mine", "is not empty and not a run"),
        ("run.json", "{", "cannot read"),
        ("run.json", "[]", "does not describe a run"),
        ("run.json", '{"version": 99}', "newer version of fastface"),
    ],
)
def test_folder_that_is_not_a_run_is_unchanged(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(UsageError, match=message):
        Run.open(tmp_path, stand_in.info(stand_in.plan()))
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == content


# -------------------------------------------------------------------------------------------- running


def test_images_are_scored_in_fixed_chunks(tmp_path):
    plan, metric = stand_in.plan(5, 7, recipes=("one", "two")), stand_in.Brightness()
    generated, scored = [], []
    rows = run_all(
        tmp_path / "run",
        plan,
        metric=metric,
        observer=RunObserver(generated=generated.append, scored=scored.append),
    )
    assert [row.key for row in rows] == sorted(row.key for row in plan.rows())
    assert sum(generated) == sum(scored) == 70
    assert all(row.scores["brightness"] == row.seed % 256 for row in rows)
    assert sorted(row.scores["brightness_rank"] for row in rows) == list(range(70))
    required = [row.key for row in plan.rows()]
    expected = [
        required[0:16],
        required[16:32],
        required[32:35],
        required[35:51],
        required[51:67],
        required[67:70],
    ]
    assert sorted(metric.batches) == sorted(expected)


def test_failures_are_recorded_and_the_run_continues(tmp_path):
    plan = stand_in.plan(3, 3)
    plan = replace(plan, dataset=replace(plan.dataset, prompts=("a", "too large", "c")))
    rows = {row.key: row for row in run_all(tmp_path / "run", plan, people=stand_in.People(("p001",)))}
    assert len(rows) == 9
    failed = {key: row.error["kind"] for key, row in rows.items() if row.error}
    assert failed == {
        "pocket/p000/0001-0": "device",
        "pocket/p001/0000-0": "no_face",
        "pocket/p001/0001-0": "no_face",
        "pocket/p001/0002-0": "no_face",
        "pocket/p002/0001-0": "device",
    }
    assert all((row.file is None) == (row.scores == {}) == (key in failed) for key, row in rows.items())
    pool = stand_in.Here()
    run_all(tmp_path / "run", plan, pool=pool)
    assert pool.sent == 0  # failures stay
    again = run_all(tmp_path / "run", plan, pool=pool, retry_failed=True)
    assert pool.sent == 5
    assert sum(row.error is not None for row in again) == 3  # she has a face now, and is too large once


def test_detector_error_only_fails_its_own_person(tmp_path):
    class Breaking(stand_in.People):
        def identity(self, subject, stress, face):
            if subject.name == "p001":
                raise ZeroDivisionError("a photo of no width")
            return super().identity(subject, stress, face)

    rows = run_all(tmp_path / "run", stand_in.plan(3, 2), people=Breaking())
    messages = {row.identity: row.error["message"] for row in rows if row.error}
    assert messages == {"p001": "unexpected ZeroDivisionError: a photo of no width"}


def test_unloadable_face_models_stop_the_run(tmp_path):
    class Nobody(stand_in.People):
        def identity(self, subject, stress, face):
            raise ModelUnavailableError("the face pack does not load")

    with pytest.raises(ModelUnavailableError, match="does not load"):
        run_all(tmp_path / "run", stand_in.plan(3, 2), people=Nobody())
    assert Run.reopen(tmp_path / "run", writable=False).rows() == {}


def test_scores_are_unchanged_after_interruption_and_resume(tmp_path):
    """An exception in the place of a kill: what a killed process leaves is what is on the disk then."""
    plan = stand_in.plan(4, 10, recipes=("one", "two"), stresses=("blur",))
    whole = run_all(tmp_path / "whole", plan)
    chance = random.Random(4)

    class CutError(Exception):
        pass

    cuts = 0
    while True:
        left = chance.randrange(1, 40)

        def count_generated(count: int, left: list[int] = [left]) -> None:  # noqa: B006
            left[0] -= count == 1
            if left[0] < 0:
                raise CutError

        try:
            cut = run_all(tmp_path / "cut", plan, observer=RunObserver(generated=count_generated))
        except CutError:
            cuts += 1
            for name in ("generated.jsonl", "scores.jsonl"):
                path = tmp_path / "cut" / name
                path.write_bytes(
                    path.read_bytes()[: -chance.randrange(1, 30)]
                    if chance.random() < 0.5
                    else path.read_bytes()
                )
            continue
        break
    assert cuts >= 4
    assert cut == whole


def test_later_metrics_are_added(tmp_path):
    plan = stand_in.plan()
    with Run.open(tmp_path / "run", stand_in.info(plan)) as run:
        nothing = stand_in.no_scoring()
        generate(run, plan, stand_in.Here, stand_in.People(), nothing)
        assert run.scores() == {}
        metric = stand_in.Brightness()
        score(run, stand_in.scoring(metric))
        score(run, stand_in.scoring(metric))
        assert len(metric.batches) == 1  # the second time nothing was left
        score(run, stand_in.scoring(metric), again=True)
        assert len(metric.batches) == 2
        rows = joined(run, [metric])
    assert all(row.scores["brightness"] == row.seed % 256 for row in rows)


def test_unreadable_image_only_loses_its_own_scores(tmp_path):
    plan = stand_in.plan()
    with Run.open(tmp_path / "run", stand_in.info(plan)) as run:
        generate(run, plan, stand_in.Here, stand_in.People(), stand_in.no_scoring())
        run.add(run.rows()["pocket/p001/0002-0"], b"no image")
        metric = stand_in.Brightness()
        score(run, stand_in.scoring(metric))
        errors = run.score_errors()
        rows = joined(run, [metric])
    assert list(errors) == ["pocket/p001/0002-0"]
    assert errors["pocket/p001/0002-0"]["pictures"]["kind"] == "usage"
    assert [row.key for row in rows if "brightness" not in row.scores] == ["pocket/p001/0002-0"]


def test_scoring_start_failure_stops_the_run(tmp_path):
    def load():
        raise DeviceError("out of memory on cuda")

    plan, pool = stand_in.plan(10, 10), stand_in.Here()
    with Run.open(tmp_path / "run", stand_in.info(plan)) as run:
        scoring = stand_in.Scoring([stand_in.Brightness()], load)
        with pytest.raises(FastFaceError, match="out of memory") as caught:
            generate(run, plan, lambda: pool, stand_in.People(), scoring)
        assert caught.value.exit_code == DeviceError.exit_code
        assert pool.closed
        assert len(run.rows()) >= CHUNK  # what was made is kept


def test_scoring_process_gives_the_scores_of_this_process(tmp_path):
    plan = stand_in.plan(5, 7)  # the last chunk is not a full one
    metric = stand_in.Brightness()
    with Run.open(tmp_path / "run", stand_in.info(plan)) as run:
        generate(run, plan, stand_in.Here, stand_in.People(), stand_in.scoring(metric, process=True))
        assert joined(run, [metric]) == run_all(tmp_path / "other", plan)
    assert metric.batches == []


def test_crashed_scoring_process_stops_the_run_and_keeps_images(tmp_path):
    plan, pool = stand_in.plan(3, 6), stand_in.Here()
    with Run.open(tmp_path / "run", stand_in.info(plan)) as run:
        scoring = stand_in.scoring(stand_in.Deadly(), process=True)
        with pytest.raises(FastFaceError, match="the scoring process has ended by SIGKILL") as caught:
            generate(run, plan, lambda: pool, stand_in.People(), scoring)
        assert "run the same command again to resume" in str(caught.value.hint)
        assert pool.closed
        assert len(run.rows()) >= CHUNK
        score(run, stand_in.scoring())
        assert len(run.scores()) == len(run.rows())


@pytest.mark.parametrize("kind", ["Exiting", "Unpicklable"])
def test_metric_errors_in_the_scoring_process_are_reported(tmp_path, kind):
    plan = stand_in.plan(3, 6)
    message = {"Exiting": "SystemExit", "Unpicklable": "pickle"}[kind]
    with Run.open(tmp_path / "run", stand_in.info(plan)) as run:
        scoring = stand_in.scoring(getattr(stand_in, kind)(), process=True)
        with pytest.raises(FastFaceError, match=message):
            generate(run, plan, stand_in.Here, stand_in.People(), scoring)


def test_stopping_a_run_terminates_the_scoring_process(tmp_path):
    plan = stand_in.plan(3, 6)

    def count_generated(count: int, seen: list[int] = [0]) -> None:  # noqa: B006
        seen[0] += count
        if seen[0] == plan.count():
            raise KeyboardInterrupt

    began = time.monotonic()
    with Run.open(tmp_path / "run", stand_in.info(plan)) as run:
        scoring = stand_in.scoring(stand_in.Endless(), process=True)
        with pytest.raises(KeyboardInterrupt):
            generate(
                run,
                plan,
                stand_in.Here,
                stand_in.People(),
                scoring,
                observer=RunObserver(generated=count_generated),
            )
        assert len(run.rows()) == plan.count()
        assert run.scores() == {}
    assert time.monotonic() - began < 60
    assert multiprocessing.active_children() == []


def test_memory_is_constant_over_2000_rows(tmp_path):
    plan, sizes = stand_in.plan(50, 40), {}

    def scored(count: int, seen: list[int] = [0]) -> None:  # noqa: B006
        seen[0] += count
        if seen[0] in (512, 2000):
            gc.collect()
            # pathlib interns names: the interpreter's own table of them doubles at some time.
            mine = tracemalloc.take_snapshot().filter_traces([tracemalloc.Filter(False, pathlib.__file__)])
            sizes[seen[0]] = sum(trace.size for trace in mine.traces)

    tracemalloc.start()
    try:
        run_all(tmp_path / "run", plan, observer=RunObserver(scored=scored))
    finally:
        tracemalloc.stop()
    assert sizes[2000] - sizes[512] < 500_000, sizes  # 1,500 rows held would be 2,000,000


# -------------------------------------------------------------------------------------------- workers


def tasks(plan) -> list[ImageTask]:
    return [ImageTask(row, stand_in.somebody()) for row in plan.rows()]


def test_worker_processes_generate_the_same_images(tmp_path):
    plan = stand_in.plan(2, 3)
    outcomes = list(make_all(LocalPool(stand_in.plain, ["cpu", "cpu"]), tasks(plan)))
    assert {outcome.row.key: outcome.image for outcome in outcomes} == {
        task.row.key: stand_in.image(task) for task in tasks(plan)
    }


def test_image_of_a_killed_worker_is_requeued(tmp_path):
    plan, messages = stand_in.plan(2, 3), []
    pool = LocalPool(stand_in.Dying(tmp_path, "prompt 1", 1), ["cpu", "cpu"])
    outcomes = list(make_all(pool, tasks(plan), messages.append))
    assert len(messages) == 2
    assert "ended by SIGKILL" in messages[0]
    assert all(outcome.row.error is None for outcome in outcomes)
    assert {outcome.row.key for outcome in outcomes} == {row.key for row in plan.rows()}


def test_image_that_crashes_every_worker_fails_alone(tmp_path):
    plan, messages = stand_in.plan(1, 3), []
    outcomes = list(
        make_all(LocalPool(stand_in.Dying(tmp_path, "prompt 1", 9), ["cpu"]), tasks(plan), messages.append)
    )
    assert len(messages) == 3
    errors = {outcome.row.prompt: outcome.row.error for outcome in outcomes}
    assert errors["prompt 0"] is errors["prompt 2"] is None
    assert errors["prompt 1"]["message"].startswith("3 workers crashed while generating it: ended by SIGKILL")


def test_worker_start_failure_stops_the_run():
    pool = stand_in.Here(stand_in.broken)
    with pytest.raises(FastFaceError, match="no such device") as caught:
        list(make_all(pool, tasks(stand_in.plan())))
    assert (caught.value.exit_code, caught.value.hint, pool.closed) == (4, "another one", True)


def test_repeated_worker_crashes_stop_the_run():
    pool = stand_in.Losing()
    with pytest.raises(FastFaceError, match="6 workers in a row crashed"):
        list(make_all(pool, tasks(stand_in.plan(5, 5))))
    assert pool.closed


def test_ray_cluster_with_fewer_cpus_than_workers_is_refused(monkeypatch):
    cluster = SimpleNamespace(is_initialized=lambda: True, cluster_resources=lambda: {"CPU": 2.0})
    monkeypatch.setitem(sys.modules, "ray", cluster)
    with pytest.raises(UsageError, match="has 2 CPUs for 3 workers") as caught:
        RayPool(stand_in.plain, workers=3)
    assert caught.value.hint == "use at most --workers 2"


KILLED = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from support import eval_stand_ins as stand_in
from fastface_cli.evaluation.engines import LocalPool
from fastface_cli.evaluation.runner import generate
from fastface_cli.evaluation.runs import Run
if __name__ == "__main__":
    plan = stand_in.plan(8, 10, recipes=("one", "two"))
    with Run.open(Path({folder!r}), stand_in.info(plan)) as run:
        pool = lambda: LocalPool(stand_in.slow, ["cpu", "cpu"])
        generate(run, plan, pool, stand_in.People(), stand_in.scoring(process=True))
"""


def test_unguarded_script_is_reported(tmp_path):
    script = tmp_path / "unguarded.py"
    guarded = KILLED.format(tests=str(Path(__file__).parents[1]), folder=str(tmp_path / "run"))
    script.write_text(guarded.replace('if __name__ == "__main__":', "if True:"))
    ended = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False)
    assert ended.returncode != 0
    assert "does the script guard its start with if __name__ == '__main__'?" in ended.stderr


@pytest.mark.slow
def test_scores_are_unchanged_after_ten_kills(tmp_path):
    plan, chance, metric = (
        stand_in.plan(8, 10, recipes=("one", "two")),
        random.Random(8),
        stand_in.Brightness(),
    )
    whole = run_all(tmp_path / "whole", plan)
    script = tmp_path / "killed.py"
    folder = tmp_path / "killed"
    script.write_text(KILLED.format(tests=str(Path(__file__).parents[1]), folder=str(folder)))
    kills, log = 0, folder / "generated.jsonl"
    while kills < 10:
        before = log.stat().st_size if log.exists() else 0
        process = subprocess.Popen([sys.executable, str(script)])
        while process.poll() is None and (log.stat().st_size if log.exists() else 0) == before:
            pass
        try:
            assert process.wait(chance.uniform(0, 0.35)) == 0
            break  # it has come to its end before ten kills
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills += 1
            with log.open("ab") as torn:
                torn.write(b'{"key": "one/p0')
    assert subprocess.run([sys.executable, str(script)], check=False).returncode == 0
    with Run.reopen(folder) as run:
        assert joined(run, [metric]) == whole
    assert kills == 10

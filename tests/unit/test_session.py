"""A session as another program uses it: only its public interface."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from fastface_cli.app.events import IdentityReady, ImageFinished, ModelsReady, RunFinished, RunStarted
from fastface_cli.app.events import StepFinished as Step
from fastface_cli.app.request import GenerateRequest, OutputPlan
from fastface_cli.app.runtime import Runtime
from fastface_cli.app.session import RunCancelledError, Session
from fastface_cli.errors import FastFaceError

GOLDEN = Path(__file__).parents[1] / "data" / "golden"


def request(folder: Path, **changes) -> GenerateRequest:
    return GenerateRequest(
        recipe=str(GOLDEN / "cases" / "am_only-scalepow-hyper.json"),
        stack=GOLDEN,
        identity=GOLDEN / "identity.safetensors",
        output=OutputPlan(path=str(folder / "x.png")),
        **changes,
    )


@pytest.fixture(scope="module")
def session():
    with Session(runtime=Runtime(device="cpu", dtype="float32")) as session:
        yield session


def test_a_run_is_a_stream_of_events_in_the_order_of_the_work(session, tmp_path):
    events = list(session.run(request(tmp_path, count=2)))
    kinds = [type(event) for event in events if not isinstance(event, Step)]
    expected = [RunStarted, IdentityReady, ModelsReady, ImageFinished, ImageFinished, RunFinished]
    assert sorted(kinds, key=expected.index) == expected
    steps = [event for event in events if isinstance(event, Step)]
    assert [step.done for step in steps] == list(range(1, 9))
    assert {step.total for step in steps} == {8}
    for event in events:
        if isinstance(event, ImageFinished):
            with Image.open(event.path) as written:
                assert written.tobytes() == event.image.tobytes()


def test_cancel_stops_between_two_steps_and_the_next_run_is_unharmed(session, tmp_path):
    run = session.run(request(tmp_path))
    while not isinstance(next(run), ModelsReady):
        pass
    session.cancel()
    with pytest.raises(RunCancelledError):
        list(run)
    assert not (tmp_path / "x.png").exists()
    assert list(session.run(request(tmp_path)))[-1] == RunFinished(1)


def test_one_run_at_a_time(session, tmp_path):
    first = session.run(request(tmp_path))
    next(first)
    with pytest.raises(FastFaceError, match="already running"):
        next(session.run(request(tmp_path)))
    first.close()
    assert isinstance(list(session.run(request(tmp_path)))[-1], RunFinished)


def test_a_request_survives_json(tmp_path):
    original = request(tmp_path, prompts=("a", "b"), adapter_scales=(0.4,), best_of=3, seed=7)
    assert GenerateRequest.model_validate_json(original.model_dump_json()) == original


def test_a_replaced_photo_is_another_person(tmp_path):
    examples = Path(__file__).parents[2] / "examples" / "mini" / "id_photos"
    photo = tmp_path / "upload.png"
    with Session("pocket", Runtime(device="cpu")) as session:
        from fastface_cli.recipe.files import load_recipe

        recipe, digests = load_recipe("pocket").recipe, []
        for name in ("anna", "hugo", "anna"):
            photo.write_bytes((examples / f"{name}.png").read_bytes())
            digests.append(session.identity(recipe, (photo,)).digest())
    assert digests[0] == digests[2] != digests[1]

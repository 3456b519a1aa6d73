"""A session as another program uses it: only its public interface."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastface_cli import FastFace
from fastface_cli.app import plan
from fastface_cli.app.events import IdentityReady, ImageFinished, ModelsReady, RunFinished, RunStarted
from fastface_cli.app.events import StepFinished as Step
from fastface_cli.app.request import GenerateRequest, OutputPlan
from fastface_cli.app.runtime import Runtime
from fastface_cli.app.session import RunCancelledError, Session
from fastface_cli.app.stack import fetch
from fastface_cli.errors import FastFaceError, NoFaceError
from fastface_cli.identity import photos
from fastface_cli.identity.identity import Identity
from fastface_cli.recipe.files import load_recipe
from fastface_cli.store.progress import DownloadProgress, DownloadStarted, FileFinished

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
PORTRAIT = Path(__file__).parents[2] / "examples" / "portrait.png"


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
    assert [step.step for step in steps] == [1, 2, 3, 4] * 2
    assert {tuple(step.latents.shape) for step in steps} == {(1, 4, 16, 16)}
    assert not steps[0].latents.equal(steps[1].latents)
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
        recipe, digests = load_recipe("pocket").recipe, []
        for name in ("anna", "hugo", "anna"):
            photo.write_bytes((examples / f"{name}.png").read_bytes())
            digests.append(session.stack.identity(recipe, (photo,)).digest())
    assert digests[0] == digests[2] != digests[1]


def test_a_request_without_output_writes_nothing(session, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = session.run(request(tmp_path, seed=3).model_copy(update={"output": None}))
    (image,) = [event for event in run if isinstance(event, ImageFinished)]
    assert image.path is None
    assert image.record()["path"] is None
    assert image.provenance.seed == 3
    assert list(tmp_path.iterdir()) == []


def test_an_identity_in_memory_replaces_photos(session, tmp_path):
    identity = Identity.load(GOLDEN / "identity.safetensors")
    from_file = session.run(request(tmp_path, seed=3).model_copy(update={"output": None}))
    in_memory = session.run(
        request(tmp_path, seed=3).model_copy(update={"output": None, "identity": None}), identity=identity
    )
    pixels = [
        [event.image.tobytes() for event in run if isinstance(event, ImageFinished)]
        for run in (from_file, in_memory)
    ]
    assert pixels[0] == pixels[1]


def test_python_use_gives_the_images_of_a_run(tmp_path):
    recipe, person = str(GOLDEN / "cases" / "am_only-scalepow-hyper.json"), GOLDEN / "identity.safetensors"
    face = FastFace(recipe, stack=GOLDEN, device="cpu", dtype="float32")
    images = face.generate(Identity.load(person), "a portrait", seed=5, count=2, batch_size=2)
    with Session(runtime=Runtime(device="cpu", dtype="float32")) as other:
        run = other.run(request(tmp_path, prompts=("a portrait",), seed=6))
        (alone,) = [event.image for event in run if isinstance(event, ImageFinished)]
    difference = np.abs(np.asarray(images[1], int) - np.asarray(alone, int))
    assert difference.max() <= 1


class Downloads:
    """A store whose files are missing: it records what is fetched, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.fetched: list[set[str]] = []
        monkeypatch.setattr("fastface_cli.app.stack.fetch", self)

    def __call__(self, recipe, _settings, roles, *, offline, progress):
        self.fetched.append(set(roles))
        progress(DownloadStarted(()))
        packaged = {str(role): str(reference) for role, reference in recipe.references().items()}
        for role in roles:
            for done in range(3):
                progress(DownloadProgress(packaged[role], done, 2))
            progress(FileFinished(packaged[role]))
        return fetch(recipe, _settings, roles, offline=offline)


def test_face_models_are_downloaded_and_used_before_the_others(tmp_path, monkeypatch):
    downloads = Downloads(monkeypatch)
    Image.new("RGB", (200, 200), "white").save(tmp_path / "white.png")
    with Session("pocket", Runtime(device="cpu")) as session:
        with pytest.raises(NoFaceError):
            list(session.run(GenerateRequest(photos=(tmp_path / "white.png",), prompts=("a",), output=None)))
        assert downloads.fetched == [{"face"}]
        portrait = GenerateRequest(photos=(PORTRAIT,), prompts=("a",), output=None)
        kinds = [type(event) for event in session.run(portrait)]
    assert {"base", "adapter"} <= downloads.fetched[1]
    assert "face" not in downloads.fetched[1]
    assert kinds.index(IdentityReady) < kinds.index(DownloadProgress) < kinds.index(ModelsReady)


def test_cancel_ends_a_download(tmp_path, monkeypatch):
    Downloads(monkeypatch)
    with Session("pocket", Runtime(device="cpu")) as session:
        run = session.run(GenerateRequest(photos=(PORTRAIT,), prompts=("a",), output=None))
        while not isinstance(next(run), DownloadStarted):
            pass
        session.cancel()
        with pytest.raises(RunCancelledError):
            list(run)


def test_a_photo_is_decoded_once(tmp_path, monkeypatch):
    decoded = []
    original = photos.open_photo

    def counted(source, name="the photo"):
        if not isinstance(source, photos.Photo):
            decoded.append(source)
        return original(source, name)

    monkeypatch.setattr(photos, "open_photo", counted)
    with Session("pocket", Runtime(device="cpu")) as session:
        list(session.run(GenerateRequest(photos=(PORTRAIT,), prompts=("a",), output=None)))
    assert decoded == [PORTRAIT]


def test_only_first_candidates_are_named_before_the_run(tmp_path, monkeypatch):
    calls = []
    original = plan.plan_paths
    monkeypatch.setattr(
        plan, "plan_paths", lambda *args, **kwargs: calls.append(1) or original(*args, **kwargs)
    )
    many = GenerateRequest(
        recipe="pocket",
        prompts=("a",),
        seed=5,
        count=100,
        best_of=1000,
        output=OutputPlan(path=f"{tmp_path}/"),
    )
    planned = plan.plan_run(many, "pocket", {})
    assert len(calls) == 1
    assert planned.names.path(1, 0) == tmp_path / "pocket-baseline-1005.png"
    assert planned.names.path(1, 7) == tmp_path / "pocket-baseline-1012.png"


def test_words_that_the_pocket_stack_ignores_are_logged_once(caplog):
    with Session("pocket", Runtime(device="cpu")) as session:
        wish = GenerateRequest(photos=(PORTRAIT,), prompts=("photo of an astronaut",), output=None)
        for _ in range(2):
            next(session.run(wish))
    (record,) = caplog.records
    assert "ignores these words: astronaut;" in record.getMessage()

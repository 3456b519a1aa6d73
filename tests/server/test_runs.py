"""Runs over the native API: results, events, cancellation, idempotency, the same pixels everywhere."""

from __future__ import annotations

import io
import json
import threading
import time

import numpy as np
import pytest
from PIL import Image
from support.served import PHOTO, events, serving, submit

from fastface_cli import FastFace, cli


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)))


def finished(client, run: str) -> dict:
    events(client, run)
    return client.get(f"/api/runs/{run}").json()


def test_a_photo_becomes_an_image_with_metadata(client):
    response = submit(client, PHOTO, prompts=["a woman smiling"], seed=4, previews=True)
    assert response.status_code == 202
    names = [name for name, _ in events(client, response.json()["id"])]
    assert names[-2:] == ["image", "finished"]
    assert names.count("step") == 4
    run = client.get(f"/api/runs/{response.json()['id']}").json()
    assert (run["state"], run["recipe"], run["images"][0]["seed"]) == ("finished", "pocket-baseline", 4)
    image = client.get(run["images"][0]["url"])
    assert image.headers["content-type"] == "image/png"
    metadata = json.loads(Image.open(io.BytesIO(image.content)).text["fastface"])
    assert (metadata["prompt"], metadata["seed"]) == ("a woman smiling", 4)


def test_a_run_tells_its_size_and_its_messages(client):
    run = submit(client, PHOTO, prompts=["a quixotic woman"], aspect=[3, 4]).json()
    ended = finished(client, run["id"])
    image = ended["images"][0]
    assert (
        (run["width"], run["height"])
        == (ended["width"], ended["height"])
        == (image["width"], image["height"])
    )
    assert ended["width"] < ended["height"]
    messages = [data["message"] for name, data in events(client, run["id"]) if name == "notice"]
    assert ended["notices"] == list(dict.fromkeys(messages))
    wrong = submit(client, changes={"sampling.width": 100}).json()["error"]["message"]
    assert wrong.count("sampling.width") == 1


def test_pose_for_an_adapter_without_key_points_is_refused(client):
    body = json.dumps({"prompts": ["a portrait"], "identity": "me"})
    refused = client.post("/api/runs", data={"request": body}, files={"pose": PHOTO.read_bytes()})
    assert refused.status_code == 400
    assert refused.json()["error"]["message"].startswith(
        "a pose is for InstantID, and recipe 'pocket-baseline'"
    )


def test_every_step_has_a_preview(client):
    run = submit(client, previews=True).json()["id"]
    previews = [data["previews"] for name, data in events(client, run) if name == "step"]
    assert len(previews) == 4
    assert all(each[0].startswith("data:image/webp;base64,") for each in previews)


def test_events_resume_after_a_number(client):
    run = submit(client).json()["id"]
    complete = events(client, run)
    assert events(client, run, after=len(complete) - 1) == complete[-1:]


def test_http_python_and_command_line_give_the_same_pixels(client, tmp_path, monkeypatch):
    monkeypatch.setenv("FASTFACE_HOME", str(tmp_path / "home"))
    run = finished(client, submit(client, PHOTO, prompts=["a man, comic"], seed=11).json()["id"])
    over_http = pixels(client.get(run["images"][0]["url"]).content)
    face = FastFace("pocket", device="cpu")
    in_python = np.asarray(face.generate(face.identity(PHOTO), "a man, comic", seed=11)[0])
    path = tmp_path / "image.png"
    command = ["generate", "--recipe", "pocket", "--face", str(PHOTO), "--prompt", "a man, comic"]
    assert cli.run([*command, "--seed", "11", "--device", "cpu", "-o", str(path)]) == 0
    assert np.array_equal(over_http, in_python)
    assert np.array_equal(over_http, np.asarray(Image.open(path)))


def test_other_formats_carry_the_metadata(client):
    run = finished(client, submit(client).json()["id"])
    for name in ("jpeg", "webp"):
        response = client.get(run["images"][0]["url"], params={"format": name})
        assert response.headers["content-type"] == f"image/{name}"
        assert b"fastface" in response.content
    assert client.get(run["images"][0]["url"], params={"format": "gif"}).status_code == 400


def test_the_same_idempotency_key_gives_the_same_run(client):
    first = submit(client, key="k1", seed=3)
    again = submit(client, key="k1", seed=3)
    assert (first.status_code, again.status_code) == (202, 200)
    assert first.json()["id"] == again.json()["id"]
    other = submit(client, key="k1", seed=4)
    assert other.status_code == 409
    assert other.json()["error"]["kind"] == "conflict"


@pytest.mark.parametrize("step", [1, 2, 3, 4])
def test_cancel_at_every_step(client, step):
    run = submit(client, count=8).json()["id"]
    with client.stream("GET", f"/api/runs/{run}/events") as response:
        for line in response.iter_lines():
            if line.startswith("data: ") and json.loads(line[6:]).get("step") == step:
                break
    assert client.delete(f"/api/runs/{run}").status_code == 202
    name, _ = events(client, run)[-1]
    assert name == "cancelled"
    assert len(client.get(f"/api/runs/{run}").json()["images"]) < 8
    assert finished(client, submit(client).json()["id"])["state"] == "finished", "the next run is unaffected"


def test_a_waiting_run_is_cancelled_at_once_and_forgotten_by_a_second_call(client):
    busy = submit(client, count=4).json()["id"]
    waiting = submit(client).json()["id"]
    assert client.delete(f"/api/runs/{waiting}").json()["state"] == "cancelled"
    assert client.delete(f"/api/runs/{waiting}").status_code == 202
    assert client.get(f"/api/runs/{waiting}").status_code == 404
    assert finished(client, busy)["state"] == "finished"


def test_a_run_survives_the_client(server):
    with server.client() as client:
        run = submit(client, count=3).json()["id"]
        with client.stream("GET", f"/api/runs/{run}/events") as response:
            next(response.iter_lines())
    with server.client() as client:
        assert len(finished(client, run)["images"]) == 3


def test_methods_share_the_loaded_models(client):
    seconds = []
    for method in ("baseline", "dcg", "am1", "fastface"):
        run = submit(client, recipe=f"pocket-{method}").json()["id"]
        seconds += [data["seconds"] for name, data in events(client, run) if name == "models"]
    assert max(seconds[1:]) < 1


def test_changes_are_applied_and_limited(client):
    run = finished(client, submit(client, changes={"sampling.width": 64, "sampling.height": 64}).json()["id"])
    assert (run["images"][0]["width"], run["images"][0]["height"]) == (64, 64)
    refused = submit(client, changes={"model.base": 1.0})
    assert refused.status_code == 400
    assert "cannot be set over HTTP" in refused.json()["error"]["message"]


def test_many_clients_get_their_own_images(server):
    answers: dict[int, dict] = {}

    def work(seed: int) -> None:
        with server.client() as client:
            run = finished(client, submit(client, seed=seed, prompts=[f"take {seed}"]).json()["id"])
            answers[seed] = run["images"][0]

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {seed: image["prompt"] for seed, image in answers.items()} == {n: f"take {n}" for n in range(24)}
    assert all(image["seed"] == seed for seed, image in answers.items())


def test_faces_and_identities(client):
    with PHOTO.open("rb") as photo:
        faces = client.post("/api/faces", files={"photo": photo}).json()
    assert (faces["width"], faces["height"], len(faces["faces"])) == (128, 128, 1)
    with PHOTO.open("rb") as photo:
        saved = client.post("/api/identities", data={"name": "my friend"}, files={"photos": photo}).json()
    file = client.get("/api/identities/my friend").content
    again = client.post("/api/identities", data={"name": "copy"}, files={"file": file}).json()
    assert again["digest"] == saved["digest"]
    assert pixels(client.get("/api/identities/copy/preview").content).shape == (224, 224, 3)
    assert client.delete("/api/identities/copy").status_code == 204
    assert client.get("/api/identities/copy").status_code == 404
    assert submit(client, identity="copy").status_code == 404


def test_status_recipes_and_licenses(client):
    status = client.get("/api/status").json()
    assert status["recipe"] == "pocket"
    recipes = {recipe["name"]: recipe for recipe in client.get("/api/recipes").json()["recipes"]}
    assert recipes["pocket-baseline"]["default"]
    assert recipes["hyper-instantid-dcg"]["model"] == "hyper-instantid"
    assert recipes["hyper-instantid-dcg"]["method"] == "dcg"
    assert recipes["hyper-fastface-am2"]["method"] == "fastface-am2"
    parts = client.get("/api/recipes/pocket/licenses").json()["parts"]
    assert {part["commercial"] for part in parts} == {"yes"}


def test_images_and_identities_go_to_the_output_folder(tmp_path):
    output = tmp_path / "out"
    with serving(tmp_path, "-o", str(output), "--keep", "1") as server, server.client() as client:
        with PHOTO.open("rb") as photo:
            client.post("/api/identities", data={"name": "me"}, files={"photos": photo}).raise_for_status()
        runs = [finished(client, submit(client, seed=seed).json()["id"]) for seed in (1, 2)]
        assert client.get(f"/api/runs/{runs[0]['id']}").status_code == 404, "only one run is kept"
        assert client.get(runs[1]["images"][0]["url"]).status_code == 200
        assert len(list(output.glob("*.png"))) == 2
        server.kill()
    with serving(tmp_path, "-o", str(output)) as server, server.client() as client:
        assert [each["name"] for each in client.get("/api/identities").json()["identities"]] == ["me"]
        assert finished(client, submit(client, seed=3).json()["id"])["state"] == "finished"
    assert len(list(output.glob("*.png"))) == 3


def test_models_are_unloaded_when_idle(tmp_path):
    def loaded() -> str | None:
        return client.get("/api/status").json()["loaded"]

    with serving(tmp_path, "--idle-unload", "0.1") as server, server.client() as client:
        loaded()  # the first call also examines the machine, which takes a while
        finished(client, submit(client, PHOTO).json()["id"])
        assert loaded() == "pocket-baseline"
        for _ in range(60):
            if loaded() is None:
                break
            time.sleep(0.5)
        assert loaded() is None
        assert finished(client, submit(client, PHOTO).json()["id"])["state"] == "finished"

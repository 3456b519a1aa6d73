"""The published data set from a server that plays Google Drive."""

from __future__ import annotations

import io
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from fastface_cli.errors import ModelUnavailableError
from fastface_cli.evaluation import download
from fastface_cli.evaluation.dataset import load_dataset
from fastface_cli.settings import Settings

pytest.importorskip("gdown")


def archive(prompt: str = "a Cat") -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as zipped:
        zipped.writestr("evaluation_ds_v2/id_photos/b.png", b"b")
        zipped.writestr("evaluation_ds_v2/id_photos/a.png", b"a")
        zipped.writestr("__MACOSX/evaluation_ds_v2/id_photos/._a.png", b"junk")
        for name in ("prompts.txt", "prompts_nostyle.txt", "prompts_style.txt"):
            zipped.writestr(f"evaluation_ds_v2/{name}", prompt + "\n")
        zipped.writestr("../../outside.txt", "no")
    return data.getvalue()


@pytest.fixture
def drive(monkeypatch):
    """A server; `drive.body` is what it sends."""

    class Drive(ThreadingHTTPServer):
        body = archive()
        kind = "application/zip"
        requests = 0

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            server = self.server
            assert isinstance(server, Drive)
            server.requests += 1
            self.send_response(200)
            self.send_header("Content-Type", server.kind)
            self.send_header("Content-Length", str(len(server.body)))
            self.end_headers()
            self.wfile.write(server.body)

        def log_message(self, *arguments):
            pass

    server = Drive(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setattr(download, "URL", f"http://127.0.0.1:{server.server_port}/data.zip")
    yield server
    server.shutdown()
    server.server_close()


def test_fetches_once_and_unpacks_photos_and_prompts_alone(drive, tmp_path):
    settings, messages = Settings(home=tmp_path), []
    folder = download.fetch_diversefaces(settings, log=messages.append)
    assert sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()) == [
        "id_photos/a.png",
        "id_photos/b.png",
        "prompts.txt",
        "prompts_nostyle.txt",
        "prompts_style.txt",
    ]
    assert "SHA-256" in messages[0]
    assert [subject.name for subject in load_dataset(folder).subjects] == ["a", "b"]
    assert download.fetch_diversefaces(settings, offline=True) == folder
    assert drive.requests == 1
    assert not (tmp_path.parent / "outside.txt").exists()
    assert sorted(path.name for path in folder.parent.iterdir()) == ["diversefaces"]


def test_other_bytes_than_the_first_time_are_refused(drive, tmp_path):
    import shutil

    settings = Settings(home=tmp_path)
    shutil.rmtree(download.fetch_diversefaces(settings))
    download.fetch_diversefaces(settings)  # the same bytes again
    shutil.rmtree(download.diversefaces_folder(settings))
    drive.body = archive("another prompt")
    with pytest.raises(ModelUnavailableError, match="has changed since the first download"):
        download.fetch_diversefaces(settings)
    assert not download.diversefaces_folder(settings).exists()


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"<html><title>Google Drive - Quota exceeded</title></html>", "quota of diversefaces is used up"),
        (
            b"<html>Too many users have viewed or downloaded this file recently.</html>",
            "quota of diversefaces is used up",
        ),
        (b"<html>Sign in</html>", "is not a zip"),
    ],
)
def test_web_page_instead_of_the_zip_is_reported(drive, tmp_path, body, message):
    drive.body, drive.kind = body, "text/html"
    with pytest.raises(ModelUnavailableError, match=message) as caught:
        download.fetch_diversefaces(Settings(home=tmp_path))
    assert "with a browser" in str(caught.value.hint)
    assert list((tmp_path / "datasets").iterdir()) == []


def test_refused_download_is_reported(monkeypatch, tmp_path):
    import gdown

    def refuse(*arguments, **options):
        raise gdown.exceptions.FileURLRetrievalError("Too many users have viewed or downloaded this file")

    monkeypatch.setattr(gdown, "download", refuse)
    with pytest.raises(ModelUnavailableError, match="quota is used up"):
        download.fetch_diversefaces(Settings(home=tmp_path))


def test_offline_error_explains_the_manual_download(tmp_path):
    with pytest.raises(ModelUnavailableError, match="the network is disabled") as caught:
        download.fetch_diversefaces(Settings(home=tmp_path), offline=True)
    assert "drive.google.com" in str(caught.value.hint)


def test_a_zip_of_something_else_is_refused(drive, tmp_path):
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as zipped:
        zipped.writestr("holiday.png", b"")
    drive.body = data.getvalue()
    with pytest.raises(ModelUnavailableError, match="does not contain id_photos"):
        download.fetch_diversefaces(Settings(home=tmp_path))
    drive.body = archive()  # what was refused is not remembered
    assert download.fetch_diversefaces(Settings(home=tmp_path)).is_dir()

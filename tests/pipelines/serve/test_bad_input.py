"""What cannot be served is one line on stderr and status 2, before Ray starts or any picture is taken."""

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from pydantic import ValidationError

from ctmsr.errors import TrackingError, UserError
from pipelines.infra.exit_status import run
from pipelines.serve.__main__ import main
from pipelines.serve.application import Arguments
from pipelines.serve.token import TokenSource
from pipelines.tracking.models import find_version
from tests.support import serving

Refused = Callable[..., str]


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Refused:
    """Runs the command, which must fail as promised; its message."""

    def no_cluster() -> None:
        raise AssertionError("Ray was started")

    def run_it(*options: str) -> str:
        monkeypatch.setattr("pipelines.serve.run.ray_cluster", no_cluster)
        monkeypatch.setattr(sys, "argv", ["serve", *options])
        with pytest.raises(SystemExit) as ended:
            run(main)
        printed = capsys.readouterr()
        assert ended.value.code == 2
        assert printed.err.startswith("error: ")
        assert printed.err.count("\n") == 1
        return printed.err

    return run_it


@contextmanager
def server(status: int, body: bytes, location: str = "") -> Iterator[tuple[str, list[str]]]:
    """A server that always answers the same; its address, and the paths that it was asked for."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked.append(self.path)
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            self.send_response(status)
            if location:
                self.send_header("Location", location + self.path)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_POST

        def log_message(self, *arguments: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}", asked
        server.shutdown()


@pytest.mark.parametrize(
    ("status", "body", "message"),
    [
        (200, b"<html>Welcome</html>", "not in a valid JSON format"),
        (500, b"<html>Oops</html>", "too many 500 error responses"),
        (200, b"{}", "answers, but not as an MLflow server does"),
        (200, b'{"model_version": 7}', "Failed to parse model_version"),
    ],
)
def test_a_registry_that_answers_garbage(refused: Refused, status: int, body: bytes, message: str) -> None:
    with server(status, body) as (address, _):
        told = refused("--model", "models:/toy@champion", "--tracking-uri", address)
    assert message in told
    assert address in told


def test_a_registry_that_sends_elsewhere_is_not_followed(refused: Refused) -> None:
    with server(200, b"{}") as (elsewhere, asked), server(302, b"", elsewhere) as (address, _):
        told = refused("--model", "models:/toy@champion", "--tracking-uri", address)
    assert f"the MLflow server {address} does not answer" in told
    assert "302" in told
    assert asked == []


def test_a_missing_champion(refused: Refused, registry: str) -> None:
    told = refused("--model", "models:/other@champion", "--tracking-uri", registry)
    assert "models:/other@champion is not in the registry" in told
    assert "There are models: toy." in told


@pytest.mark.parametrize(
    ("option", "value"), [("--max-megapixels", "0"), ("--timeout", "-1"), ("--port", "70000")]
)
def test_options_out_of_range(refused: Refused, option: str, value: str) -> None:
    assert f"{option} must be" in refused(option, value)


def test_files_that_only_another_machine_has(registry: str) -> None:
    """As those of an MLflow server that names its own folders."""
    version = replace(find_version(registry, "models:/toy/1"), source="file:///only/there")
    with pytest.raises(TrackingError, match=r"files of models:/toy/1 are at file:///.*does not have\. Start"):
        version.load()


@pytest.mark.parametrize("text", ["", "short", "with a space in it", "ümlaut-ümlaut-ümlaut"])
def test_a_token_that_cannot_be_one(text: str, tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_text(text)
    with pytest.raises(
        UserError, match=r"must hold at least 16 visible ASCII characters .*openssl rand"
    ) as raised:
        serving.front(None, token=TokenSource(str(path)))
    assert not text or text not in str(raised.value)


def test_a_token_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CTMSR_SERVE_TOKEN", raising=False)
    with pytest.raises(UserError, match=r"token cannot be read where the server runs .*No such file"):
        serving.front(None, token=TokenSource(str(tmp_path / "token")))
    with pytest.raises(UserError, match="CTMSR_SERVE_TOKEN must hold"):
        serving.front(None, token=TokenSource(None))


def test_unknown_and_wrong_arguments_of_the_application() -> None:
    with pytest.raises(ValidationError, match="modle"):
        Arguments.model_validate({"modle": "starter"})
    with pytest.raises(ValidationError, match="greater than 0"):
        Arguments.model_validate({"timeout": "0"})
    assert Arguments.model_validate({"timeout": "5", "strip_metadata": "true"}).limits.timeout_s == 5

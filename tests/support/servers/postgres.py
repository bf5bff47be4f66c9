"""A real PostgreSQL server on loopback, for the duration of a test.

On Debian: `apt-get install --no-install-recommends postgresql`.
"""

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.servers.ray_nodes import free_port

_START_TIMEOUT_S = 120
_USER, _PASSWORD = "ctmsr", "test-only"


@contextmanager
def postgres() -> Iterator[str]:
    """The URI of an empty database in a PostgreSQL server of its own, which requires a password."""
    with tempfile.TemporaryDirectory(prefix="postgres") as name:
        root = Path(name)
        (root / "password").write_text(_PASSWORD)
        as_user: list[str | Path] = []
        if os.geteuid() == 0:  # PostgreSQL refuses to run as root
            as_user = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"]
            for path in (root, root / "password"):
                shutil.chown(path, "postgres", "postgres")
        tools, port = postgres_tools(), free_port()
        initdb: list[str | Path] = [tools / "initdb", "-D", root / "data", "-U", _USER, "--no-sync"]
        initdb += ["--auth=scram-sha-256", "--pwfile", root / "password"]
        subprocess.run(as_user + initdb, check=True, cwd=root, stdout=subprocess.DEVNULL)
        command: list[str | Path] = [tools / "postgres", "-D", root / "data"]
        for setting in ("listen_addresses=127.0.0.1", f"port={port}", "unix_socket_directories="):
            command += ["-c", setting]
        with (root / "postgres.log").open("wb") as log:
            process = subprocess.Popen(as_user + command, cwd=root, stdout=log, stderr=log)
        try:
            _create_database(tools, port, root / "postgres.log")
            yield f"postgresql://{_USER}:{_PASSWORD}@127.0.0.1:{port}/mlflow"
        finally:
            process.send_signal(signal.SIGINT)  # a fast shutdown
            process.wait(60)


def postgres_tools() -> Path:
    """The folder with initdb and postgres; Debian keeps it off the PATH."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name))
    on_path = shutil.which("initdb")
    if not found and not on_path:
        raise RuntimeError(
            "PostgreSQL is not installed: `apt-get install --no-install-recommends postgresql`."
        )
    return found[-1] if found else Path(str(on_path)).parent


def _create_database(tools: Path, port: int, log: Path) -> None:
    where: list[str | Path] = ["-h", "127.0.0.1", "-p", str(port), "-U", _USER]
    deadline = time.monotonic() + _START_TIMEOUT_S
    while subprocess.run([tools / "pg_isready", "-q", *where]).returncode:
        if time.monotonic() > deadline:
            raise RuntimeError(f"PostgreSQL does not respond: {log.read_text()[-2000:]}")
        time.sleep(0.1)
    environment = os.environ | {"PGPASSWORD": _PASSWORD}
    subprocess.run([tools / "createdb", *where, "mlflow"], check=True, env=environment)

"""Ceph's RADOS Gateway on loopback: a second, real S3 store for tests, which checks signatures.

One monitor, one OSD that keeps objects in memory and one gateway, in a cluster that ends with the tests.
On Debian: `apt-get install --no-install-recommends ceph-mon ceph-osd radosgw`.
"""

import os
import shutil
import socket
import subprocess
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

ACCESS_KEY, SECRET_KEY = "testaccess", "testsecret123"
_START_TIMEOUT_S = 60
_CONFIG = """
[global]
fsid = {fsid}
mon host = [v1:127.0.0.1:{mon_port}]
ms bind msgr2 = false
public addr = 127.0.0.1
public network = 127.0.0.0/8
auth cluster required = none
auth service required = none
auth client required = none
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 1
osd pool default pgp num = 1
osd pool default pg autoscale mode = off
osd crush chooseleaf type = 0
osd class update on start = false
osd crush update on start = false
mon allow pool size one = true
mon data avail crit = 0
paxos propose interval = 0.05
mon data = {root}/mon
osd data = {root}/osd
osd objectstore = memstore
memstore device bytes = 4G
keyring = {root}/keyring
admin socket = {root}/run/$name.asok
pid file = {root}/run/$name.pid
log file = {root}/log/$name.log
run dir = {root}/run
crash dir = {root}/log
[client.rgw.a]
rgw data = {root}/rgw
rgw frontends = beast endpoint=127.0.0.1:{rgw_port} tcp_nodelay=1
rgw thread pool size = 64
rgw run sync thread = false
"""


@contextmanager
def ceph_gateway(root: Path) -> Iterator[str]:
    """The endpoint of a running gateway, which knows only `ACCESS_KEY`.

    Args:
        root: An empty folder for its files. Its path must be short: it holds Unix sockets.

    Raises:
        RuntimeError: Ceph is not installed, or a part of it fails; the message quotes its log.
    """
    missing = [name for name in ("ceph", "ceph-mon", "ceph-osd", "radosgw") if shutil.which(name) is None]
    if missing:
        raise RuntimeError(
            f"{', '.join(missing)} is not installed. On Debian: "
            "apt-get install --no-install-recommends ceph-mon ceph-osd radosgw"
        )
    for name in ("mon", "osd", "rgw", "run", "log"):
        (root / name).mkdir()
    fsid, mon_port, rgw_port = str(uuid.uuid4()), _free_port(), _free_port()
    config = _CONFIG.format(fsid=fsid, root=root, mon_port=mon_port, rgw_port=rgw_port)
    (root / "ceph.conf").write_text(config)
    env = os.environ | {"CEPH_CONF": str(root / "ceph.conf")}

    def call(*command: str) -> str:
        done = subprocess.run(
            command, env=env, capture_output=True, text=True, timeout=_START_TIMEOUT_S, check=False
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}: {done.stderr[-2000:]}")
        return done.stdout

    with ExitStack() as daemons:

        def start(*command: str) -> None:
            daemons.enter_context(_daemon([*command, "-f"], env, root / "log" / f"{command[0]}.out"))

        keyring, monmap = f"{root}/keyring", f"{root}/monmap"
        call(
            "ceph-authtool", "--create-keyring", keyring, "--gen-key", "-n", "mon.", "--cap", "mon", "allow *"
        )
        call("ceph-authtool", keyring, "--gen-key", "-n", "client.admin", "--cap", "mon", "allow *",
             "--cap", "osd", "allow *")  # fmt: skip
        address = f"[v1:127.0.0.1:{mon_port}]"
        call("monmaptool", "--create", "--clobber", "--fsid", fsid, "--addv", "a", address, monmap)
        call("ceph-mon", "--mkfs", "-i", "a", "--monmap", monmap, "--keyring", keyring)
        start("ceph-mon", "-i", "a")
        osd_uuid = str(uuid.uuid4())
        osd = call("ceph", "osd", "new", osd_uuid).strip()
        call("ceph", "osd", "crush", "add", f"osd.{osd}", "1.0", "host=h", "root=default")
        call("ceph-osd", "-i", osd, "--mkfs", "--osd-uuid", osd_uuid)
        start("ceph-osd", "-i", osd)
        start("radosgw", "-n", "client.rgw.a")
        call("radosgw-admin", "user", "create", "--uid=test", "--display-name=test",
             f"--access-key={ACCESS_KEY}", f"--secret-key={SECRET_KEY}")  # fmt: skip
        _wait_for(rgw_port)
        yield f"http://127.0.0.1:{rgw_port}"


@contextmanager
def _daemon(command: list[str], env: dict[str, str], log: Path) -> Iterator[None]:
    with log.open("wb") as out:
        process = subprocess.Popen(command, env=env, stdout=out, stderr=out)
    try:
        yield
    finally:
        process.kill()  # it keeps everything in memory
        process.wait()


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def _wait_for(port: int) -> None:
    deadline = time.monotonic() + _START_TIMEOUT_S
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise RuntimeError(f"the gateway does not answer on port {port}") from error
            time.sleep(0.1)

"""A Prometheus that watches a real run has something to show in every panel: `make test-monitoring`."""

import json
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml

from tests.conftest import S3
from tests.support.monitoring import dashboard, groups
from tests.support.runs import run_config, run_to_end
from tests.support.servers.processes import Server
from tests.support.servers.ray_nodes import free_port

pytestmark = pytest.mark.tier


@pytest.fixture
def prometheus(ray_session: None, tmp_path: Path) -> Iterator[Server]:
    """A server with our rules that asks the node of this session every second."""
    (node,) = ray.nodes()
    target = f"{node['NodeManagerAddress']}:{node['MetricsExportPort']}"
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(groups()))
    config = {
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "rule_files": [str(tmp_path / "rules.yaml")],
        "scrape_configs": [{"job_name": "ray", "static_configs": [{"targets": [target]}]}],
    }
    (tmp_path / "prometheus.yaml").write_text(yaml.safe_dump(config))
    port = free_port()
    command = [
        "prometheus",
        f"--config.file={tmp_path}/prometheus.yaml",
        f"--storage.tsdb.path={tmp_path}/data",
    ]
    command.append(f"--web.listen-address=127.0.0.1:{port}")
    with Server(command, port, ready="Server is ready", log=tmp_path / "prometheus.log") as server:
        yield server


def ask(server: Server, path: str, **query: Any) -> Any:
    with urllib.request.urlopen(
        f"{server.url}/api/v1/{path}?{urllib.parse.urlencode(query)}", timeout=20
    ) as answer:
        return json.loads(answer.read())["data"]


def test_every_panel_shows_a_run_and_every_rule_is_evaluated(
    prometheus: Server, s3: S3, photos: dict[str, bytes], tmp_path: Path
) -> None:
    bucket = s3.make_bucket("watched", {f"photos/{name}": data for name, data in photos.items()})
    started = time.time()
    run_to_end(run_config(bucket, tmp_path, "name=watched", "train.num_workers=1"))
    time.sleep(3)
    times = {"start": started, "end": time.time(), "step": 1}
    for panel in dashboard()["panels"]:
        for target in panel["targets"]:
            text = target["expr"].replace("$run", "watched")
            found = ask(prometheus, "query_range", query=text, **times)["result"]
            assert [one["metric"] for one in found] == [{"run": "watched"}], (panel["title"], text)
    rules = [rule for group in ask(prometheus, "rules")["groups"] for rule in group["rules"]]
    assert {(rule["health"], rule["state"]) for rule in rules} == {("ok", "inactive")}
    runs = ask(prometheus, "label/run/values", **{"match[]": "ray_ctmsr_step"})
    assert runs == ["watched"]  # what the dashboard offers to choose from

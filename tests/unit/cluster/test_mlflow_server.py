"""The MLflow server of cluster/mlflow: closed, with a login, and the same by compose and Kubernetes.

Its command is given to MLflow's own command line, offline.
"""

import configparser
import json
import re
from typing import Any

import click
import mlflow.cli
import pytest

from tests.support.manifests import (
    CLUSTER,
    SECRET,
    SERVER,
    Tree,
    edited,
    image_problems,
    load,
    objects,
    parts,
)


def compose() -> Tree:
    (config,) = load(CLUSTER / "mlflow/compose.yaml")
    return config


def compose_problems(config: Tree) -> list[str]:
    found: list[str] = []
    for name, service in config["services"].items():
        found += image_problems(service["image"])
        found += [f"{port} is open" for port in service.get("ports", []) if not port.startswith("127.0.0.1:")]
        found += [
            f"{variable} is in the file"
            for variable, value in service["environment"].items()
            if SECRET.search(variable) and not re.match(r"\$\{\w+:\?.*\}$", value)
        ]
        if service.get("cap_drop") != ["ALL"] or "no-new-privileges:true" not in service["security_opt"]:
            found.append(f"{name} keeps capabilities")
        if "healthcheck" not in service:
            found.append(f"{name} is not watched")
        found += [
            f"{other} is no service"
            for other in service.get("depends_on", {})
            if other not in config["services"]
        ]
    return found


def test_compose_is_closed_and_complete() -> None:
    assert compose_problems(compose()) == []
    text = (CLUSTER / "mlflow/compose.yaml").read_text()
    example = (CLUSTER / "mlflow/env.example").read_text()
    assert set(re.findall(r"\$\{(\w+)", text)) == set(re.findall(r"^(\w+)=", example, re.MULTILINE))


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("services/mlflow/ports/0", "5000:5000", "is open"),
        ("services/mlflow/ports/0", "0.0.0.0:5000:5000", "is open"),
        ("services/postgres/image", "postgres", "is not pinned"),
        ("services/postgres/environment/POSTGRES_PASSWORD", "mlflow", "is in the file"),
        ("services/postgres/environment/POSTGRES_PASSWORD", "${POSTGRES_PASSWORD:-mlflow}", "is in the file"),
        ("services/mlflow/cap_drop", None, "keeps capabilities"),
        ("services/mlflow/depends_on/database", {}, "is no service"),
    ],
)
def test_a_broken_compose_file_is_refused(path: str, value: Any, message: str) -> None:
    found = compose_problems(edited(compose(), path, value))
    assert any(message in text for text in found), found


def test_compose_and_kubernetes_tell_the_server_the_same() -> None:
    server, storage = objects()[SERVER], objects()["storage.yaml ConfigMap storage"]
    (variables,) = parts(server, "env")
    there = {variable["name"] for variable in variables} | set(storage["data"])
    assert there == set(compose()["services"]["mlflow"]["environment"])
    images = {service["image"] for service in compose()["services"].values()}
    others = {image for name, o in objects().items() if "mlflow" in name for image in parts(o, "image")}
    assert images == {image.rpartition("/")[2] for image in others}


def server_options(dockerfile: str) -> Tree:
    """What MLflow's own command line makes of the command in a Dockerfile."""
    (command,) = re.findall(r"^CMD (\[.*\])", dockerfile.replace("\\\n", ""), re.MULTILINE)
    program, verb, *arguments = json.loads(command)
    assert (program, verb) == ("mlflow", "server")
    return dict(mlflow.cli.cli.commands[verb].make_context(verb, arguments).params)


def test_the_mlflow_server_asks_for_a_login(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_ARTIFACTS_DESTINATION", "s3://bucket/mlflow")
    options = server_options((CLUSTER / "mlflow/Dockerfile").read_text())
    assert options["app_name"] == "basic-auth"
    assert options["artifacts_destination"] == "s3://bucket/mlflow"
    login = configparser.ConfigParser()
    login.read(CLUSTER / "mlflow/basic_auth.ini")
    assert login["mlflow"]["database_uri"] == options["backend_store_uri"]
    assert "@postgres:5432" in options["backend_store_uri"]
    assert re.search("//[^:/]+@", options["backend_store_uri"])  # no password: that is PGPASSWORD
    assert "admin_password" not in login["mlflow"]


def test_a_broken_server_command_is_refused() -> None:
    with pytest.raises(click.NoSuchOption):
        server_options(
            'CMD ["mlflow", "server", "--app", "basic-auth", "--artifact-destination", "s3://b"]\n'
        )

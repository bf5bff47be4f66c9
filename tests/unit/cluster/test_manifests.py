"""What cluster/ gives to Kubernetes: what would refuse it there refuses it here, offline.

Kubernetes is asked by its schemas, KubeRay by a schema of ours, Ray by its autoscaler, and this project's
commands by their own parsers.
"""

import json
import re
import shlex
from collections.abc import Callable
from typing import Any

import pytest
from mlflow.server.security_utils import is_allowed_host_header
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr

from ctmsr.errors import UserError
from tests.support.commands import command_module
from tests.support.manifest_problems import entrypoint_problems, problems
from tests.support.manifests import (
    CLUSTER,
    JOBS,
    KUBERNETES,
    SERVER,
    Tree,
    edited,
    load,
    name_of,
    objects,
    parts,
)

PLACEHOLDER = "REPLACE_ME"


@pytest.mark.parametrize("name", objects())
def test_kubernetes_takes_every_object(name: str) -> None:
    assert problems(objects()[name]) == []


CLUSTER_OBJECT = "cluster.yaml RayCluster ctmsr"
JOB = "train.yaml RayJob train-"
HEAD = "spec/headGroupSpec/template/spec"
SERVER_CONTAINER = "spec/template/spec/containers/0"


@pytest.mark.parametrize(
    ("name", "path", "value", "message"),
    [
        (CLUSTER_OBJECT, "spec/authOption", {"mode": "token"}, "'authOption' was unexpected"),
        (CLUSTER_OBJECT, "spec/authOptions/mode", "password", "'password' is not one of"),
        (CLUSTER_OBJECT, "spec/rayVersion", None, "'rayVersion' is a required property"),
        (CLUSTER_OBJECT, "spec/workerGroupSpecs/0/minReplicas", "0", "'0' is not of type 'integer'"),
        (CLUSTER_OBJECT, "spec/headGroupSpec/rayStartParams/num-cpus", 0, "0 is not of type 'string'"),
        (CLUSTER_OBJECT, "spec/headGroupSpec/serviceType", "LoadBalancer", "open to others"),
        (CLUSTER_OBJECT, f"{HEAD}/restartPolicy", "Always", "'Never' was expected"),
        (CLUSTER_OBJECT, f"{HEAD}/hostNetwork", True, "hostNetwork opens the machine"),
        (CLUSTER_OBJECT, f"{HEAD}/containers/0/resource", {}, "'resource' was unexpected"),
        (CLUSTER_OBJECT, f"{HEAD}/containers/0/image", "ctmsr-ray:latest", "is not pinned"),
        (CLUSTER_OBJECT, f"{HEAD}/containers/0/image", "ctmsr-ray:9.0.0", "is not version"),
        (
            CLUSTER_OBJECT,
            f"{HEAD}/containers/0/env/1",
            {"name": "AWS_SECRET_ACCESS_KEY", "value": "x"},
            "is in",
        ),
        (CLUSTER_OBJECT, f"{HEAD}/securityContext/runAsNonRoot", None, "may run as root"),
        (JOB, "spec/clusterSelector", None, "is not valid under any of the given schemas"),
        (JOB, "metadata/generateName", "Train-", "does not match"),
        (JOB, "spec/entrypoint", "python -m pipelines.train --presets published", "pipelines.train: 2"),
        (
            JOB,
            "spec/entrypoint",
            "python -m pipelines.train --set train.num_worker=4",
            "Did you mean num_workers",
        ),
        (JOB, "spec/entrypoint", "python -m pipelines.index", "pipelines.index: 2"),
        (SERVER, f"{SERVER_CONTAINER}/ports/0/containerPort", "5000", "is not of type 'integer'"),
        (SERVER, f"{SERVER_CONTAINER}/securityContext/capabilities", None, "keeps capabilities"),
        (SERVER, f"{SERVER_CONTAINER}/resources/requests", None, "does not say what it needs"),
        ("mlflow.yaml Service mlflow", "spec/type", "NodePort", "open to others"),
        ("mlflow.yaml Service mlflow", "spec/ports/0/port", None, "'port' is a required property"),
        ("mlflow.yaml StatefulSet postgres", "spec/selector", None, "'selector' is a required property"),
        ("storage.yaml ConfigMap storage", "data/AWS_REGION", 1, "is not of type 'string'"),
    ],
)
def test_a_broken_object_is_refused(
    name: str, path: str, value: Any, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    found = problems(edited(objects()[name], path, value))
    assert any(message in text for text in found), found


def jobs() -> list[Tree]:
    return [document for path in JOBS for document in load(path)]


def test_secrets_are_all_there_and_have_no_value() -> None:
    secrets = [document for document in objects().values() if document["kind"] == "Secret"]
    given = {(secret["metadata"]["name"], key) for secret in secrets for key in secret["stringData"]}
    asked = {
        (reference["name"], reference["key"])
        for document in objects().values()
        for reference in parts(document, "secretKeyRef")
    }
    token = objects()[CLUSTER_OBJECT]["spec"]["authOptions"]["secretName"]
    assert given == asked | {(token, "auth_token")}  # KubeRay's name for it
    values = {(key, value) for secret in secrets for key, value in secret["stringData"].items()}
    assert {value for key, value in values if key != "username"} == {PLACEHOLDER}


def test_settings_are_all_there() -> None:
    maps = {name_of(document) for document in objects().values() if document["kind"] == "ConfigMap"}
    assert {
        reference["name"] for document in objects().values() for reference in parts(document, "configMapRef")
    } == maps


def test_no_file_of_the_cluster_has_a_key() -> None:
    files = [path for path in CLUSTER.rglob("*") if path.is_file() and path.suffix not in (".lock", ".pyc")]
    assert len(files) > 15
    assert [path for path in files if looks_like_a_key(path.read_text())] == []


KEY = re.compile(r"\b(AKIA|ASIA)[0-9A-Z]{16}\b|-----BEGIN|\b[0-9a-f]{32,}\b|\b[A-Za-z0-9+/]{40}\b")


def looks_like_a_key(text: str) -> bool:
    without_paths = re.sub(r"path: /spec/[A-Za-z0-9/]+", "", text)  # in patches of kustomize
    return bool(KEY.search(without_paths))


@pytest.mark.parametrize("text", ["AKIA" + "A1" * 8, "token: " + "0af3" * 16, "secret: " + "aB3d" * 10])
def test_a_key_is_seen(text: str) -> None:
    assert looks_like_a_key(text)


@pytest.fixture
def config_of(capsys: pytest.CaptureFixture[str]) -> Callable[[str], Tree]:
    """The resolved config of a job's command."""

    def run(name: str) -> Tree:
        (job,) = load(KUBERNETES / "jobs" / f"{name}.yaml")
        capsys.readouterr()
        assert list(entrypoint_problems(job["spec"]["entrypoint"])) == []
        config: Tree = json.loads(capsys.readouterr().out)
        return config

    return run


def test_jobs_fit_the_cluster(config_of: Callable[[str], Tree]) -> None:
    """A job that asks for more GPUs than there can be would wait for ever."""
    groups = {group["groupName"]: group for group in objects()[CLUSTER_OBJECT]["spec"]["workerGroupSpecs"]}
    num_gpus = groups["gpu"]["maxReplicas"]
    train, tune = config_of("train"), config_of("tune")
    assert train["train"]["num_workers"] == num_gpus
    assert tune["train"]["num_workers"] * tune["tune"]["max_concurrent"] == num_gpus
    assert train["name"] == config_of("register")["name"]


def test_jobs_find_the_cluster_the_bucket_and_mlflow() -> None:
    selectors = {job["spec"]["clusterSelector"]["ray.io/cluster"] for job in jobs()}
    assert selectors == {name_of(objects()[CLUSTER_OBJECT])}
    commands = [job["spec"]["entrypoint"] for job in jobs()]
    assert {path.stem for path in JOBS} == {"index", "train", "tune", "register", "upscale"}
    assert all(set(re.findall("s3://([^/ ]+)", command)) == {"BUCKET"} for command in commands)
    service = objects()["mlflow.yaml Service mlflow"]
    host = f"{name_of(service)}:{service['spec']['ports'][0]['port']}"
    asked = {uri for command in commands for uri in re.findall("--tracking-uri ([^ ]+)", command)}
    assert asked == {f"http://{host}"}
    (allowed,) = [
        variable["value"]
        for variables in parts(objects()[SERVER], "env")
        for variable in variables
        if variable["name"] == "MLFLOW_SERVER_ALLOWED_HOSTS"
    ]
    assert is_allowed_host_header(allowed.split(","), host)
    assert not is_allowed_host_header(allowed.split(","), "elsewhere:5000")


@pytest.mark.parametrize("name", ["index", "train", "tune"])
def test_a_job_without_a_bucket_says_so(name: str) -> None:
    """The others ask MLflow first."""
    (job,) = load(KUBERNETES / f"jobs/{name}.yaml")
    _, _, module, *arguments = shlex.split(job["spec"]["entrypoint"])
    on_cpus = [] if name == "index" else ["--set", "train.use_gpu=false"]
    with pytest.raises(UserError, match="names no bucket: BUCKET stands for yours in the manifests"):
        command_module(module).main([*arguments, *on_cpus])


def test_rays_autoscaler_reads_the_cluster() -> None:
    cluster = edited(objects()[CLUSTER_OBJECT], "metadata/namespace", "ctmsr")
    types = _derive_autoscaling_config_from_ray_cr(cluster)["available_node_types"]
    assert types["gpu"]["resources"]["GPU"] == 1
    assert "GPU" not in types["cpu"]["resources"]
    assert types["headgroup"]["resources"]["CPU"] == 0
    (job,) = load(KUBERNETES / "jobs/upscale.yaml")
    assert set(json.loads(job["spec"]["entrypointResources"])) <= set(types["gpu"]["resources"])
    lock = (CLUSTER / "requirements.lock").read_text()
    assert re.findall(r"^ray(?:\[.*\])?==(\S+)", lock, re.MULTILINE) == [cluster["spec"]["rayVersion"]]

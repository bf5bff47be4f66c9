"""What cluster/ gives to Kubernetes: what would refuse it there refuses it here, offline.

Kubernetes is asked by its schemas, KubeRay by a schema of ours, Ray by its autoscaler, and this project's
commands by their own parsers.
"""

import importlib.metadata
import json
import re
import shlex
from collections.abc import Callable, Iterator
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
from mlflow.server.security_utils import is_allowed_host_header
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr

from ctmsr.errors import UserError
from tests.support.commands import command_module
from tests.support.manifests import (
    CLUSTER,
    JOBS,
    KUBERNETES,
    SECRET,
    SERVER,
    Tree,
    edited,
    image_problems,
    load,
    name_of,
    objects,
    parts,
)
from tests.support.repository import ROOT

KUBERAY = json.loads((ROOT / "tests/fixtures/kuberay.json").read_text())
PLACEHOLDER = "REPLACE_ME"


def pods(document: Tree) -> list[Tree]:
    """The pod templates of an object."""
    return [template for template in parts(document, "template") if "spec" in template]


def problems(document: Tree) -> list[str]:
    """What is wrong with a Kubernetes object; nothing, if the list is empty."""
    found = [*_structure(document), *_exposure(document)]
    for pod in pods(document):
        found += _pod(pod["spec"])
    if document["kind"] == "RayJob":
        found += _entrypoint(document["spec"].get("entrypoint", ""))
    return found


def _structure(document: Tree) -> Iterator[str]:
    checked = [document]
    if document["apiVersion"] == "ray.io/v1":
        for error in jsonschema.Draft202012Validator(KUBERAY).iter_errors(document):
            yield f"{error.json_path}: {error.message}"
        checked = [
            {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "pod"}, "template": pod}
            for pod in pods(document)
        ]
    for each in checked:
        try:
            kubernetes_validate.validate(each, kubernetes_validate.latest_version(), strict=True)
        except (kubernetes_validate.ValidationError, kubernetes_validate.SchemaNotFoundError) as error:
            yield error.message


def _exposure(document: Tree) -> Iterator[str]:
    types = list(parts(document, "serviceType"))
    if document["kind"] == "Service":
        types.append(document["spec"].get("type", "ClusterIP"))
    if set(types) - {"ClusterIP"}:
        yield f"a service of type {types[0]} is open to others than the cluster"
    for key in ("hostNetwork", "hostPort", "nodePort", "externalIPs", "hostPath"):
        if any(parts(document, key)):
            yield f"{key} opens the machine"


def _pod(pod: Tree) -> Iterator[str]:
    user = pod.get("securityContext", {})
    if not user.get("runAsNonRoot") or not user.get("runAsUser"):
        yield "the pod may run as root"
    for container in pod["containers"]:
        lock = container.get("securityContext", {})
        if lock.get("allowPrivilegeEscalation") is not False or lock.get("privileged"):
            yield f"{container['name']} may become root"
        if lock.get("capabilities", {}).get("drop") != ["ALL"]:
            yield f"{container['name']} keeps capabilities"
        if not {"cpu", "memory"} <= set(container.get("resources", {}).get("requests", {})):
            yield f"{container['name']} does not say what it needs"
        yield from image_problems(container["image"])
        for variable in container.get("env", []):
            if SECRET.search(variable["name"]) and "value" in variable:
                yield f"{variable['name']} is in the manifest"


def _entrypoint(command: str) -> Iterator[str]:
    """Lets the command's own parser read it, and for those that have one, the config."""
    python, option, module, *arguments = shlex.split(command)
    if (python, option) != ("python", "-m"):
        yield f"{command} is no command of this project"
        return
    code = command_module(module)
    try:
        if hasattr(code, "build_parser"):
            code.build_parser().parse_args(arguments)
        else:
            code.main([*arguments, "--dry-run"])
    except (SystemExit, UserError) as error:
        yield f"{module}: {error}"


@pytest.mark.parametrize("name", objects())
def test_kubernetes_takes_every_object(name: str) -> None:
    assert problems(objects()[name]) == []


CLUSTER_OBJECT = "ray.yaml RayCluster ctmsr"
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


def test_kustomize_builds_from_every_object() -> None:
    (customization,) = load(KUBERNETES / "kustomization.yaml")
    there = {path.name for path in KUBERNETES.glob("*.yaml")}
    assert set(customization["resources"]) == there - {"kustomization.yaml", "secrets.example.yaml"}
    images = {
        image.partition(":")[0] for document in objects().values() for image in parts(document, "image")
    }
    assert {image["name"] for image in customization["images"]} == images - {"postgres"}
    assert all(document["metadata"]["namespace"] == customization["namespace"] for document in jobs())


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
    return bool(KEY.search(text))


@pytest.mark.parametrize("text", ["AKIA" + "A1" * 8, "token: " + "0af3" * 16, "secret: " + "aB3d" * 10])
def test_a_key_is_seen(text: str) -> None:
    assert looks_like_a_key(text)


@pytest.fixture
def config_of(capsys: pytest.CaptureFixture[str]) -> Callable[[str], Tree]:
    """The resolved config of a job's command."""

    def run(name: str) -> Tree:
        (job,) = load(KUBERNETES / "jobs" / f"{name}.yaml")
        capsys.readouterr()
        assert list(_entrypoint(job["spec"]["entrypoint"])) == []
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


def test_rays_autoscaler_reads_the_cluster() -> None:
    cluster = edited(objects()[CLUSTER_OBJECT], "metadata/namespace", "ctmsr")
    types = _derive_autoscaling_config_from_ray_cr(cluster)["available_node_types"]
    assert types["gpu"]["resources"]["GPU"] == 1
    assert "GPU" not in types["cpu"]["resources"]
    assert types["headgroup"]["resources"]["CPU"] == 0
    (job,) = load(KUBERNETES / "jobs/upscale.yaml")
    assert set(json.loads(job["spec"]["entrypointResources"])) <= set(types["gpu"]["resources"])
    ours, installed = cluster["spec"]["rayVersion"], importlib.metadata.version("ray")
    assert ours.split(".")[:2] == installed.split(".")[:2]

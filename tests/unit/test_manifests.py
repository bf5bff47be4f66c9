"""The files of cluster/: what would refuse them there refuses them here, offline, and is asked for real.

Kubernetes by its schemas, KubeRay by a schema of ours, Ray by its autoscaler and its command line, EC2 by
botocore's model, MLflow by its command line, and this project's commands by their own parsers.
"""

import configparser
import copy
import importlib
import importlib.metadata
import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import botocore.session
import botocore.validate
import click
import jsonschema
import kubernetes_validate
import mlflow.cli
import pytest
import yaml
from mlflow.server.security_utils import is_allowed_host_header
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.scripts.scripts import cli as ray_cli

from ctmsr.errors import UserError
from tests.child import ROOT

Tree = dict[str, Any]

CLUSTER = ROOT / "cluster"
KUBERNETES = CLUSTER / "kubernetes"
JOBS = sorted((KUBERNETES / "jobs").glob("*.yaml"))
KUBERAY = json.loads((ROOT / "tests/fixtures/kuberay.json").read_text())
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
SECRET = re.compile(r"(PASSWORD|SECRET|TOKEN|ACCESS_KEY)", re.IGNORECASE)
PLACEHOLDER = "REPLACE_ME"


def load(path: Path) -> list[Tree]:
    """The documents of a YAML file."""
    return list(yaml.safe_load_all(path.read_text()))


def objects() -> dict[str, Tree]:
    """Every Kubernetes object of the manifests, by file and kind."""
    files = [*KUBERNETES.glob("*.yaml"), *JOBS]
    return {
        f"{path.name} {document['kind']} {name_of(document)}": document
        for path in files
        if path.name != "kustomization.yaml"
        for document in load(path)
    }


def name_of(document: Tree) -> str:
    metadata: Tree = document["metadata"]
    return str(metadata.get("name") or metadata["generateName"])


def parts(tree: Any, key: str) -> Iterator[Any]:
    """Every value at `key`, at any depth."""
    if isinstance(tree, dict):
        if key in tree:
            yield tree[key]
        tree = list(tree.values())
    if isinstance(tree, list):
        for part in tree:
            yield from parts(part, key)


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
        yield from _image(container["image"])
        for variable in container.get("env", []):
            if SECRET.search(variable["name"]) and "value" in variable:
                yield f"{variable['name']} is in the manifest"


def _image(image: str) -> Iterator[str]:
    tag = image.partition(":")[2]
    if not re.match(r"\d+\.\d+", tag):
        yield f"{image} is not pinned"
    if image.startswith("ctmsr-") and tag != VERSION:
        yield f"{image} is not version {VERSION} of this project"


def _entrypoint(command: str) -> Iterator[str]:
    """Lets the command's own parser read it, and for those that have one, the config."""
    python, option, module, *arguments = shlex.split(command)
    if (python, option) != ("python", "-m"):
        yield f"{command} is no command of this project"
        return
    code = importlib.import_module(module)
    try:
        if hasattr(code, "build_parser"):
            code.build_parser().parse_args(arguments)
        else:
            code.main([*arguments, "--dry-run"])
    except (SystemExit, UserError) as error:
        yield f"{module}: {error}"


def edited(document: Tree, path: str, value: Any) -> Tree:
    """A copy with another value at a path of keys and indices; None takes the key away."""
    changed = copy.deepcopy(document)
    *way, last = [int(step) if step.isdigit() else step for step in path.split("/")]
    place: Any = changed
    for step in way:
        place = place[step]
    if value is None:
        del place[last]
    else:
        place[last] = value
    return changed


@pytest.mark.parametrize("name", objects())
def test_kubernetes_takes_every_object(name: str) -> None:
    assert problems(objects()[name]) == []


CLUSTER_OBJECT = "ray.yaml RayCluster ctmsr"
JOB = "train.yaml RayJob train-"
SERVER = "mlflow.yaml Deployment mlflow"
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


def aws() -> Tree:
    (config,) = load(CLUSTER / "aws.yaml")
    return config


def check_aws(config: Tree) -> Tree:
    """What `ray up` makes of it before it calls AWS, and what EC2 would say to each kind of machine."""
    prepared: Tree = prepare_config(copy.deepcopy(config))
    validate_config(prepared)
    shape = (
        botocore.session.get_session().get_service_model("ec2").operation_model("RunInstances").input_shape
    )
    for name, node in prepared["available_node_types"].items():
        machine = dict(node["node_config"], MinCount=1, MaxCount=1)
        del machine["SubnetIds"]  # Ray's own: it chooses one
        report = botocore.validate.ParamValidator().validate(machine, shape)
        assert not report.has_errors(), f"{name}: {report.generate_report()}"
        assert machine["SecurityGroupIds"], f"{name}: Ray would make a group that lets the world try SSH"
        assert machine["IamInstanceProfile"], f"{name}: no access to S3"
        is_spot = machine.get("InstanceMarketOptions", {}).get("MarketType") == "spot"
        assert is_spot == (name != prepared["head_node_type"])
    for command in [*prepared["head_start_ray_commands"], *prepared["worker_start_ray_commands"]]:
        program, verb, *arguments = shlex.split(command)
        assert program == "ray"
        options = ray_cli.commands[verb].make_context(verb, arguments).params
        assert options.get("dashboard_host") in (None, "127.0.0.1"), "the dashboard is open"
    return prepared


def test_ray_up_takes_the_aws_file() -> None:
    prepared = check_aws(aws())
    assert prepared["setup_commands"] == []  # else Ray's example, which installs another Ray
    assert prepared["available_node_types"]["gpu"]["min_workers"] == 0
    assert prepared["available_node_types"]["gpu"]["resources"]["GPU"] == 1
    assert list(_image(prepared["docker"]["image"].rpartition("/")[2])) == []
    assert "~/.ray/auth_token" in prepared["file_mounts"]


@pytest.mark.parametrize(
    ("path", "value", "error"),
    [
        ("max_worker", 3, jsonschema.ValidationError),
        ("available_node_types/gpu/resources/GPU", "1", jsonschema.ValidationError),
        ("available_node_types/gpu/node_config", None, jsonschema.ValidationError),
        ("head_node_type", "heads", ValueError),
        ("max_workers", 0, ValueError),
        ("available_node_types/gpu/node_config/InstanceTyp", "g6e.2xlarge", AssertionError),
        ("available_node_types/cpu/node_config/BlockDeviceMappings/0/Ebs/VolumeSize", "big", AssertionError),
        ("available_node_types/cpu/node_config/InstanceMarketOptions", None, AssertionError),
        ("available_node_types/head/node_config/SecurityGroupIds", [], AssertionError),
        ("head_start_ray_commands/1", "ray start --head --dashboard-host=0.0.0.0", AssertionError),
        ("worker_start_ray_commands/1", "ray start --adress=HEAD:6379", click.NoSuchOption),
    ],
)
def test_a_broken_aws_file_is_refused(path: str, value: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        check_aws(edited(aws(), path, value))


def compose() -> Tree:
    (config,) = load(CLUSTER / "mlflow/compose.yaml")
    return config


def compose_problems(config: Tree) -> list[str]:
    found: list[str] = []
    for name, service in config["services"].items():
        found += _image(service["image"])
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
    assert images == {
        image for name, o in objects().items() if "mlflow" in name for image in parts(o, "image")
    }


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


DOCKERFILES = [CLUSTER / "Dockerfile", CLUSTER / "mlflow/Dockerfile"]


def hadolint(dockerfile: str) -> str:
    """What the linter says to a Dockerfile: nothing, if all is well."""
    program = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or "hadolint"
    done = subprocess.run([program, "-"], input=dockerfile, capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


@pytest.mark.parametrize("path", DOCKERFILES, ids=str)
def test_images_are_pinned_and_not_root(path: Path) -> None:
    text = path.read_text()
    assert re.findall(r"^FROM (\S+)", text, re.MULTILINE) == ["python:3.11.14-slim-bookworm"]
    assert re.findall(r"^USER (\S+)", text, re.MULTILINE)[-1] == "1000:1000"
    assert all("--require-hashes" in line for line in text.splitlines() if line.startswith("RUN pip"))
    assert hadolint(text) == ""


def test_the_linter_sees_an_image_that_is_not_pinned() -> None:
    assert "DL3007" in hadolint("FROM python:latest\n")


def test_the_image_gets_what_it_copies() -> None:
    admitted = {
        line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")
    }
    copied = re.findall(r"^COPY (\S+)", (CLUSTER / "Dockerfile").read_text(), re.MULTILINE)
    assert set(copied) == admitted
    assert all((ROOT / name).exists() for name in copied if not name.endswith(".lock"))


LOCKED = {ROOT / "requirements.txt": CLUSTER / "requirements.lock"} | {
    CLUSTER / "mlflow/requirements.txt": CLUSTER / "mlflow/requirements.lock"
}


@pytest.mark.parametrize(("asked", "lock"), LOCKED.items(), ids=str)
def test_what_images_install_is_locked_and_what_is_asked_for(asked: Path, lock: Path) -> None:
    pins = re.findall(
        r"^([a-z0-9._-]+)(?:\[.*\])?==(\S+) \\\n +--hash=sha256:", lock.read_text(), re.MULTILINE
    )
    versions = dict(pins)
    assert len(versions) == len(re.findall("^[a-z]", lock.read_text(), re.MULTILINE))  # each has a hash
    for name, specifier in requirements(asked).items():
        version = versions[canonicalize_name(name)]
        assert specifier.contains(version), f"{name} {version} is not {specifier}: run sh cluster/lock.sh"


def test_the_image_brings_cuda() -> None:
    """A lock made where torch is installed without CUDA would make an image without it."""
    assert re.search(r"^nvidia-nccl\S*==", (CLUSTER / "requirements.lock").read_text(), re.MULTILINE)


def requirements(path: Path) -> dict[str, SpecifierSet]:
    """What a requirements.txt asks for, by package."""
    lines = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
    return {requirement.name: requirement.specifier for requirement in map(Requirement, lines)}


def test_the_mlflow_server_is_of_the_clients_series() -> None:
    server, client = (
        requirements(CLUSTER / "mlflow/requirements.txt"),
        requirements(ROOT / "requirements.txt"),
    )
    assert {name: server[name] for name in ("mlflow", "boto3")} == {
        name: client[name] for name in ("mlflow", "boto3")
    }

"""What is wrong with an object of cluster/kubernetes, without a Kubernetes to ask.

Kubernetes is asked by its schemas, KubeRay and the Prometheus operator by schemas of ours, and this project's
commands by their own parsers.
"""

import json
import shlex
from collections.abc import Iterator

import jsonschema
import kubernetes_validate

from ctmsr.errors import UserError
from tests.support.commands import command_module
from tests.support.manifests import SECRET, Tree, image_problems, parts
from tests.support.repository import FIXTURES

OPERATORS = {
    "ray.io/v1": json.loads((FIXTURES / "kuberay.json").read_text()),
    "monitoring.coreos.com/v1": json.loads((FIXTURES / "prometheus_operator.json").read_text()),
}
"""Schemas of objects that Kubernetes itself does not know, by API version."""


def pods(document: Tree) -> list[Tree]:
    """The pod templates of an object."""
    return [template for template in parts(document, "template") if "spec" in template]


def problems(document: Tree) -> list[str]:
    """What is wrong with a Kubernetes object; nothing, if the list is empty."""
    found = [*_structure(document), *_exposure(document)]
    for pod in pods(document):
        found += _pod(pod["spec"])
    if document["kind"] == "RayJob":
        found += entrypoint_problems(document["spec"].get("entrypoint", ""))
    return found


def _structure(document: Tree) -> Iterator[str]:
    checked = [document]
    if schema := OPERATORS.get(document["apiVersion"]):
        for error in jsonschema.Draft202012Validator(schema).iter_errors(document):
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


def entrypoint_problems(command: str) -> Iterator[str]:
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

"""What kustomize makes of cluster/kubernetes: the cluster, a job with its own, the service, and options."""

import json
import shutil
from typing import Any

import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from tests.support.manifest_problems import problems
from tests.support.manifests import KUBERNETES, Tree, edited, load, name_of, objects, parts, rendered

pytestmark = pytest.mark.skipif(not shutil.which("kubectl"), reason="kubectl renders the manifests")

VARIANTS = [
    (".",),
    (".", "redis", "monitoring"),
    ("job",),
    ("serve",),
    ("serve", "redis"),
]


@pytest.mark.parametrize("variant", VARIANTS, ids=" ".join)
def test_kubernetes_takes_every_object_of_a_variant(variant: tuple[str, ...]) -> None:
    found = rendered(*variant)
    assert {name: problems(document) for name, document in found.items() if problems(document)} == {}
    others = [name for name, document in found.items() if document["kind"] != "Namespace"]
    assert {found[name]["metadata"]["namespace"] for name in others} == {"ctmsr"}


def test_every_object_is_in_a_variant() -> None:
    """Apart from jobs and secrets, which are created one by one."""
    built = {name for variant in VARIANTS for name in rendered(*variant)}
    written = {
        f"{document['kind']} {name_of(document)}"
        for path in KUBERNETES.rglob("*.yaml")
        if path.name not in ("kustomization.yaml", "secrets.example.yaml")
        and path.parent.name not in ("jobs", "maintenance")
        for document in load(path)
        if isinstance(document, dict)
    }
    assert built - {"ConfigMap ctmsr-dashboard"} == written


def test_images_are_those_of_the_registry_that_was_named() -> None:
    images = {image for variant in VARIANTS for image in parts(list(rendered(*variant).values()), "image")}
    named = {
        entry["newName"]
        for file in KUBERNETES.rglob("kustomization.yaml")
        for entry in load(file)[0].get("images", [])
    }
    assert {image.partition(":")[0] for image in images} == named | {"postgres", "redis"}


def cluster_of(variant: tuple[str, ...], path: tuple[str, ...]) -> Tree:
    """The part of a rendered variant at a path of keys."""
    found: Any = rendered(*variant)
    for key in path:
        found = found[key]
    return dict(found)


def test_a_job_and_the_service_have_the_pods_of_the_cluster() -> None:
    cluster = cluster_of((".",), ("RayCluster ctmsr", "spec"))
    serving = cluster_of(("serve",), ("RayService upscale", "spec", "rayClusterConfig"))
    assert edited(serving, "workerGroupSpecs/0/minReplicas", 0) == cluster
    assert serving["workerGroupSpecs"][0]["minReplicas"] == 1
    own = cluster_of(("job",), ("RayJob train", "spec", "rayClusterSpec"))
    assert {name for name in cluster if own.get(name) != cluster[name]} == {
        "workerGroupSpecs",
        "enableInTreeAutoscaling",
        "autoscalerOptions",
    }
    groups = zip(own["workerGroupSpecs"], cluster["workerGroupSpecs"], strict=True)
    assert all({**group, "replicas": 0} == {**other, "replicas": 0} for group, other in groups)
    assert not any(name.startswith("RayCluster") for name in rendered("job") | rendered("serve"))


def test_a_job_with_its_own_cluster_can_be_queued_and_is_cleared_away() -> None:
    job = rendered("job")["RayJob train"]
    (shared,) = load(KUBERNETES / "jobs/train.yaml")
    assert job["spec"]["entrypoint"] == shared["spec"]["entrypoint"]
    assert job["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "ctmsr"}
    assert job["spec"]["shutdownAfterJobFinishes"]
    assert job["spec"]["ttlSecondsAfterFinished"] > 0
    assert job["spec"]["backoffLimit"] > 0
    cluster = job["spec"]["rayClusterSpec"]
    assert "enableInTreeAutoscaling" not in cluster  # which Kueue refuses
    replicas = {group["groupName"]: group["replicas"] for group in cluster["workerGroupSpecs"]}
    most = {group["groupName"]: group["maxReplicas"] for group in cluster["workerGroupSpecs"]}
    assert replicas == {"gpu": most["gpu"], "cpu": 1}


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("spec/shutdownAfterJobFinishes", None, "'shutdownAfterJobFinishes' is a required property"),
        ("spec/rayClusterSpec", None, "is not valid under any of the given schemas"),
        ("spec/rayClusterSpec/gcsFaultToleranceOptions", {}, "'redisAddress' is a required property"),
        ("spec/backoffLimit", -1, "less than the minimum"),
        ("spec/backoffLimits", 1, "'backoffLimits' was unexpected"),
    ],
)
def test_a_broken_job_is_refused(path: str, value: Any, message: str) -> None:
    found = problems(edited(rendered("job")["RayJob train"], path, value))
    assert any(message in text for text in found), found


@pytest.mark.parametrize(
    ("variant", "path"),
    [
        ((".", "redis"), ("RayCluster ctmsr", "spec")),
        (("serve", "redis"), ("RayService upscale", "spec", "rayClusterConfig")),
    ],
)
def test_redis_keeps_the_state_of_the_head(variant: tuple[str, ...], path: tuple[str, ...]) -> None:
    options = cluster_of(variant, path)["gcsFaultToleranceOptions"]
    service = rendered(*variant)["Service redis"]
    assert options["redisAddress"] == f"{name_of(service)}:{service['spec']['ports'][0]['port']}"
    server = rendered(*variant)["StatefulSet redis"]
    assert options["redisPassword"]["valueFrom"] in [
        variable["valueFrom"] for env in parts(server, "env") for variable in env
    ]


def test_the_service_is_one_that_ray_serve_takes() -> None:
    config = ServeDeploySchema.model_validate(
        yaml.safe_load(rendered("serve")["RayService upscale"]["spec"]["serveConfigV2"])
    )
    (application,) = config.applications
    assert application.args["tracking_uri"] == "http://mlflow:5000"
    (gpus,) = [
        group["maxReplicas"]
        for group in cluster_of((".",), ("RayCluster ctmsr", "spec"))["workerGroupSpecs"]
        if group["groupName"] == "gpu"
    ]
    assert application.args["max_replicas"] == gpus
    assert application.import_path == "pipelines.serve:app"
    pytest.importorskip("pipelines.serve.application").Arguments(**application.args)
    (head,) = cluster_of((".",), ("RayCluster ctmsr", "spec", "headGroupSpec"))["template"]["spec"][
        "containers"
    ]
    assert {"name": "serve", "containerPort": 8000} in head["ports"]


# Who may connect, and what a drain waits for


def labels_of(pod: str) -> dict[str, str]:
    """Labels that a pod has: its own, or those that KubeRay gives it."""
    ray = {"ray.io/cluster": "ctmsr", "ray.io/is-ray-node": "yes"}
    return {
        "ray": ray | {"ray.io/node-type": "worker"},
        "submitter": {},
        "operator": {"app.kubernetes.io/name": "kuberay-operator"},
        "prometheus": {"app.kubernetes.io/name": "prometheus"},
    }.get(pod, {"app": pod})


def matches(selector: Tree, labels: dict[str, str]) -> bool:
    expressions = selector.get("matchExpressions", [])
    assert all(one["operator"] == "Exists" for one in expressions)
    wanted = selector.get("matchLabels", {}).items()
    return wanted <= labels.items() and all(one["key"] in labels for one in expressions)


def may_connect(source: str, target: str, port: int, *, namespace: str = "ctmsr") -> bool:
    """Whether some policy lets a pod, of this or another namespace, connect to a pod of this one."""
    policies = [one for one in rendered(".", "redis").values() if one["kind"] == "NetworkPolicy"]
    chosen = [one["spec"] for one in policies if matches(one["spec"]["podSelector"], labels_of(target))]
    assert any(
        spec["podSelector"] == {} and not spec.get("ingress") for spec in chosen
    )  # the rest is refused
    for rule in (rule for spec in chosen for rule in spec.get("ingress", [])):
        if all(one["port"] != port for one in rule.get("ports", [{"port": port}])):
            continue
        for peer in rule["from"]:
            is_near = peer["namespaceSelector"] == {} if "namespaceSelector" in peer else namespace == "ctmsr"
            if is_near and matches(peer["podSelector"], labels_of(source)):
                return True
    return False


def test_only_those_who_need_it_may_connect() -> None:
    assert may_connect("ray", "ray", 6379)
    assert may_connect("ray", "ray", 43210)
    assert may_connect("submitter", "ray", 8265)
    assert may_connect("operator", "ray", 8265, namespace="operators")
    assert may_connect("prometheus", "ray", 8080, namespace="monitoring")
    assert may_connect("ray", "mlflow", 5000)
    assert may_connect("mlflow", "postgres", 5432)
    assert may_connect("mlflow-upgrade", "postgres", 5432)
    assert may_connect("ray", "redis", 6379)
    for source, target, port in [
        ("submitter", "ray", 6379),
        ("submitter", "mlflow", 5000),
        ("ray", "postgres", 5432),
        ("submitter", "redis", 6379),
        ("mlflow", "ray", 10001),
    ]:
        assert not may_connect(source, target, port), (source, target, port)
    for source in ("ray", "submitter", "operator", "prometheus"):
        assert not may_connect(source, "mlflow", 5000, namespace="elsewhere"), source
        assert not may_connect(source, "ray", 6379, namespace="elsewhere"), source


def test_a_drain_never_takes_a_head() -> None:
    """KubeRay's pods have no controller with a scale: a budget must be a number that stays available."""
    budgets = [
        one["spec"] for variant in VARIANTS for one in rendered(*variant).values() if "Budget" in one["kind"]
    ]
    assert all(isinstance(spec.get("minAvailable"), int) for spec in budgets)
    heads = [spec for spec in budgets if matches(spec["selector"], {"ray.io/node-type": "head"})]
    assert {spec["minAvailable"] for spec in heads} == {1000}


def test_the_dashboard_is_found_by_grafana() -> None:
    found = rendered(".", "monitoring")["ConfigMap ctmsr-dashboard"]
    assert found["metadata"]["labels"] == {"grafana_dashboard": "1"}
    assert json.loads(found["data"]["dashboard.json"])["title"] == "CTMSR training"


def test_the_files_of_the_options_are_no_objects_of_the_base() -> None:
    assert not {name for name in rendered() if "redis" in name.lower() or "monitor" in name.lower()}
    assert "StatefulSet redis" in {f"{one['kind']} {name_of(one)}" for one in objects().values()}

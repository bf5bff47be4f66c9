"""The comparison of our schemas with installed operators finds what differs."""

from typing import Any

from tests.support.crds import differences


def crd(group: str, kind: str, spec: dict[str, Any]) -> dict[str, Any]:
    schema = {"openAPIV3Schema": {"properties": {"spec": spec}}}
    return {"spec": {"group": group, "names": {"kind": kind}, "versions": [{"name": "v1", "schema": schema}]}}


def test_fields_that_an_operator_does_not_know_are_named() -> None:
    service = {
        "properties": {
            "serveConfigV2": {"type": "integer"},
            "rayClusterConfig": {
                "properties": {"headGroupSpec": {"required": ["template", "rayStartParams"]}}
            },
        }
    }
    monitor = {
        "required": ["jobLabel"],
        "properties": {
            "selector": {},
            "podMetricsEndpoints": {"type": "array", "items": {"properties": {"port": {"type": "string"}}}},
        },
    }
    crds = [crd("ray.io", "RayService", service), crd("monitoring.coreos.com", "PodMonitor", monitor)]
    found = set(differences({"items": crds}))
    assert found >= {
        "RayCluster: no operator knows ray.io/v1",
        "RayService.serveConfigV2: string here, integer there",
        "RayService.rayClusterConfig.workerGroupSpecs: unknown there",
        "RayService.rayClusterConfig.headGroupSpec: rayStartParams required there",
        "PodMonitor: jobLabel required there",
        "PodMonitor.podMetricsEndpoints[].interval: unknown there",
    }
    assert not any("podMetricsEndpoints[].port" in line for line in found)

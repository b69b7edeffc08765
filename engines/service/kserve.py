"""KServe's ServingRuntime and InferenceService for a model repository (serving.kserve.io as of August 2026)."""

from __future__ import annotations

from typing import Any

from engines.service.serving_files import USER, Serving, probe

HTTP, GRPC = 8080, 9000
"""Ports that KServe expects."""


def serving_runtime(serving: Serving) -> dict[str, Any]:
    """Triton as KServe starts it: the container must be called kserve-container, the model lies in /mnt/models."""
    container = {
        "name": "kserve-container",
        "image": serving.image,
        "args": [
            "tritonserver",
            "--model-repository=/mnt/models",
            f"--http-port={HTTP}",
            f"--grpc-port={GRPC}",
            *serving.arguments,
        ],
        "resources": serving.resources(),
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
            "runAsNonRoot": True,
            "runAsUser": USER,
        },
        "startupProbe": probe("/v2/health/ready", HTTP, every=5, failures=120),
        "readinessProbe": probe("/v2/health/ready", HTTP, every=5, failures=2),
        "livenessProbe": probe("/v2/health/live", HTTP, every=10, failures=3),
        "volumeMounts": [{"name": "shm", "mountPath": "/dev/shm"}],
    }
    return {
        "apiVersion": "serving.kserve.io/v1alpha1",
        "kind": "ServingRuntime",
        "metadata": {"name": f"{serving.name}-triton"},
        "spec": {
            "annotations": {"prometheus.kserve.io/port": "8002", "prometheus.kserve.io/path": "/metrics"},
            "supportedModelFormats": [{"name": "triton", "version": "2", "autoSelect": False}],
            "protocolVersions": ["v2", "grpc-v2"],
            "containers": [container],
            "volumes": [{"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "1Gi"}}],
        },
    }


def inference_services(serving: Serving) -> list[dict[str, Any]]:
    """One InferenceService for each compute capability, or one for any GPU."""
    found = []
    for capability in serving.capabilities or ("",):
        affinity = serving.affinity(capability)
        predictor: dict[str, Any] = {
            "minReplicas": 1,
            "maxReplicas": 8,
            "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}],
            **({"affinity": affinity} if affinity else {}),
            "model": {
                "modelFormat": {"name": "triton", "version": "2"},
                "runtime": f"{serving.name}-triton",
                "protocolVersion": "v2",
                "storageUri": serving.storage,
            },
        }
        found.append(
            {
                "apiVersion": "serving.kserve.io/v1beta1",
                "kind": "InferenceService",
                "metadata": {"name": serving.named(capability), "labels": serving.labels(capability)},
                "spec": {"predictor": predictor},
            }
        )
    return found

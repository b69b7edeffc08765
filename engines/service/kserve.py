"""KServe's ServingRuntime and InferenceService for a model repository (serving.kserve.io as of August 2026)."""

from __future__ import annotations

from typing import Any

from engines.service.serving_files import (
    GRACE_SECONDS,
    LOCKED,
    MOUNTS,
    POD_UID,
    USER,
    Serving,
    files_volume,
    probe,
    scratch,
)

HTTP, GRPC = 8080, 9000
"""Ports that KServe expects."""


def serving_runtime(serving: Serving) -> dict[str, Any]:
    """Triton as KServe starts it: the container must be called kserve-container, the model lies in /mnt/models."""
    disk_gib = 1 if serving.on_volume else 1 + serving.repository_gib  # KServe copies what is not on a volume
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
        "env": [POD_UID],
        "resources": serving.resources(disk_gib),
        "securityContext": {
            **LOCKED,
            "runAsNonRoot": True,
            "runAsUser": USER,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "startupProbe": probe(serving.ready_path, HTTP, every=5, failures=120),
        "readinessProbe": probe(serving.ready_path, HTTP, every=5, failures=2),
        "livenessProbe": serving.liveness(HTTP),
        "volumeMounts": MOUNTS,
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
            "volumes": [*scratch(), files_volume(serving)],
        },
    }


def inference_services(serving: Serving) -> list[dict[str, Any]]:
    """One InferenceService for each compute capability, or one for any GPU."""
    found = []
    for capability in serving.capabilities or ("",):
        affinity = serving.affinity(capability)
        predictor: dict[str, Any] = {
            "minReplicas": serving.replicas,
            "maxReplicas": max(8, serving.replicas),
            "automountServiceAccountToken": False,
            **({"serviceAccountName": serving.secret} if serving.bucket else {}),
            "terminationGracePeriodSeconds": GRACE_SECONDS,
            "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}],
            **({"affinity": affinity} if affinity else {}),
            "model": {
                "modelFormat": {"name": "triton", "version": "2"},
                "runtime": f"{serving.name}-triton",
                "protocolVersion": "v2",
                "storageUri": storage_uri(serving),
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


def storage_uri(serving: Serving) -> str:
    """The model repository as KServe names it: s3://BUCKET/FOLDER, the host being with the secret."""
    bucket = serving.bucket
    return f"s3://{bucket.name}/{bucket.folder}".rstrip("/") if bucket else serving.storage


def service_account(serving: Serving) -> dict[str, Any]:
    """The account that gives KServe's storage step the secret of S3."""
    return {
        "apiVersion": "v1",
        "kind": "ServiceAccount",
        "metadata": {"name": serving.secret, "labels": {"app.kubernetes.io/name": serving.name}},
        "secrets": [{"name": serving.secret}],
        "automountServiceAccountToken": False,
    }


def secret_commands(serving: Serving) -> list[str]:
    """The commands that create the secret of S3, with the annotations that KServe reads (pkg/credentials/s3)."""
    bucket, secret = serving.bucket, serving.secret
    if bucket is None:
        return []
    keys = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION")
    literals = " ".join(f"--from-literal={key}=..." for key in keys)
    annotations = {"s3-region": "..."}
    if bucket.endpoint:
        annotations |= {"s3-endpoint": bucket.endpoint, "s3-usehttps": str(int(bucket.https))}
    given = " ".join(f"serving.kserve.io/{name}={value}" for name, value in annotations.items())
    return [f"kubectl create secret generic {secret} {literals}", f"kubectl annotate secret {secret} {given}"]

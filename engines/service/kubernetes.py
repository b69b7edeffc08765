"""Kubernetes files for a model repository: Deployments, Service, autoscalers, storage; kserve.py has KServe's.

Nothing here was run on a cluster: the tests check the files against Kubernetes' own schemas.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from engines.service.container_fit import image
from engines.service.kserve import inference_services, secret_commands, service_account, serving_runtime
from engines.service.served_model import TritonError
from engines.service.serving_files import DRAIN_SECONDS, USER, Serving, probe

HEADER = "# Written by neck-export triton; change it by a kustomize overlay, or it is written over.\n"

HTTP, GRPC, METRICS = 8000, 8001, 8002
POLL_SECONDS = 30
PAUSE_SECONDS = 10
"""Before SIGTERM, so that the Service has left the pod out by then."""

PILLOW = "pip install --no-cache-dir pillow"

EXPLAINED = {
    "deployment.yaml": """
# --strict-readiness=false: if strict, a pod is unready while a version loads, and a broken new version makes every pod
# unready for good though the old one serves (seen with Triton 2.51). A model that fails at start-up ends the server.
# --model-control-mode=poll: versions are renamed into the repository whole, so none is seen half.
# requests and limits of cpu and memory are estimates; measure yours.
""",
    "autoscaler.yaml": """
# nv_inference_pending_request_count (Triton's gauge of waiting requests) needs Prometheus and prometheus-adapter, which
# serves it as a pods metric with its `model` label. Without them the autoscaler still has the CPU's metric, by which it
# scales up but not down; delete the Pods metric where there will be none. GPU use is no measure here: one busy request
# shows as 100 %.
""",
    "storage.yaml": """
# ReadWriteMany: pods read it while a job adds versions. The class must offer that (NFS, CephFS, EFS, Filestore).
""",
    "kserve.yaml": """
# Instead of the other files, where KServe is installed: kubectl apply -f kserve.yaml
# KServe's storage step gets the repository when a pod starts; a new version is served by new pods.
""",
}


def kubernetes_files(serving: Serving) -> dict[str, str]:
    """The files by name.

    Raises:
        TritonError: PyYAML is not installed.
    """
    each = serving.capabilities or ("",)
    documents: dict[str, list[dict[str, Any]]] = {
        "deployment.yaml": [deployment(serving, capability) for capability in each],
        "service.yaml": [service(serving)],
        "autoscaler.yaml": [
            *(autoscaler(serving, capability) for capability in each),
            disruption_budget(serving),
        ],
        "storage.yaml": [claim(serving)] if serving.own_claim else [],
        "kserve.yaml": [
            *([service_account(serving)] if serving.bucket else []),
            serving_runtime(serving),
            *inference_services(serving),
        ],
    }
    documents = {name: content for name, content in documents.items() if content}
    resources = [name for name in documents if name != "kserve.yaml"]
    documents["kustomization.yaml"] = [
        {"apiVersion": "kustomize.config.k8s.io/v1beta1", "kind": "Kustomization", "resources": resources}
    ]
    explained = {name: text.lstrip("\n") for name, text in EXPLAINED.items()}
    if serving.bucket:
        commands = "".join(f"#   {line}\n" for line in secret_commands(serving))
        note = f"# The keys of S3 are in a secret that you create, once:\n{commands}"
        explained["deployment.yaml"] += note
        explained["kserve.yaml"] += note
    files = {name: HEADER + explained.get(name, "") + _dump(content) for name, content in documents.items()}
    if serving.pillow:
        steps = (f"FROM {image(serving.container)}", "ENV PIP_BREAK_SYSTEM_PACKAGES=1", f"RUN {PILLOW}")
        files["Dockerfile"] = HEADER + "".join(f"{step}\n" for step in steps)
    return files


def deployment(serving: Serving, capability: str) -> dict[str, Any]:
    """The Deployment for one compute capability."""
    labels = serving.labels(capability)
    pod = {
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": PAUSE_SECONDS + DRAIN_SECONDS + 5,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": USER,
            "runAsGroup": USER,
            "fsGroup": USER,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}],
        "topologySpreadConstraints": [
            {
                "maxSkew": 1,
                "topologyKey": "kubernetes.io/hostname",
                "whenUnsatisfiable": "ScheduleAnyway",
                "labelSelector": {"matchLabels": labels},
            }
        ],
        "containers": [_container(serving)],
        "volumes": _volumes(serving),
    }
    affinity = serving.affinity(capability)
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": serving.named(capability), "labels": labels},
        "spec": {
            "selector": {"matchLabels": labels},
            "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": 0, "maxSurge": 1}},
            "template": {
                "metadata": {"labels": labels, "annotations": _scraped(METRICS)},
                "spec": pod | ({"affinity": affinity} if affinity else {}),
            },
        },
    }


def service(serving: Serving) -> dict[str, Any]:
    """One Service before the Deployments of all compute capabilities."""
    ports = {"http": HTTP, "grpc": GRPC, "metrics": METRICS}
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": serving.name, "labels": {"app.kubernetes.io/name": serving.name}},
        "spec": {
            "selector": {"app.kubernetes.io/name": serving.name},
            "ports": [{"name": name, "port": port, "targetPort": name} for name, port in ports.items()],
        },
    }


def autoscaler(serving: Serving, capability: str) -> dict[str, Any]:
    """Scales out where more than one full batch waits in each pod."""
    waiting = {
        "metric": {
            "name": "nv_inference_pending_request_count",
            "selector": {"matchLabels": {"model": serving.model}},
        },
        "target": {"type": "AverageValue", "averageValue": str(serving.source.batch.maximum * serving.gpus)},
    }
    processor = {"name": "cpu", "target": {"type": "Utilization", "averageUtilization": 80}}
    return {
        "apiVersion": "autoscaling/v2",
        "kind": "HorizontalPodAutoscaler",
        "metadata": {"name": serving.named(capability), "labels": serving.labels(capability)},
        "spec": {
            "scaleTargetRef": {"apiVersion": "apps/v1", "kind": "Deployment", "name": serving.named(capability)},
            "minReplicas": 1,
            "maxReplicas": 8,
            "metrics": [{"type": "Pods", "pods": waiting}, {"type": "Resource", "resource": processor}],
            "behavior": {"scaleDown": {"stabilizationWindowSeconds": 600}},
        },
    }


def disruption_budget(serving: Serving) -> dict[str, Any]:
    """Lets a node be drained while another pod serves."""
    selector = {"matchLabels": {"app.kubernetes.io/name": serving.name}}
    return {
        "apiVersion": "policy/v1",
        "kind": "PodDisruptionBudget",
        "metadata": {"name": serving.name, "labels": {"app.kubernetes.io/name": serving.name}},
        "spec": {"maxUnavailable": 1, "selector": selector},
    }


def claim(serving: Serving) -> dict[str, Any]:
    """The volume that holds the model repository; room for five versions."""
    size = (
        2 + 5 * sum(file.stat().st_size for file in serving.source.files) * max(1, len(serving.capabilities)) // 2**30
    )
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": serving.claim_and_folder[0], "labels": {"app.kubernetes.io/name": serving.name}},
        "spec": {"accessModes": ["ReadWriteMany"], "resources": {"requests": {"storage": f"{size}Gi"}}},
    }


def _container(serving: Serving) -> dict[str, Any]:
    stored = serving.on_volume
    mounts: list[dict[str, Any]] = [{"name": "shm", "mountPath": "/dev/shm"}]
    if stored:
        folder = serving.claim_and_folder[1]
        models = {"name": "models", "mountPath": "/models", "readOnly": True}
        mounts.append(models | ({"subPath": folder} if folder else {}))
    ports = {"http": HTTP, "grpc": GRPC, "metrics": METRICS}
    container: dict[str, Any] = {
        "name": "triton",
        "image": serving.image,
        "args": [
            "tritonserver",
            f"--model-repository={'/models' if stored else serving.storage}",
            "--model-control-mode=poll",
            f"--repository-poll-secs={POLL_SECONDS}",
            *serving.arguments,
        ],
        "ports": [{"name": name, "containerPort": port} for name, port in ports.items()],
        "resources": serving.resources(),
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
        "startupProbe": probe("/v2/health/ready", "http", every=5, failures=120),  # loading and warm-up: 10 minutes
        "readinessProbe": probe("/v2/health/ready", "http", every=5, failures=2),
        "livenessProbe": probe("/v2/health/live", "http", every=10, failures=3),
        "lifecycle": {"preStop": {"exec": {"command": ["sleep", str(PAUSE_SECONDS)]}}},
        "volumeMounts": mounts,
    }
    if not stored:
        container["env"] = [
            {"name": key, "valueFrom": {"secretKeyRef": {"name": serving.secret, "key": key}}}
            for key in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION")
        ]
    return container


def _volumes(serving: Serving) -> list[dict[str, Any]]:
    volumes: list[dict[str, Any]] = [{"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "1Gi"}}]
    if serving.on_volume:
        volumes.append({"name": "models", "persistentVolumeClaim": {"claimName": serving.claim_and_folder[0]}})
    return volumes


def _scraped(port: int) -> Mapping[str, str]:
    return {"prometheus.io/scrape": "true", "prometheus.io/port": str(port), "prometheus.io/path": "/metrics"}


def _dump(documents: Sequence[Mapping[str, Any]]) -> str:
    try:
        import yaml  # type: ignore[import-untyped]
    except ImportError:
        raise TritonError("PyYAML is not installed: pip install 'neck-export[triton]'") from None
    plain = (json.loads(json.dumps(document)) for document in documents)  # what is shared would become YAML anchors
    return "---\n".join(yaml.safe_dump(document, sort_keys=False, width=110) for document in plain)


def check_folder(folder: Path, files: Sequence[str]) -> None:
    """Refuses a folder whose files would be written over though another wrote them.

    Raises:
        TritonError: naming the first.
    """
    if folder.exists() and not folder.is_dir():
        raise TritonError(f"{folder}: is a file, where the Kubernetes files' folder goes; move it")
    for name in files:
        path = folder / name
        if path.exists() and not path.read_text(encoding="utf-8", errors="replace").startswith(HEADER[:30]):
            raise TritonError(f"{path}: is there and not written by neck-export; move it, since it would be lost")

"""Kubernetes files for a model repository: Deployments, Service, autoscalers, storage; kserve.py has KServe's.

Nothing here was run on a cluster: the tests check the files against Kubernetes' own schemas, and run the probes, the
proxy and Triton's options with a real tritonserver and nginx.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from engines.service.container_fit import image
from engines.service.kserve import inference_services, secret_commands, service_account, serving_runtime
from engines.service.served_model import TritonError
from engines.service.serving_files import (
    FILES,
    GRACE_SECONDS,
    LOCKED,
    MOUNTS,
    PAUSE_SECONDS,
    POD_UID,
    USER,
    Serving,
    files_volume,
    probe,
    scratch,
)

HEADER = "# Written by neck-export triton; change it by a kustomize overlay, or it is written over.\n"

HTTP, GRPC, METRICS = 8000, 8001, 8002
"""Ports of the Service."""

PROXY_HTTP, PROXY_GRPC = 8080, 8081
"""Ports of the proxy in the pod; Triton itself is reached from inside the pod alone."""

POLL_SECONDS = 30

PROXY_SCRATCH = {"name": "proxy-tmp", "mountPath": "/tmp"}

PILLOW = "pip install --no-cache-dir pillow"

HERE = Path(__file__).parent

EXPLAINED = {
    "deployment.yaml": """
# A pod is ready once Triton has the model that clients ask for: an empty volume has none. --strict-readiness=false
# keeps a pod in service whose Triton cannot load a new version and goes on with the old one.
# --model-control-mode=poll: config.pbtxt names the version that is served, so one that is being copied is not loaded.
# The proxy closes kept-alive connections when a pod ends, refuses compressed requests, and hides Triton's interfaces
# for shared memory, model control, traces and logs; Triton closes them, too (--http-restricted-api).
# requests and limits of CPU, memory and disk are estimates; measure yours.
""",
    "autoscaler.yaml": """
# nv_inference_pending_request_count (Triton's gauge of waiting requests) needs Prometheus and prometheus-adapter, which
# serves it as a pods metric with its `model` label. Without them the autoscaler still has the CPU's metric, by which it
# scales up but not down; delete the Pods metric where there will be none. GPU use is no measure here: one busy request
# shows as 100 %.
# With two pods or more a disruption budget lets a node be drained while another pod serves. One pod alone has none: a
# budget would either forbid the drain or allow the outage.
""",
    "network.yaml": """
# Pods of the same namespace reach HTTP and gRPC, pods of every namespace the metrics (Prometheus). A gateway in another
# namespace needs a rule of its own. It works where the cluster's network plugin enforces policies.
""",
    "storage.yaml": """
# ReadWriteMany: pods read it while a job adds versions. The class must offer that (NFS, CephFS, EFS, Filestore).
""",
    "upload.yaml": """
# A pod that fills the claim, not part of `kubectl apply -k`; it ends after an hour:
#   kubectl apply -f upload.yaml && kubectl wait --for=condition=Ready pod/{name}-upload --timeout=10m
#   kubectl cp --no-preserve=true model_repository/. {name}-upload:/models && kubectl delete -f upload.yaml
# A further version: copy its folder first and the model's config.pbtxt last.
""",
    "kserve.yaml": """
# Instead of the other files, where KServe is installed: kubectl apply -f kserve.yaml
# (and -f storage.yaml if that is here).
# KServe's storage step gets the repository when a pod starts; a new version is served by new pods.
""",
}


def kubernetes_files(serving: Serving) -> dict[str, str]:
    """The files by name.

    Raises:
        TritonError: PyYAML is not installed.
    """
    each = serving.capabilities or ("",)
    mounted = serving.on_volume
    documents: dict[str, list[dict[str, Any]]] = {
        "deployment.yaml": [pod_files(serving), *(deployment(serving, capability) for capability in each)],
        "service.yaml": [service(serving)],
        "network.yaml": [network_policy(serving)],
        "autoscaler.yaml": [
            *(autoscaler(serving, capability) for capability in each),
            *([disruption_budget(serving)] if serving.replicas * len(each) > 1 else []),
        ],
        "storage.yaml": [claim(serving)] if serving.own_claim else [],
        "upload.yaml": [upload(serving)] if mounted else [],
        "kserve.yaml": [
            pod_files(serving),
            *([service_account(serving)] if serving.bucket else []),
            serving_runtime(serving),
            *inference_services(serving),
        ],
    }
    documents = {name: content for name, content in documents.items() if content}
    resources = [name for name in documents if name not in ("kserve.yaml", "upload.yaml")]
    documents["kustomization.yaml"] = [
        {"apiVersion": "kustomize.config.k8s.io/v1beta1", "kind": "Kustomization", "resources": resources}
    ]
    explained = {name: text.lstrip("\n").replace("{name}", serving.name) for name, text in EXPLAINED.items()}
    if serving.bucket:
        commands = "".join(f"#   {line}\n" for line in secret_commands(serving))
        note = f"# The keys of S3 are in a secret that you create, once:\n{commands}"
        explained["deployment.yaml"] += note
        explained["kserve.yaml"] += note
    files = {name: HEADER + explained.get(name, "") + _dump(content) for name, content in documents.items()}
    if serving.ensemble:
        build = f"# docker build -t {serving.image} kubernetes && docker push {serving.image}\n"
        steps = (f"FROM {image(serving.container)}", "ENV PIP_BREAK_SYSTEM_PACKAGES=1", f"RUN {PILLOW}")
        files["Dockerfile"] = HEADER + build + "".join(f"{step}\n" for step in steps)
    return files


def pod_files(serving: Serving) -> dict[str, Any]:
    """The ConfigMap with the proxy's configuration and the liveness probe."""
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": f"{serving.name}-files", "labels": {"app.kubernetes.io/name": serving.name}},
        "data": {"nginx.conf": proxy_config(serving), "canary.py": (HERE / "canary.py").read_text(encoding="utf-8")},
    }


def proxy_config(serving: Serving) -> str:
    """nginx.conf with room for the largest request: tensors written out as JSON take up to five times their bytes."""
    port = serving.source.image
    one = math.prod(side for side in port.shape[1:] if isinstance(side, int)) * (4 if port.dtype == "float32" else 1)
    megabytes = max(256, 5 * serving.source.batch.maximum * one // 10**6)
    text = (HERE / "nginx.conf").read_text(encoding="utf-8")
    return text.replace("client_max_body_size 256m;", f"client_max_body_size {megabytes}m;")


def deployment(serving: Serving, capability: str) -> dict[str, Any]:
    """The Deployment for one compute capability."""
    labels = serving.labels(capability)
    pod = {
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": GRACE_SECONDS,
        "securityContext": _pod_security(),
        "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}],
        "topologySpreadConstraints": [
            {
                "maxSkew": 1,
                "topologyKey": "kubernetes.io/hostname",
                "whenUnsatisfiable": "ScheduleAnyway",
                "labelSelector": {"matchLabels": labels},
            }
        ],
        "containers": [_container(serving), _proxy(serving)],
        "volumes": _volumes(serving),
    }
    affinity = serving.affinity(capability)
    steps = {"maxUnavailable": 0, "maxSurge": 1} if serving.rollout == "surge" else {"maxUnavailable": 1, "maxSurge": 0}
    digest = hashlib.sha256(json.dumps(pod_files(serving)).encode()).hexdigest()
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": serving.named(capability), "labels": labels},
        "spec": {
            "selector": {"matchLabels": labels},
            "strategy": {"type": "RollingUpdate", "rollingUpdate": steps},
            "template": {
                # the digest replaces the pods when the ConfigMap changes
                "metadata": {"labels": labels, "annotations": {**_scraped(METRICS), "neck-export/files": digest}},
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


def network_policy(serving: Serving) -> dict[str, Any]:
    """Who may reach the pods, and whom they may reach: nobody, or the S3 service and the names' service."""
    egress: list[dict[str, Any]] = []
    if serving.bucket:
        port = int((serving.bucket.endpoint or ":443").rpartition(":")[2])
        names = [{"port": 53, "protocol": protocol} for protocol in ("UDP", "TCP")]
        egress = [{"ports": [*names, {"port": port, "protocol": "TCP"}]}]
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": serving.name, "labels": {"app.kubernetes.io/name": serving.name}},
        "spec": {
            "podSelector": {"matchLabels": {"app.kubernetes.io/name": serving.name}},
            "policyTypes": ["Ingress", "Egress"],
            "ingress": [
                {"from": [{"podSelector": {}}], "ports": [_tcp(PROXY_HTTP), _tcp(PROXY_GRPC)]},
                {"from": [{"namespaceSelector": {}}], "ports": [_tcp(METRICS)]},
            ],
            "egress": egress,
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
            "minReplicas": serving.replicas,
            "maxReplicas": max(8, serving.replicas),
            "metrics": [{"type": "Pods", "pods": waiting}, {"type": "Resource", "resource": processor}],
            "behavior": {"scaleDown": {"stabilizationWindowSeconds": 600}},
        },
    }


def disruption_budget(serving: Serving) -> dict[str, Any]:
    """Lets a node be drained while another pod serves; a pod that does not serve is no reason to wait."""
    selector = {"matchLabels": {"app.kubernetes.io/name": serving.name}}
    return {
        "apiVersion": "policy/v1",
        "kind": "PodDisruptionBudget",
        "metadata": {"name": serving.name, "labels": {"app.kubernetes.io/name": serving.name}},
        "spec": {"maxUnavailable": 1, "selector": selector, "unhealthyPodEvictionPolicy": "AlwaysAllow"},
    }


def claim(serving: Serving) -> dict[str, Any]:
    """The volume that holds the model repository; room for five versions."""
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": serving.claim_and_folder[0], "labels": {"app.kubernetes.io/name": serving.name}},
        "spec": {
            "accessModes": ["ReadWriteMany"],
            "resources": {"requests": {"storage": f"{serving.repository_gib}Gi"}},
        },
    }


def upload(serving: Serving) -> dict[str, Any]:
    """A pod that has the volume for an hour, so that the repository can be copied to it."""
    disk = {"cpu": "100m", "memory": "256Mi", "ephemeral-storage": "1Gi"}
    container = {
        "name": "upload",
        "image": serving.image,
        "command": ["sleep", "3600"],
        "resources": {"requests": disk, "limits": {name: disk[name] for name in ("memory", "ephemeral-storage")}},
        "securityContext": LOCKED,
        "volumeMounts": [{key: value for key, value in _models_mount(serving).items() if key != "readOnly"}],
    }
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": f"{serving.name}-upload"},
        "spec": {
            "restartPolicy": "Never",
            "activeDeadlineSeconds": 3600,
            "automountServiceAccountToken": False,
            "enableServiceLinks": False,
            "securityContext": _pod_security(),
            "containers": [container],
            "volumes": [_models_volume(serving)],
        },
    }


def _container(serving: Serving) -> dict[str, Any]:
    stored = serving.on_volume
    keys = [] if stored else ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION"]
    return {
        "name": "triton",
        "image": serving.image,
        "args": [
            "tritonserver",
            f"--model-repository={'/models' if stored else serving.storage}",
            "--model-control-mode=poll",
            f"--repository-poll-secs={POLL_SECONDS}",
            *("--http-address=127.0.0.1", "--grpc-address=127.0.0.1", "--metrics-address=0.0.0.0"),
            *serving.arguments,
        ],
        "env": [
            POD_UID,
            *({"name": key, "valueFrom": {"secretKeyRef": {"name": serving.secret, "key": key}}} for key in keys),
        ],
        "ports": [{"name": "metrics", "containerPort": METRICS}],
        "resources": serving.resources(_scratch_gib(serving)),
        "securityContext": LOCKED,
        # by the proxy, as clients come; loading and warm-up may take 10 minutes
        "startupProbe": probe(serving.ready_path, PROXY_HTTP, every=5, failures=120),
        "readinessProbe": probe(serving.ready_path, PROXY_HTTP, every=5, failures=2),
        "livenessProbe": serving.liveness(HTTP),
        # the proxy first ends what clients began
        "lifecycle": {"preStop": {"exec": {"command": ["sleep", str(PAUSE_SECONDS + 2)]}}},
        "volumeMounts": [*MOUNTS, *([_models_mount(serving)] if stored else [])],
    }


def _proxy(serving: Serving) -> dict[str, Any]:
    """nginx before Triton: when it quits it finishes what it has begun and closes kept-alive connections."""
    nginx = f"nginx -c {FILES}/nginx.conf -e stderr"
    small = {"cpu": "100m", "memory": "256Mi", "ephemeral-storage": "1Gi"}
    return {
        "name": "proxy",
        "image": serving.proxy_image,
        "command": ["/bin/sh", "-c", f"exec {nginx} -g 'daemon off;'"],
        "ports": [{"name": "http", "containerPort": PROXY_HTTP}, {"name": "grpc", "containerPort": PROXY_GRPC}],
        "resources": {"requests": small, "limits": {name: small[name] for name in ("memory", "ephemeral-storage")}},
        "securityContext": LOCKED,
        "livenessProbe": {"tcpSocket": {"port": PROXY_HTTP}, "periodSeconds": 10, "failureThreshold": 3},
        "lifecycle": {
            "preStop": {
                "exec": {
                    "command": [
                        "/bin/sh",
                        "-c",
                        f"sleep {PAUSE_SECONDS}; {nginx} -s quit; while [ -e /tmp/nginx.pid ]; do sleep 0.2; done",
                    ]
                }
            }
        },
        "volumeMounts": [PROXY_SCRATCH, *(mount for mount in MOUNTS if mount["name"] == "files")],
    }


def _pod_security() -> dict[str, Any]:
    return {
        "runAsNonRoot": True,
        "runAsUser": USER,
        "runAsGroup": USER,
        "fsGroup": USER,
        "fsGroupChangePolicy": "OnRootMismatch",  # or every start changes the owner of every file on the volume
        "seccompProfile": {"type": "RuntimeDefault"},
    }


def _scratch_gib(serving: Serving) -> int:
    """Triton copies a version from S3 to /tmp before it loads it: the old one and the new one."""
    return 1 if serving.on_volume else 1 + 2 * serving.gib


def _models_mount(serving: Serving) -> dict[str, Any]:
    folder = serving.claim_and_folder[1]
    models = {"name": "models", "mountPath": "/models", "readOnly": True}
    return models | ({"subPath": folder} if folder else {})


def _models_volume(serving: Serving) -> dict[str, Any]:
    return {"name": "models", "persistentVolumeClaim": {"claimName": serving.claim_and_folder[0]}}


def _volumes(serving: Serving) -> list[dict[str, Any]]:
    models = [_models_volume(serving)] if serving.on_volume else []
    proxys = {"name": PROXY_SCRATCH["name"], "emptyDir": {"sizeLimit": "512Mi"}}
    return [*scratch(_scratch_gib(serving)), proxys, files_volume(serving), *models]


def _tcp(port: int) -> dict[str, Any]:
    return {"port": port, "protocol": "TCP"}


def _scraped(port: int) -> Mapping[str, str]:
    return {"prometheus.io/scrape": "true", "prometheus.io/port": str(port), "prometheus.io/path": "/metrics"}


def _dump(documents: Sequence[Mapping[str, Any]]) -> str:
    try:
        import yaml  # type: ignore[import-untyped]
    except ImportError:
        raise TritonError("PyYAML is not installed: pip install pyyaml") from None

    class Dumper(getattr(yaml, "CSafeDumper", yaml.SafeDumper)):  # type: ignore[misc]  # of a class that is looked up
        """Writes a text of several lines as such a block."""

    def represent(dumper: Any, text: str) -> Any:
        return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)

    Dumper.add_representer(str, represent)
    plain = (json.loads(json.dumps(document)) for document in documents)  # what is shared would become YAML anchors
    return "---\n".join(yaml.dump(document, Dumper=Dumper, sort_keys=False, width=110) for document in plain)


def check_folder(folder: Path, files: Sequence[str]) -> None:
    """Refuses a folder whose files would be written over though another wrote them.

    Raises:
        TritonError: naming the first.
    """
    if folder.exists() and not folder.is_dir():
        raise TritonError(f"{folder}: is a file, where the Kubernetes files' folder goes; move it")
    for name in files:
        path = folder / name
        if path.exists() and not _is_ours(path):
            raise TritonError(f"{path}: is there and not written by neck-export; move it, since it would be lost")


def remove_old(folder: Path, files: Collection[str]) -> None:
    """Removes what an earlier run wrote and this one does not: a claim that is now another's must not stay here."""
    for name in {*EXPLAINED, "Dockerfile"}.difference(files):
        if (folder / name).is_file() and _is_ours(folder / name):
            (folder / name).unlink()


def _is_ours(path: Path) -> bool:
    return path.read_text(encoding="utf-8", errors="replace").startswith(HEADER[:30])

"""What the Kubernetes and KServe files of one model have in common."""

from __future__ import annotations

import dataclasses
import re
from typing import Any, Literal

from engines.service.container_fit import COMPATIBLE, image
from engines.service.ensemble import DECODER_MIB, DECODERS
from engines.service.served_model import Source, TritonError

DRAIN_SECONDS = 45
"""How long Triton finishes requests after SIGTERM."""

PAUSE_SECONDS = 10
"""How long a pod that ends still takes requests, so that the Service has left it out by then."""

GRACE_SECONDS = PAUSE_SECONDS + DRAIN_SECONDS + 10
"""How long Kubernetes waits before it kills a pod that ends."""

FILES = "/etc/neck"
"""Where the pods find the files of the ConfigMap."""

PROXY_IMAGE = "nginxinc/nginx-unprivileged:1.27-alpine"

CLOSED = "shared-memory,model-repository,trace,logging"
"""Triton's interfaces by which a client may read the server's memory, change its models, or make it write files."""

IMAGE_REFERENCE = r"[a-z0-9][a-z0-9.:_/-]*(:[\w][\w.-]{0,127})?(@sha256:[0-9a-f]{64})?"

USER = 1000
"""`triton-server` in NVIDIA's images."""

CLAIM = re.compile(r"pvc://(?P<claim>[a-z0-9]([a-z0-9.-]{0,60}[a-z0-9])?)(/(?P<folder>[\w./-]*))?")
BUCKET = re.compile(
    r"s3://((?P<scheme>https?://)?(?P<endpoint>[\w.-]+:\d+)/)?(?P<bucket>[\w][\w.-]+)(?P<folder>(/[\w.-]+)*)/?"
)
"""As Triton reads it: a host of one's own has a port, and is spoken to by HTTP unless https:// stands before it
(docs/user_guide/model_repository.md of triton-inference-server/server)."""


@dataclasses.dataclass(frozen=True)
class Bucket:
    """A model repository in S3: the bucket, its folder, and the host and scheme of a server that is not Amazon's."""

    name: str
    folder: str
    endpoint: str | None
    https: bool


@dataclasses.dataclass(frozen=True)
class Serving:
    """What the files need to know.

    Attributes:
        model: the model's name in Triton.
        source: the plan or ONNX file, the first of several.
        capabilities: compute capabilities, one Deployment each; empty is any NVIDIA GPU.
        container: such as 25.09.
        storage: `pvc://CLAIM[/FOLDER]`, `s3://BUCKET[/FOLDER]` or `s3://[https://]HOST:PORT/BUCKET[/FOLDER]`: where
            the model repository is.
        own_claim: whether the claim is this model's own, so that its file belongs to the others.
        gpus: of each pod; Triton runs one instance on each.
        compatible: whether Triton must be told to load plans of older TensorRT versions.
        ensemble: whether pictures are decoded in the server, for which the image needs Pillow.
        image_name: the image instead of NVIDIA's, a digest behind it or not.
        proxy_image: the image that runs nginx.
        replicas: pods that always run, for each compute capability.
        rollout: `surge` starts a new pod before it ends an old one, which takes a spare GPU; `replace` ends one first.
    """

    model: str
    source: Source
    capabilities: tuple[str, ...]
    container: str
    storage: str
    own_claim: bool = False
    gpus: int = 1
    compatible: bool = False
    ensemble: bool = False
    image_name: str | None = None
    proxy_image: str = PROXY_IMAGE
    replicas: int = 2
    rollout: Literal["surge", "replace"] = "surge"

    def __post_init__(self) -> None:
        if not CLAIM.fullmatch(self.storage) and not BUCKET.fullmatch(self.storage):
            raise TritonError(
                f"storage {self.storage!r}: expected pvc://CLAIM, pvc://CLAIM/FOLDER, s3://BUCKET/FOLDER, or for a "
                f"server of your own s3://https://HOST:PORT/BUCKET/FOLDER"
            )
        if not 1 <= self.gpus <= 16:
            raise TritonError(f"{self.gpus} GPUs per pod: expected 1 to 16")
        if not 1 <= self.replicas <= 100:
            raise TritonError(f"{self.replicas} replicas: expected 1 to 100")
        if self.rollout not in ("surge", "replace"):
            raise TritonError(f"rollout {self.rollout!r}: expected surge or replace")
        for name in (self.image_name, self.proxy_image):
            if name is not None and not re.fullmatch(IMAGE_REFERENCE, name):
                raise TritonError(f"image {name!r}: expected [REGISTRY/]NAME[:TAG][@sha256:DIGEST]")
        if self.image_name is None and self.ensemble:
            raise TritonError(
                "the ensemble needs an image with Pillow, which NVIDIA's does not contain; name it with "
                f"--image, such as registry.example.com/{self.name}-triton:{self.container}, and build it from the "
                "Dockerfile that is then written"
            )
        theirs, _, tag = (self.image_name or "").partition("@")[0].partition("tritonserver:")
        if theirs.endswith("nvidia/") and tag != f"{self.container}-py3":
            raise TritonError(f"image {self.image_name!r}: the file needs {image(self.container)}")

    @property
    def name(self) -> str:
        """The model's name as Kubernetes takes names."""
        return kubernetes_name(self.model)

    @property
    def image(self) -> str:
        """The image of the pods: NVIDIA's if no other was named."""
        return self.image_name or image(self.container)

    @property
    def served(self) -> str:
        """The model that a pod must have before it is ready; the ensemble is loaded after all that it needs."""
        return f"{self.model}-pictures" if self.ensemble else self.model

    @property
    def ready_path(self) -> str:
        """Whether that model can answer; `/v2/health/ready` says yes to an empty repository."""
        return f"/v2/models/{self.served}/ready"

    @property
    def gib(self) -> int:
        """Size of one version, rounded up."""
        one = sum(file.stat().st_size for file in self.source.files) * max(1, len(self.capabilities))
        return -(-one // 2**30)

    @property
    def repository_gib(self) -> int:
        """Room for five versions."""
        return 2 + 5 * self.gib

    @property
    def any_ampere(self) -> bool:
        """Whether the plan runs on every GPU from compute capability 8.0 on."""
        return self.source.manifest.get("options", {}).get("hardware_compatible") == "ampere+"

    @property
    def on_volume(self) -> bool:
        """Whether the repository is on a volume, which Triton reads as a folder."""
        return self.bucket is None

    @property
    def claim_and_folder(self) -> tuple[str, str]:
        """The volume's claim and the folder in it."""
        found = CLAIM.fullmatch(self.storage)
        return (found["claim"], (found["folder"] or "").strip("/")) if found else ("", "")

    @property
    def bucket(self) -> Bucket | None:
        """Where the repository is in S3; None where it is on a volume."""
        found = BUCKET.fullmatch(self.storage)
        if not found:
            return None
        return Bucket(found["bucket"], found["folder"].strip("/"), found["endpoint"], found["scheme"] == "https://")

    @property
    def secret(self) -> str:
        """The secret with the keys of S3, which is yours to create."""
        return f"{self.name}-s3"

    @property
    def memory_gib(self) -> int:
        """Estimate of a pod: the file is read whole, once more while a new version loads; /dev/shm; the decoders."""
        decoders = -(-DECODERS * DECODER_MIB // 1024) if self.ensemble else 0
        return 6 + 3 * sum(file.stat().st_size for file in self.source.files) // 2**30 + decoders

    @property
    def arguments(self) -> list[str]:
        """Triton's, the repository and ports aside."""
        return [
            "--disable-auto-complete-config",
            "--strict-readiness=false",
            f"--exit-timeout-secs={DRAIN_SECONDS}",
            f"--http-restricted-api={CLOSED}:closed-by=$(POD_UID)",
            f"--grpc-restricted-protocol={CLOSED}:closed-by=$(POD_UID)",
            *([COMPATIBLE] if self.compatible else []),
        ]

    def labels(self, capability: str) -> dict[str, str]:
        """Of the pods for one compute capability, empty for any."""
        gpu = f"cc-{capability.replace('.', '-')}" if capability else "any"
        return {"app.kubernetes.io/name": self.name, "app.kubernetes.io/component": gpu}

    def named(self, capability: str) -> str:
        """The name of what there is once per compute capability."""
        return f"{self.name}-cc-{capability.replace('.', '-')}" if capability else self.name

    def affinity(self, capability: str) -> dict[str, Any]:
        """Nodes that have the GPU, by the labels of NVIDIA's GPU feature discovery; empty for any."""
        major, _, minor = capability.partition(".")
        if self.any_ampere:
            expressions = [{"key": "nvidia.com/gpu.compute.major", "operator": "Gt", "values": ["7"]}]
        elif not capability:
            return {}
        else:
            expressions = [
                {"key": f"nvidia.com/gpu.compute.{part}", "operator": "In", "values": [value]}
                for part, value in (("major", major), ("minor", minor))
            ]
        terms = {"nodeSelectorTerms": [{"matchExpressions": expressions}]}
        return {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": terms}}

    def resources(self, disk_gib: int = 1) -> dict[str, Any]:
        """Of the container: GPUs are limits, and requests follow them.

        Args:
            disk_gib: what it may write to /tmp; as much again goes to its log at most.
        """
        memory, disk = f"{self.memory_gib}Gi", f"{disk_gib + 1}Gi"
        return {
            "requests": {"cpu": str(2 * self.gpus), "memory": memory, "ephemeral-storage": disk},
            "limits": {"nvidia.com/gpu": str(self.gpus), "memory": memory, "ephemeral-storage": disk},
        }

    def liveness(self, port: int) -> dict[str, Any]:
        """The probe that notices a dead decoder; see canary.py."""
        decoders = [f"{self.model}-preprocess", str(DECODERS)] if self.ensemble else []
        command = ["python3", f"{FILES}/canary.py", str(port), *decoders]
        return {"exec": {"command": command}, "periodSeconds": 20, "failureThreshold": 3, "timeoutSeconds": 60}


LOCKED = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}, "readOnlyRootFilesystem": True}
"""What no container of a pod may do; /tmp and /dev/shm are the only places where it writes."""

POD_UID = {"name": "POD_UID", "valueFrom": {"fieldRef": {"fieldPath": "metadata.uid"}}}
"""What opens the closed interfaces: nobody on the network knows it, who may read the pod in Kubernetes does."""


def scratch(disk_gib: int = 1) -> list[dict[str, Any]]:
    """Volumes for what a server writes: shared memory of its Python processes, and temporary files."""
    return [
        {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "1Gi"}},
        {"name": "tmp", "emptyDir": {"sizeLimit": f"{disk_gib}Gi"}},
    ]


def files_volume(serving: Serving) -> dict[str, Any]:
    """The volume of the ConfigMap."""
    return {"name": "files", "configMap": {"name": f"{serving.name}-files"}}


MOUNTS: list[dict[str, Any]] = [
    {"name": "shm", "mountPath": "/dev/shm"},
    {"name": "tmp", "mountPath": "/tmp"},
    {"name": "files", "mountPath": FILES, "readOnly": True},
]
"""Where a server finds those volumes."""


def kubernetes_name(model: str) -> str:
    """A model's name with what Kubernetes takes: small letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", model.lower()).strip("-")[:40].strip("-")


def probe(path: str, port: str | int, *, every: int, failures: int) -> dict[str, Any]:
    """A probe by HTTP."""
    values = {"periodSeconds": every, "failureThreshold": failures, "timeoutSeconds": 2}
    return {"httpGet": {"path": path, "port": port}, **values}

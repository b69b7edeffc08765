"""What the Kubernetes and KServe files of one model have in common."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from engines.service.container_fit import COMPATIBLE, image
from engines.service.served_model import Source, TritonError

DRAIN_SECONDS = 45
"""How long Triton finishes requests after SIGTERM."""

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
        pillow: whether the image needs Pillow, for the ensemble.
    """

    model: str
    source: Source
    capabilities: tuple[str, ...]
    container: str
    storage: str
    own_claim: bool = False
    gpus: int = 1
    compatible: bool = False
    pillow: bool = False

    def __post_init__(self) -> None:
        if not CLAIM.fullmatch(self.storage) and not BUCKET.fullmatch(self.storage):
            raise TritonError(
                f"storage {self.storage!r}: expected pvc://CLAIM, pvc://CLAIM/FOLDER, s3://BUCKET/FOLDER, or for a "
                f"server of your own s3://https://HOST:PORT/BUCKET/FOLDER"
            )
        if not 1 <= self.gpus <= 16:
            raise TritonError(f"{self.gpus} GPUs per pod: expected 1 to 16")

    @property
    def name(self) -> str:
        """The model's name as Kubernetes takes names."""
        return kubernetes_name(self.model)

    @property
    def image(self) -> str:
        """NVIDIA's image, or the one that Dockerfile makes of it."""
        return f"{self.name}-triton:{self.container}-py3" if self.pillow else image(self.container)

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
        """Estimate of a pod's memory: the file is read whole, once more while a new version loads; and /dev/shm."""
        return 6 + 3 * sum(file.stat().st_size for file in self.source.files) // 2**30

    @property
    def arguments(self) -> list[str]:
        """Triton's, the repository and ports aside."""
        return [
            "--disable-auto-complete-config",
            "--strict-readiness=false",
            f"--exit-timeout-secs={DRAIN_SECONDS}",
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

    def resources(self) -> dict[str, Any]:
        """Of the container: GPUs are limits, and requests follow them."""
        memory = f"{self.memory_gib}Gi"
        return {
            "requests": {"cpu": str(2 * self.gpus), "memory": memory},
            "limits": {"nvidia.com/gpu": str(self.gpus), "memory": memory},
        }


def kubernetes_name(model: str) -> str:
    """A model's name with what Kubernetes takes: small letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", model.lower()).strip("-")[:40].strip("-")


def probe(path: str, port: str | int, *, every: int, failures: int) -> dict[str, Any]:
    """One of Triton's health endpoints."""
    values = {"periodSeconds": every, "failureThreshold": failures, "timeoutSeconds": 2}
    return {"httpGet": {"path": path, "port": port}, **values}

"""Kubernetes and KServe files for a model repository, from the templates in templates/.

Nothing here was run on a cluster: the tests check the files against Kubernetes' own schemas, and run the probes, the
proxy and Triton's options with a real tritonserver and nginx.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from engines.service.container_fit import COMPATIBLE, image
from engines.service.ensemble import DECODER_MIB, DECODERS
from engines.service.served_model import Source, TritonError

if TYPE_CHECKING:
    from jinja2 import Environment

HERE = Path(__file__).parent

HEADER = (
    "# Written by neck-export triton. Change it with a kustomize overlay, because the next run overwrites this file.\n"
)

DRAIN_SECONDS = 45
"""How long Triton finishes requests after SIGTERM."""

PAUSE_SECONDS = 10
"""How long a pod that ends still takes requests, so that the Service has left it out by then."""

VALUES = {
    "DRAIN_SECONDS": DRAIN_SECONDS,
    "PAUSE_SECONDS": PAUSE_SECONDS,
    "GRACE_SECONDS": PAUSE_SECONDS + DRAIN_SECONDS + 10,  # until Kubernetes kills a pod that ends
    "FILES": "/etc/neck",  # where the pods find the files of the ConfigMap
    "USER": 1000,  # `triton-server` in NVIDIA's images
    # Triton's interfaces by which a client may read the server's memory, change its models, or make it write files
    "CLOSED": "shared-memory,model-repository,trace,logging",
    "S3_KEYS": ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION"),
    "COMPATIBLE": COMPATIBLE,
    "DECODERS": DECODERS,
}
"""What the templates name."""

PROXY_IMAGE = "nginxinc/nginx-unprivileged:1.27-alpine"

IMAGE_REFERENCE = r"[a-z0-9][a-z0-9.:_/-]*(:[\w][\w.-]{0,127})?(@sha256:[0-9a-f]{64})?"

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

    @property
    def port(self) -> int:
        """The port of the S3 service."""
        return int((self.endpoint or ":443").rpartition(":")[2])


@dataclasses.dataclass(frozen=True)
class Serving:
    """The values of the Kubernetes files.

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
        ensemble: whether images are decoded in the server, for which the image needs Pillow.
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
                f"--storage {self.storage!r} is invalid; expected pvc://CLAIM, pvc://CLAIM/FOLDER, "
                "s3://BUCKET/FOLDER, or, for an S3 server other than Amazon's, "
                "s3://https://HOST:PORT/BUCKET/FOLDER"
            )
        if not 1 <= self.gpus <= 16:
            raise TritonError(f"--gpus {self.gpus} is invalid; expected 1 to 16 GPUs for each pod")
        if not 1 <= self.replicas <= 100:
            raise TritonError(f"--replicas {self.replicas} is invalid; expected 1 to 100 pods")
        if self.rollout not in ("surge", "replace"):
            raise TritonError(f"--rollout {self.rollout!r} is invalid; expected surge or replace")
        for name in (self.image_name, self.proxy_image):
            if name is not None and not re.fullmatch(IMAGE_REFERENCE, name):
                raise TritonError(
                    f"{name!r} is not a valid name of a container image; expected [REGISTRY/]NAME[:TAG][@sha256:DIGEST]"
                )
        if self.image_name is None and self.ensemble:
            raise TritonError(
                "with --ensemble, the Kubernetes pods need a container image with the Python package Pillow, but "
                "NVIDIA's Triton image does not contain Pillow. Repeat the command with a name for a new image, for "
                f"example --image registry.example.com/{self.name}-triton:{self.container}. neck-export then also "
                "writes a Dockerfile for the new image. Build the image from the Dockerfile, and push the image to the "
                "registry"
            )
        theirs, _, tag = (self.image_name or "").partition("@")[0].partition("tritonserver:")
        if theirs.endswith("nvidia/") and tag != f"{self.container}-py3":
            raise TritonError(
                f"--image {self.image_name!r} is not the container image that the model file needs; use --image "
                f"{image(self.container)}, or leave out --image"
            )

    @property
    def name(self) -> str:
        """The model's name in Kubernetes' characters."""
        return kubernetes_name(self.model)

    @property
    def image(self) -> str:
        """The image of the pods: NVIDIA's if no other was named."""
        return self.image_name or image(self.container)

    @property
    def ready_path(self) -> str:
        """Whether the model can answer, or the ensemble, which is loaded after all that it needs.

        `/v2/health/ready` says yes to an empty repository.
        """
        return f"/v2/models/{self.model}{'-images' if self.ensemble else ''}/ready"

    @property
    def gib(self) -> int:
        """Size of one version, rounded up."""
        return -(-self.source.bytes * max(1, len(self.capabilities)) // 2**30)

    @property
    def repository_gib(self) -> int:
        """Room for five versions."""
        return 2 + 5 * self.gib

    @property
    def scratch_gib(self) -> int:
        """Room in /tmp: Triton copies a version from S3 there before it loads it, the old one and the new one."""
        return 1 if self.on_volume else 1 + 2 * self.gib

    @property
    def memory_gib(self) -> int:
        """Estimate of a pod: the file is read whole, once more while a new version loads; /dev/shm; the decoders."""
        decoders = -(-DECODERS * DECODER_MIB // 1024) if self.ensemble else 0
        return 6 + 3 * self.source.bytes // 2**30 + decoders

    @property
    def proxy_config(self) -> str:
        """nginx.conf with room for the largest request: a tensor in JSON needs up to five times its bytes."""
        port = self.source.image
        values = math.prod(side for side in port.shape[1:] if isinstance(side, int))
        one = values * (4 if port.dtype == "float32" else 1)
        megabytes = max(256, 5 * self.source.batch.maximum * one // 10**6)
        text = (HERE / "nginx.conf").read_text(encoding="utf-8")
        return text.replace("client_max_body_size 256m;", f"client_max_body_size {megabytes}m;")

    @property
    def any_ampere(self) -> bool:
        """Whether the plan runs on every GPU from compute capability 8.0 on."""
        return self.source.manifest.get("options", {}).get("hardware_compatible") == "ampere+"

    @property
    def on_volume(self) -> bool:
        """Whether the repository is on a volume, which Triton reads as a folder."""
        return self.bucket is None

    @property
    def claim(self) -> str:
        """The volume's claim."""
        found = CLAIM.fullmatch(self.storage)
        return found["claim"] if found else ""

    @property
    def folder(self) -> str:
        """The folder in the volume, empty for the whole of it."""
        found = CLAIM.fullmatch(self.storage)
        return (found["folder"] or "").strip("/") if found else ""

    @property
    def bucket(self) -> Bucket | None:
        """The repository's address in S3; None if it is on a volume."""
        found = BUCKET.fullmatch(self.storage)
        if not found:
            return None
        return Bucket(found["bucket"], found["folder"].strip("/"), found["endpoint"], found["scheme"] == "https://")

    @property
    def storage_uri(self) -> str:
        """The repository as KServe names it: s3://BUCKET/FOLDER, the host being with the secret."""
        return f"s3://{self.bucket.name}/{self.bucket.folder}".rstrip("/") if self.bucket else self.storage

    @property
    def secret(self) -> str:
        """The secret with the keys of S3, which is yours to create."""
        return f"{self.name}-s3"

    def component(self, capability: str) -> str:
        """The label of the pods for one compute capability, empty for any."""
        return f"cc-{capability.replace('.', '-')}" if capability else "any"

    def named(self, capability: str) -> str:
        """The name of a resource that exists once per compute capability."""
        return f"{self.name}-{self.component(capability)}" if capability else self.name


def kubernetes_name(model: str) -> str:
    """A model's name in Kubernetes' characters: lower-case letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", model.lower()).strip("-")[:40].strip("-")


def kubernetes_files(serving: Serving) -> dict[str, str]:
    """The files by name."""
    applied = ["deployment.yaml", "service.yaml", "network.yaml", "autoscaler.yaml"]
    applied += ["storage.yaml"] if serving.own_claim else []
    names = [*applied, "kustomization.yaml", "kserve.yaml"]
    names += ["upload.yaml"] if serving.on_volume else []
    names += ["Dockerfile"] if serving.ensemble else []
    canary = (HERE / "canary.py").read_text(encoding="utf-8")
    values = {
        "serving": serving,
        "capabilities": serving.capabilities or ("",),
        "canary": canary,
        "digest": hashlib.sha256((serving.proxy_config + canary).encode()).hexdigest(),
        "applied": applied,
        "base_image": image(serving.container),
    }
    return {name: HEADER + _templates().get_template(f"{name}.jinja").render(values) for name in names}


@functools.cache
def _templates() -> Environment:
    """Jinja's environment, which remembers the templates that it compiled."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    templates = Environment(
        loader=FileSystemLoader(HERE / "templates"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    templates.globals |= VALUES
    return templates


def check_folder(folder: Path, files: Sequence[str]) -> None:
    """Refuses a folder whose files would be written over though another wrote them.

    Raises:
        TritonError: naming the first.
    """
    if folder.exists() and not folder.is_dir():
        raise TritonError(
            f"{folder}: neck-export must write the Kubernetes files to a folder with this name, but a file with the "
            "same name exists; move or rename the existing file"
        )
    for name in files:
        path = folder / name
        if path.exists() and not _is_ours(path):
            raise TritonError(
                f"{path}: the file exists and was not written by neck-export, so neck-export does not replace the file "
                "with a new Kubernetes file. Move or rename the existing file, and repeat the command"
            )


def remove_old(folder: Path, files: Collection[str]) -> None:
    """Removes files of an earlier run that this one does not write."""
    for name in {path.stem for path in (HERE / "templates").iterdir()}.difference(files):
        if (folder / name).is_file() and _is_ours(folder / name):
            (folder / name).unlink()


def _is_ours(path: Path) -> bool:
    return path.read_text(encoding="utf-8", errors="replace").startswith(HEADER[:30])

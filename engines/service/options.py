"""What a Triton model repository is asked for, by the command line and by Python (no torch)."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

from export.contract.options import FILES
from neck.option import Option

MODEL, SERVING, KUBERNETES = "Model", "Serving", "Kubernetes"
LEAST_1 = {"min": 1}


@dataclasses.dataclass(frozen=True)
class RepositoryOptions:
    """What to write; the help of the options says what they are.

    Attributes:
        model: X.plan or X.onnx, its manifest beside it.
        more: further plans of the same encoder for other compute capabilities.
        outputs: names or wildcards (`sam3_feat_*`); empty is all.
        ensemble: also NAME-preprocess and NAME-images, which takes JPEG or PNG bytes.
        container: refused where known not to fit.
        kubernetes: a folder for the Kubernetes files, or None.
        storage: None is a new claim of the model's name, in storage.yaml.
        keep: how many versions of each model stay, the active one among them; None keeps all.
    """

    model: Annotated[
        Path,
        Option(
            "Add this TensorRT plan or ONNX file to the model repository. The manifest that neck-export "
            "wrote for the file must be in the same folder. Omit this argument if you use --activate.",
            default=None,
            argument=True,
        ),
    ]
    output: Annotated[
        Path, Option("Write the Triton model repository to this folder; if it exists, the model is added to it.", FILES)
    ] = Path("model_repository")
    more: Annotated[
        tuple[Path, ...],
        Option(
            "Also serve this TensorRT plan, e.g. hopper.plan. It must have been built from the same encoder as MODEL, "
            "but for GPUs of another compute capability. The option can be repeated. [default: no additional plan]",
            MODEL,
            name="--plan",
        ),
    ] = ()
    name: Annotated[
        str, Option("Use this name for the model in Triton; clients send it with every request.", MODEL)
    ] = "sam3-encoder"
    version: Annotated[
        int | None,
        Option(
            "Store the file as this version of the model, e.g. 3. [default: one above the highest existing version]",
            MODEL,
        ),
    ] = None
    keep: Annotated[
        int | None,
        Option(
            "Keep only this many versions of the model and delete the oldest ones, e.g. 3; the version that is "
            "served is never deleted. [default: all versions are kept]",
            MODEL,
            settings=LEAST_1,
        ),
    ] = None
    outputs: Annotated[
        tuple[str, ...],
        Option(
            "Return only outputs with this name to clients; wildcards are allowed ('sam3_feat_*'), and the option can "
            "be repeated. [default: all outputs]",
            SERVING,
        ),
    ] = ()
    ensemble: Annotated[
        bool,
        Option(
            "Add a second model that accepts the bytes of a JPEG or PNG file, and decodes and resizes the image in "
            "Triton. Its name is the value of --name followed by -images, e.g. sam3-encoder-images.",
            SERVING,
        ),
    ] = False
    queue_delay_us: Annotated[
        int,
        Option(
            "Let Triton delay a request by up to this many microseconds to combine it with others into one batch; "
            "0 disables the delay.",
            SERVING,
            settings={"min": 0},
        ),
    ] = 1000
    cuda_graphs: Annotated[
        bool,
        Option(
            "Let Triton execute a TensorRT plan with CUDA graphs, which reduces the launch overhead of its kernels.",
            SERVING,
        ),
    ] = True
    container: Annotated[
        str | None,
        Option(
            "Serve the model with this release of NVIDIA's Triton container, e.g. 25.09. The command fails if that "
            "release is known not to load the file. [default: a release that fits the file]",
            SERVING,
        ),
    ] = None
    perf_input: Annotated[
        Path | None,
        Option(
            "Write a test image to this folder, e.g. perf, and use it as input in the printed perf_analyzer "
            "command. [default: perf_analyzer sends random data]",
            FILES,
        ),
    ] = None
    kubernetes: Annotated[
        Path | None,
        Option(
            "Also write Kubernetes manifests for the deployment of the model. They are written to the folder "
            "`kubernetes`, beside the model repository.",
            KUBERNETES,
            read=bool,
            default=False,
            parse=lambda wanted: Path("kubernetes") if wanted else None,
        ),
    ] = None
    gpus: Annotated[
        int, Option("Request this many GPUs for each pod in the Kubernetes manifests.", KUBERNETES, settings=LEAST_1)
    ] = 1
    storage: Annotated[
        str | None,
        Option(
            "Set the storage from which the pods read the model repository: pvc://CLAIM[/FOLDER] for an existing "
            "volume claim, or s3://[https://HOST:PORT/]BUCKET/FOLDER for S3. [default: a new volume claim, which is "
            "written to storage.yaml]",
            KUBERNETES,
        ),
    ] = None
    image: Annotated[
        str | None,
        Option(
            "Run this container image in the pods instead of NVIDIA's Triton image, e.g. "
            "registry.example.com/sam3-triton:25.09; a digest is allowed. This option is required if --ensemble is "
            "used with --kubernetes. [default: NVIDIA's Triton image]",
            KUBERNETES,
        ),
    ] = None
    proxy_image: Annotated[
        str | None,
        Option(
            "Run this container image as the nginx proxy in front of Triton in each pod. [default: "
            "nginxinc/nginx-unprivileged]",
            KUBERNETES,
        ),
    ] = None
    replicas: Annotated[
        int, Option("Run this many pods for each kind of GPU (compute capability).", KUBERNETES, settings=LEAST_1)
    ] = 2
    rollout: Annotated[
        Literal["surge", "replace"],
        Option(
            "Choose how a deployment is updated: surge (a new pod starts before an old one stops, which needs a "
            "spare GPU) or replace (an old pod stops first).",
            KUBERNETES,
        ),
    ] = "surge"

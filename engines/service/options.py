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
            "TensorRT plan or ONNX file written by neck-export; leave it out with --activate.",
            default=None,
            argument=True,
        ),
    ]
    output: Annotated[Path, Option("Write the model repository to this folder.", FILES)] = Path("model_repository")
    more: Annotated[
        tuple[Path, ...],
        Option(
            "Also serve this plan, built from the same encoder for another kind of GPU; repeatable, e.g. hopper.plan. "
            "[default: none]",
            MODEL,
            name="--plan",
        ),
    ] = ()
    name: Annotated[str, Option("Give the model this name in Triton.", MODEL)] = "sam3-encoder"
    version: Annotated[
        int | None, Option("Write this version of the model, e.g. 3. [default: one above the highest]", MODEL)
    ] = None
    keep: Annotated[
        int | None,
        Option(
            "Keep this many versions and remove older ones, but never the active one, e.g. 3. [default: all]",
            MODEL,
            settings=LEAST_1,
        ),
    ] = None
    outputs: Annotated[
        tuple[str, ...],
        Option("Return only the outputs of this name; repeatable, e.g. 'sam3_feat_*'. [default: all]", SERVING),
    ] = ()
    ensemble: Annotated[
        bool, Option("Add a model that takes the bytes of a JPEG or PNG file and decodes them in Triton.", SERVING)
    ] = False
    queue_delay_us: Annotated[
        int,
        Option(
            "Let a request wait this many microseconds for others to share its batch.", SERVING, settings={"min": 0}
        ),
    ] = 1000
    cuda_graphs: Annotated[bool, Option("Let Triton run a plan with CUDA graphs.", SERVING)] = True
    container: Annotated[
        str | None,
        Option(
            "Serve with this Triton container, e.g. 25.09; one that is known not to load the file is refused. "
            "[default: one that fits the file]",
            SERVING,
        ),
    ] = None
    perf_input: Annotated[
        Path | None,
        Option(
            "Write the packaged image to this folder as the input of the perf_analyzer command that is printed, e.g. "
            "perf. [default: perf_analyzer sends random data]",
            FILES,
        ),
    ] = None
    kubernetes: Annotated[
        Path | None,
        Option(
            "Write Kubernetes files to a folder `kubernetes` beside the repository.",
            KUBERNETES,
            read=bool,
            default=False,
            parse=lambda wanted: Path("kubernetes") if wanted else None,
        ),
    ] = None
    gpus: Annotated[int, Option("Request this many GPUs for each pod.", KUBERNETES, settings=LEAST_1)] = 1
    storage: Annotated[
        str | None,
        Option(
            "Read the repository from here in the cluster: pvc://CLAIM[/FOLDER] of a claim that exists, or "
            "s3://[https://HOST:PORT/]BUCKET/FOLDER. [default: a new claim in storage.yaml]",
            KUBERNETES,
        ),
    ] = None
    image: Annotated[
        str | None,
        Option(
            "Run this image in the pods, with or without a digest; --ensemble requires it, e.g. "
            "registry.example.com/sam3-triton:25.09. [default: NVIDIA's]",
            KUBERNETES,
        ),
    ] = None
    proxy_image: Annotated[
        str | None,
        Option("Run this image as the nginx proxy in the pods. [default: nginxinc/nginx-unprivileged]", KUBERNETES),
    ] = None
    replicas: Annotated[
        int, Option("Keep this many pods running for each kind of GPU.", KUBERNETES, settings=LEAST_1)
    ] = 2
    rollout: Annotated[
        Literal["surge", "replace"],
        Option(
            "Start a new pod before an old one stops, which needs a spare GPU (surge), or after it (replace).",
            KUBERNETES,
        ),
    ] = "surge"

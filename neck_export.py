"""The command line: parses, calls one function of a stage, prints. No work of its own, no heavy import at the top."""

from __future__ import annotations

import os
import sys

from export.contract.interrupt import ignore_signals, take_over_signals

if __name__ == "__main__" or os.path.basename(sys.argv[0]) == "neck-export":  # not where a program imports it
    take_over_signals()  # before the imports that take time

import contextlib
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn, cast, get_args

import typer

if TYPE_CHECKING:
    from engines.plan import PlanResult
    from export.verification.fidelity import Verdict
    from neck.images import ImageFolder

app = typer.Typer(
    help="SAM 3's image encoder: checkpoint -> verified ONNX -> TensorRT engine -> service.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # rich would take half of the time that --help takes
)

DEFAULT_CHECKPOINT = Path("sam3.pt")
DEFAULT_ONNX = Path("build/sam3-encoder.onnx")
OUT_OF_MEMORY = ("can't allocate memory", "bad allocation", "bad_alloc", "Failed to allocate memory")
"""What torch and ONNX Runtime say, whose errors are no MemoryError."""


Precision = Literal["fp32", "fp16", "bf16", "fp8", "int8"]
OutputType = Literal["fp32", "fp16", "bf16"]
AttentionForm = Literal["auto", "fp32acc", "fused", "unfused"]


def parse_attention(text: str) -> str:
    """A form of attention; one that was dropped is refused with its replacement."""
    forms = get_args(AttentionForm)
    if text == "scores32":
        raise typer.BadParameter(
            "scores32 was removed; use fp32acc: the same runtimes read it, and both of its products accumulate in FP32"
        )
    if text not in forms:
        raise typer.BadParameter(f"{text!r} is not one of {', '.join(forms)}")
    return text


ATTENTION: dict[str, Any] = {"parser": parse_attention, "metavar": f"[{'|'.join(get_args(AttentionForm))}]"}
Upsampling = Literal["auto", "deconv", "conv"]
Residual = Literal["auto", "fp16", "fp32"]
FlavorChoice = Literal["auto", "tensorrt", "rtx"]
Adapter = Annotated[Path | None, typer.Option(help="A folder of PEFT: its LoRA is merged into the weights")]
AdapterAlpha = Annotated[
    float | None, typer.Option(help="lora_alpha of an adapter inside the checkpoint, where nothing tells it")
]
State = Annotated[
    str | None, typer.Option(help="Which state of a training file: ema [default: model's, or the only one]")
]
Prefix = Annotated[str | None, typer.Option(help="Which encoder of a state that holds several: detector.")]
Quantize = Annotated[
    list[str] | None,
    typer.Option(help="fp8, int8: which products: all, *.mlp.fc2, or auto: by the budget [auto]"),
]
Budget = Annotated[float | None, typer.Option(help="fp8, int8: relative L2 that the features may err [default: 0.05]")]
CalibrationFile = Annotated[
    Path | None, typer.Option("--calibration", help="X.safetensors: what is calibrated is kept there, and used again")
]
Config = Annotated[Path | None, typer.Option(help="encoder.json, where the weights do not tell")]
Sam2Outputs = Annotated[
    Literal["features", "head"],
    typer.Option(help="head: the mask decoder's conv_s0 and conv_s1 folded in: sam2_high_res_0, _1, sam2_feat_2"),
]
ImageRange = Annotated[
    str | None, typer.Option(help="LOW:HIGH, black and white of images deeper than 8 bits [default: their high byte]")
]
Tolerance = Annotated[list[str] | None, typer.Option(help="NAME=VALUE: relative L2 of an output")]
Gpu = Annotated[int | None, typer.Option("--device", help="Number of the GPU that runs the plan [default: 0]", min=0)]
Images = Annotated[Path | None, typer.Option(help="Folder of images to verify on")]
ItsWeights = Annotated[Path | None, typer.Option(help="Its weights [default: where the manifest says]")]
ItsAdapter = Annotated[Path | None, typer.Option(help="What was merged [default: where the manifest says]")]
Necks = Annotated[str, typer.Option(help="both, all, or names with commas; auto: sam3, or what is there")]
Levels = Annotated[str, typer.Option(help="Levels with commas, 0 the finest")]
AsJson = Annotated[bool, typer.Option("--json", help="As JSON")]


@app.command()
def onnx(
    checkpoint: Annotated[
        str | None, typer.Option(help="sam3.pt, .safetensors, a folder of shards, or `random` [default: sam3.pt here]")
    ] = None,
    adapter: Adapter = None,
    adapter_alpha: AdapterAlpha = None,
    state: State = None,
    prefix: Prefix = None,
    config: Config = None,
    image_size: Annotated[
        str | None, typer.Option(help="Pixels: 1008, or height x width: 1008x672 [default: the config's, 1008]")
    ] = None,
    batch: Annotated[str, typer.Option(help="Batch size, or minimum:optimum:maximum")] = "1",
    neck: Necks = "auto",
    levels: Levels = "all",
    positions: Annotated[
        Literal["graph", "file", "none"], typer.Option(help="Position encodings: outputs, a file beside it, or none")
    ] = "graph",
    sam2_outputs: Sam2Outputs = "features",
    input: Annotated[
        Literal["float", "uint8"], typer.Option(help="float: normalized (B, 3, H, W); uint8: pixels (B, H, W, 3)")
    ] = "float",
    precision: Annotated[Precision, typer.Option(help="Type of weights and activations")] = "fp32",
    attention: Annotated[
        AttentionForm, typer.Option(help="What of attention is computed in FP32 [auto: fp32acc for fp16]", **ATTENTION)
    ] = "auto",
    upsampling: Annotated[Upsampling, typer.Option(help="ConvTranspose, or 1x1 convolution and DepthToSpace")] = "auto",
    keep_fp32: Annotated[list[str] | None, typer.Option(help="Module kept in FP32: trunk.blocks.31, convs.*")] = None,
    output_dtype: Annotated[
        OutputType | None, typer.Option(help="Type of the outputs [default: the precision's]")
    ] = None,
    opset: Annotated[str, typer.Option(help="17 to 24, or auto")] = "auto",
    residual: Annotated[
        Residual, typer.Option(help="Type of the blocks' sums [auto: the precision's; FP32 where verification fails]")
    ] = "auto",
    quantize: Quantize = None,
    budget: Budget = None,
    calibration: CalibrationFile = None,
    target: Annotated[
        str, typer.Option(help="Who shall read the file, with commas: tensorrt-10.3, jetpack-6.2, triton-25.09")
    ] = "",
    rewrite: Annotated[bool, typer.Option(help="The exact rewrites for deployment")] = True,
    verify: Annotated[bool, typer.Option(help="Compare with PyTorch before the file gets its name")] = True,
    images: Annotated[
        Path | None, typer.Option(help="Folder of images to verify on: its first, as many as the batch takes")
    ] = None,
    image_range: ImageRange = None,
    tolerance: Tolerance = None,
    seed: Annotated[int, typer.Option(help="Seed of random weights", min=0, max=2**31 - 1)] = 0,
    output: Annotated[Path, typer.Option(help="The file to write")] = DEFAULT_ONNX,
) -> None:
    """Exports the encoder to ONNX and proves it equal to PyTorch."""
    with stage() as report:
        from export.contract.signature import BatchRange
        from export.graph.rewrite import Rewrites
        from export.pipeline import ExportOptions, export_onnx
        from export.quantization.select_quantization import QuantizeOptions
        from export.weights_origin import state_line
        from neck.config import EncoderConfig

        source = choose_checkpoint(checkpoint)
        options = ExportOptions(
            output=output,
            checkpoint=source,
            state=state,
            prefix=prefix,
            config=EncoderConfig.from_file(config) if config else None,
            adapter=adapter,
            adapter_alpha=adapter_alpha,
            seed=seed,
            image_size=parse_size(image_size) if image_size else None,
            batch=BatchRange.parse(batch),
            necks=neck,
            levels=levels,
            positions=positions,
            sam2_outputs=sam2_outputs,
            input_kind=input,
            precision=precision,
            attention=attention,
            upsampling=upsampling,
            keep_fp32=tuple(keep_fp32 or ()),
            output_precision=output_dtype,
            opset=parse_opset(opset),
            residual=residual,
            quantize=QuantizeOptions(tuple(quantize or ()), budget, calibration),
            targets=target,
            rewrites=Rewrites() if rewrite else Rewrites.none(),
            verify=verify,
            images=image_folder(images, image_range),
            tolerances=parse_tolerances(tolerance),
        )
        result = export_onnx(options, report)
        chosen = state_line(result.manifest["weights"])
    for note in result.manifest.get("notes", ()):
        typer.echo(f"note: {note}")
    if chosen:
        typer.echo(chosen)
    show_curve(result.manifest)
    if result.verdict:
        show_verdict(result.verdict)
    else:
        typer.echo("not verified: --no-verify")
    if result.read_by:
        typer.echo(result.read_by)
    for entry in result.manifest["files"]:
        typer.echo(f"{result.path.with_name(entry['name'])}  {entry['bytes'] / 1e6:,.1f} MB")
    typer.echo(result.manifest_path)


@app.command()
def trt(
    model: Annotated[Path | None, typer.Argument(help="The ONNX file [default: the newest in build/]")] = None,
    fp16: Annotated[bool, typer.Option("--fp16", help="Compute in FP16")] = False,
    bf16: Annotated[bool, typer.Option("--bf16", help="Compute in BF16")] = False,
    fp32: Annotated[bool, typer.Option("--fp32", help="Compute in FP32 [default: as the file]")] = False,
    precision: Annotated[
        Precision | None, typer.Option(help="The same, and fp8, int8: calibrates and quantizes an FP32 file")
    ] = None,
    quantize: Quantize = None,
    budget: Budget = None,
    calibration: CalibrationFile = None,
    flavor: Annotated[FlavorChoice, typer.Option(help="auto: TensorRT where a GPU is, else TensorRT-RTX")] = "auto",
    compute_capability: Annotated[str, typer.Option(help="GPUs to build for (RTX): 8.6,8.9,12.0")] = "",
    batch: Annotated[str | None, typer.Option(help="Profile of a dynamic batch [default: the file's]")] = None,
    attention: Annotated[
        AttentionForm,
        typer.Option(help="Form of attention [auto: the file's, or the next that this TensorRT takes]", **ATTENTION),
    ] = "auto",
    upsampling: Annotated[Upsampling, typer.Option(help="Form, where an FP32 file is lowered")] = "auto",
    keep_fp32: Annotated[list[str] | None, typer.Option(help="Module kept in FP32: trunk.blocks.31")] = None,
    residual: Annotated[
        Residual, typer.Option(help="Type of the blocks' sums, where an FP32 file is lowered")
    ] = "auto",
    timing_cache: Annotated[Path | None, typer.Option(help="File of measured kernels (TensorRT)")] = None,
    replay_timing: Annotated[
        Path | None, typer.Option(help="A saved timing cache: the same kernels again, or no plan (TensorRT)")
    ] = None,
    optimization_level: Annotated[int | None, typer.Option(help="0 (fast build) to 5")] = None,
    workspace_gib: Annotated[float | None, typer.Option(help="Scratch memory on the GPU")] = None,
    version_compatible: Annotated[bool, typer.Option(help="The plan loads in later versions")] = False,
    hardware_compatible: Annotated[
        Literal["none", "ampere+", "same"], typer.Option(help="GPUs that the plan runs on (TensorRT)")
    ] = "none",
    checkpoint: ItsWeights = None,
    adapter: ItsAdapter = None,
    tune: Annotated[bool, typer.Option(help="Build all forms, keep the fastest that passes (GPU)")] = False,
    verify: Annotated[bool, typer.Option(help="Compare with PyTorch before the plan gets its name")] = True,
    images: Images = None,
    image_range: ImageRange = None,
    tolerance: Tolerance = None,
    output: Annotated[Path | None, typer.Option(help="The plan [default: beside the ONNX file]")] = None,
) -> None:
    """Builds a TensorRT engine and proves it equal to PyTorch."""
    chosen = [name for name, asked in (("fp16", fp16), ("bf16", bf16), ("fp32", fp32)) if asked]
    chosen += [precision] if precision else []
    if len(chosen) > 1:
        raise typer.BadParameter(f"{' and '.join(chosen)}: choose one precision")
    with stage() as report:
        from engines.builder.onnx_source import newest_onnx
        from engines.builder.options import BuildOptions
        from engines.plan import PlanOptions, make_plan
        from export.contract.signature import BatchRange
        from export.quantization.select_quantization import QuantizeOptions

        onnx = model or newest_onnx(DEFAULT_ONNX.parent)
        options = PlanOptions(
            onnx=onnx,
            output=output or onnx.with_suffix(".plan"),
            precision=cast("Precision | None", chosen[0] if chosen else None),
            flavor=flavor,
            attention=attention,
            upsampling=upsampling,
            keep_fp32=tuple(keep_fp32 or ()),
            residual=residual,
            quantize=QuantizeOptions(tuple(quantize or ()), budget, calibration),
            build=BuildOptions(
                batch=BatchRange.parse(batch) if batch else None,
                compute_capabilities=tuple(part for part in compute_capability.split(",") if part),
                optimization_level=optimization_level,
                workspace_bytes=int(workspace_gib * 2**30) if workspace_gib else None,
                version_compatible=version_compatible,
                hardware_compatible=hardware_compatible,
                timing_cache=timing_cache,
                replay_timing=replay_timing,
            ),
            verify=verify,
            images=image_folder(images, image_range),
            tolerances=parse_tolerances(tolerance),
            checkpoint=checkpoint,
            adapter=adapter,
        )
        if tune:
            from engines.tune import tune_plan, tuning_lines

            tuning = tune_plan(options, report)
            typer.echo("\n".join(tuning_lines(tuning)))
            result = tuning.best
        else:
            result = make_plan(options, report)
    show_plan(result)


@app.command()
def profile(
    plan: Annotated[Path, typer.Argument(help="A plan of neck-export")],
    batch: Annotated[int | None, typer.Option(help="Batch size [default: the profile's optimum]")] = None,
    device: Gpu = None,
    as_json: AsJson = False,
) -> None:
    """Measures a plan's latency on the GPU: percentiles, transfers apart, memory, layers."""
    with stage():
        from engines.run.latency import profile_lines
        from engines.run.profiling import profile_plan

        found = profile_plan(plan, batch=batch, device=device)
    show(found.to_dict(), profile_lines(found), as_json)


@app.command()
def bisect(
    file: Annotated[Path, typer.Argument(help="An FP16 or BF16 ONNX file (made with --no-verify), or a plan (GPU)")],
    checkpoint: ItsWeights = None,
    adapter: ItsAdapter = None,
    images: Annotated[Path | None, typer.Option(help="Folder of images")] = None,
    image_range: ImageRange = None,
    tolerance: Tolerance = None,
) -> None:
    """Finds the block that first leaves tolerance, and the smallest FP32 island that mends the file."""
    with stage() as report:
        from engines.bisect import bisect as search
        from engines.bisect import finding_lines

        tolerances, folder = parse_tolerances(tolerance), image_folder(images, image_range)
        finding = search(file, checkpoint, folder, tolerances, report, adapter=adapter)
    typer.echo("\n".join(finding_lines(finding)))


@app.command()
def verify(
    file: Annotated[Path, typer.Argument(help="An ONNX file or a plan (GPU) of neck-export")],
    checkpoint: ItsWeights = None,
    adapter: ItsAdapter = None,
    images: Images = None,
    image_range: ImageRange = None,
    tolerance: Tolerance = None,
    save_reference: Annotated[
        Path | None, typer.Option(help="X.safetensors: the images and PyTorch's outputs, for `neck-engine --compare`")
    ] = None,
    target: Annotated[str, typer.Option(help="Who must be able to read an ONNX file, as of `onnx`")] = "",
    device: Gpu = None,
) -> None:
    """Compares a file with the plain PyTorch module and writes the verdict into its manifest."""
    notes: list[str] = []
    with noted(notes), stage() as report:
        from engines.builder.plan_kind import is_plan

        asked, line = (checkpoint, image_folder(images, image_range), parse_tolerances(tolerance)), None
        plan = is_plan(file)
        if device is not None and not plan:
            raise typer.BadParameter("--device chooses the GPU for a plan; an ONNX file is verified on the CPU")
        if plan:
            from engines.run.verify import verify_plan_file

            verdict = verify_plan_file(
                file, *asked, report, adapter=adapter, save=save_reference, notes=notes, device=device
            )
        else:
            from export.contract.onnx_file import OnnxFile
            from export.pipeline import verify_file
            from export.verification.target_check import graph_needs, read_by

            parsed = OnnxFile(file)
            more: dict[str, Any] = {"save": save_reference, "targets": target, "notes": notes}
            verdict = verify_file(parsed, *asked, report, adapter=adapter, **more)
            line = read_by(graph_needs(parsed.model))
        show_verdict(verdict)
        if line:
            typer.echo(line)
        if save_reference:
            typer.echo(save_reference)


@app.command()
def masks(
    file: Annotated[Path, typer.Argument(help="A plan or an ONNX file of neck-export")],
    model: Annotated[Path, typer.Option(help="The whole SAM 3: a folder of transformers, or sam3.pt")],
    images: Annotated[Path, typer.Option(help="Folder of images; all are used")],
    prompt: Annotated[list[str] | None, typer.Option(help="A text: objects of its kind")] = None,
    points: Annotated[list[str] | None, typer.Option(help="X,Y: the object there; parts of width and height")] = None,
    boxes: Annotated[list[str] | None, typer.Option(help="X0,Y0,X1,Y1: the object in it; parts, too")] = None,
    image_range: ImageRange = None,
    gate: Annotated[float, typer.Option(help="The lowest mean mask IoU that passes", min=0, max=1)] = 0.99,
    threshold: Annotated[float, typer.Option(help="The least score of an object", min=0, max=1)] = 0.5,
    check: Annotated[bool, typer.Option(help="Refuse a file of other weights than the model's")] = True,
    save: Annotated[Path | None, typer.Option(help="Folder for images of both masks and their difference")] = None,
) -> None:
    """Runs the whole SAM 3 with its own encoder and with the file: are the masks the same?"""
    spots, frames = parse_places(points, 2, "--points"), parse_places(boxes, 4, "--boxes")
    notes: list[str] = []
    with stage() as report:
        from benchmarks.masks.compare import MasksOptions, compare_masks
        from benchmarks.masks.objects import lines, worst_lines
        from benchmarks.masks.transformers_models import Prompts

        folder, prompts = image_folder(images, image_range) or images, Prompts(tuple(prompt or ()), spots, frames)
        options = MasksOptions(file, model, folder, prompts, gate=gate, threshold=threshold, check=check, save=save)
        found = compare_masks(options, report, notes)
    typer.echo("\n".join([*lines(found), *(f"note: {note}" for note in notes)]))
    if not found["passed"]:
        _fail("\n".join([f"{file}: the masks are not the model's", *worst_lines(found)]), 3)


@app.command()
def triton(
    model: Annotated[
        Path | None, typer.Argument(help="TensorRT plan or ONNX file written by neck-export; none with --activate")
    ] = None,
    more: Annotated[
        list[Path] | None, typer.Option("--plan", help="Also this plan of the same encoder, for another GPU")
    ] = None,
    name: Annotated[str, typer.Option(help="The model's name in Triton")] = "sam3-encoder",
    version: Annotated[int | None, typer.Option(help="Its version [default: one above the highest there]")] = None,
    activate: Annotated[
        int | None,
        typer.Option(help="Serve this version, which is in the repository: a newer one, or an older one again"),
    ] = None,
    keep: Annotated[
        int | None,
        typer.Option(
            help="Number of versions to keep; older ones are removed, never the active one [default: all]",
            min=1,
        ),
    ] = None,
    outputs: Annotated[list[str] | None, typer.Option(help="Outputs to answer with [default: all]")] = None,
    ensemble: Annotated[bool, typer.Option(help="Also a model that takes JPEG or PNG bytes")] = False,
    queue_delay_us: Annotated[int, typer.Option(help="How long a request may wait for a batch", min=0)] = 1000,
    cuda_graphs: Annotated[bool, typer.Option(help="Run by CUDA graphs (plans)")] = True,
    container: Annotated[str | None, typer.Option(help="The Triton release that will serve, such as 25.09")] = None,
    kubernetes: Annotated[bool, typer.Option(help="Also a folder `kubernetes` beside the repository")] = False,
    gpus: Annotated[int, typer.Option(help="GPUs of each pod, in the Kubernetes files", min=1)] = 1,
    storage: Annotated[
        str | None,
        typer.Option(
            help="Where pods find the repository: pvc://CLAIM[/FOLDER] of an existing claim, or "
            "s3://[https://HOST:PORT/]BUCKET/FOLDER [default: a claim that storage.yaml makes]"
        ),
    ] = None,
    image: Annotated[
        str | None,
        typer.Option(help="Image of the pods, with or without a digest; required by --ensemble [default: NVIDIA's]"),
    ] = None,
    proxy_image: Annotated[
        str | None, typer.Option(help="Image of the nginx proxy in the pods [default: nginx's own]")
    ] = None,
    replicas: Annotated[int, typer.Option(help="Pods that always run, for each kind of GPU", min=1)] = 2,
    rollout: Annotated[
        Literal["surge", "replace"],
        typer.Option(help="surge starts a new pod first and needs a spare GPU; replace ends an old pod first"),
    ] = "surge",
    output: Annotated[Path, typer.Option(help="The model repository")] = Path("model_repository"),
) -> None:
    """Lays a plan or an ONNX file out for Triton, as a new version of its model; or chooses the version to serve."""
    if activate is not None and model is None:
        _activate(output, name, activate, keep)
        return
    if model is None or activate is not None:
        raise typer.BadParameter("give a plan or an ONNX file, or --activate with a version", param_hint="MODEL")
    with stage() as report:
        from engines.service.repository import RepositoryOptions, make_repository

        options = RepositoryOptions(
            model=model,
            output=output,
            more=tuple(more or ()),
            name=name,
            version=version,
            outputs=tuple(outputs or ()),
            ensemble=ensemble,
            queue_delay_us=queue_delay_us,
            cuda_graphs=cuda_graphs,
            container=container,
            kubernetes=output.parent / "kubernetes" if kubernetes else None,
            gpus=gpus,
            storage=storage,
            image=image,
            proxy_image=proxy_image,
            replicas=replicas,
            rollout=rollout,
            keep=keep,
        )
        made = make_repository(options, report)
    for note in made.notes:
        typer.echo(note)
    for path in made.files:
        typer.echo(path)


def _activate(output: Path, name: str, version: int, keep: int | None) -> None:
    with stage() as report:
        from engines.service.activation import activate_version

        made = activate_version(output, name, version, keep, report)
    before = f", before it {made.before}" if made.before not in (None, version) else ""
    typer.echo(f"version {version} of {name} is active{before}")
    for path in made.removed:
        typer.echo(f"removed {path}")


@app.command()
def bench(
    files: Annotated[list[Path] | None, typer.Argument(help="With --merge: the report.json files")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A small size, few rounds, no sweeps: minutes")] = False,
    checkpoint: Annotated[str | None, typer.Option(help="As of `onnx` [default: sam3.pt here]")] = None,
    adapter: Adapter = None,
    adapter_alpha: AdapterAlpha = None,
    state: State = None,
    prefix: Prefix = None,
    config: Config = None,
    image_size: Annotated[str | None, typer.Option(help="Pixels: 1008, or height x width: 1008x672")] = None,
    batch: Annotated[int, typer.Option(help="Images in a run", min=1)] = 1,
    neck: Necks = "auto",
    levels: Levels = "all",
    positions: Annotated[Literal["graph", "none"], typer.Option(help="Position encodings: outputs or none")] = "graph",
    sam2_outputs: Sam2Outputs = "features",
    images: Annotated[Path | None, typer.Option(help="Folder of images to compare outputs on")] = None,
    image_range: ImageRange = None,
    device: Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="auto: the GPU where there is one")] = "auto",
    backend: Annotated[list[str] | None, typer.Option(help="Measure this one [default: all; see report.md]")] = None,
    rounds: Annotated[int | None, typer.Option(help="Times that every backend has its turn", min=1)] = None,
    sweep: Annotated[bool, typer.Option(help="Also 336 to 1344 pixels, and batches of 1 to 8")] = True,
    minutes: Annotated[float | None, typer.Option(help="End after so long; a rerun goes on")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Forget what an interrupted run measured")] = False,
    plan: Annotated[Path | None, typer.Option(help="A plan whose kernels go into the report")] = None,
    masks: Annotated[list[Path] | None, typer.Option(help="A file whose `masks` verdict goes into the report")] = None,
    export: Annotated[bool, typer.Option("--export", help="Also what the export costs, at full size")] = False,
    merge: Annotated[bool, typer.Option("--merge", help="Measure nothing: one report of several report.json")] = False,
    compare: Annotated[Path | None, typer.Option(help="An older report.json: exit 3 where something got worse")] = None,
    output: Annotated[Path, typer.Option(help="Folder of report.json, report.md, report.html")] = Path("report"),
) -> None:
    """Measures every way to run the encoder here, and how exact each is; writes a report."""
    if bool(files) != merge:
        raise typer.BadParameter("give files with --merge, and --merge with files", param_hint="--merge")
    with stage() as report:
        from benchmarks.bench import BenchOptions, run_bench
        from benchmarks.report.report_files import check_folder, write_report
        from benchmarks.results.comparison import compare_results
        from benchmarks.results.result_files import merge_results, read_result
        from neck.config import EncoderConfig

        check_folder(output)
        older = read_result(compare) if compare else None
        if files:
            result = merge_results([read_result(file) for file in files])
        else:
            options = BenchOptions(
                output=output,
                quick=quick,
                checkpoint=choose_checkpoint(checkpoint),
                state=state,
                prefix=prefix,
                adapter=adapter,
                adapter_alpha=adapter_alpha,
                config=EncoderConfig.from_file(config) if config else None,
                image_size=parse_size(image_size) if image_size else None,
                batch=batch,
                necks=neck,
                levels=levels,
                positions=positions,
                sam2_outputs=sam2_outputs,
                images=image_folder(images, image_range),
                device=device,
                backends=tuple(backend or ()),
                rounds=rounds,
                sweep=sweep,
                minutes=minutes,
                fresh=fresh,
                plan=plan,
                masks=tuple(masks or ()),
                export=export,
            )
            result = run_bench(options, report)
        _, text, page = write_report(result, output)
        changes = compare_results(result, older) if older else []
    typer.echo(text.read_text(encoding="utf-8"))
    typer.echo(page)
    for change in changes:
        typer.echo(change, err=True)
    if changes:
        raise typer.Exit(3)


@app.command()
def inspect(
    file: Annotated[Path, typer.Argument(help="An ONNX file or a plan")],
    as_json: AsJson = False,
    check: Annotated[
        bool, typer.Option("--check", help="Compare every byte of an ONNX file with the manifest's SHA-256 first")
    ] = False,
    strip_header: Annotated[Path | None, typer.Option(help="Of Ultralytics' engine: write the bare plan here")] = None,
) -> None:
    """Shows a file's contract, graph or kernels, and what was verified."""
    with stage():
        from engines.builder import plan_kind

        if strip_header:
            found = plan_kind.strip_header(file, strip_header)
            lines = [f"{name}: {value}" for name, value in found.items()] + [str(strip_header)]
        elif plan_kind.is_plan(file):
            from engines.inspect import inspect_plan, plan_lines

            found = inspect_plan(file)
            lines = plan_lines(file, found)
        else:
            from export.inspect import inspect_onnx, summary_lines

            found = inspect_onnx(file, check)
            lines = summary_lines(found)
    show(found, lines, as_json)


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Tells what this machine can do and what to install for the rest."""
    with stage():
        from engines.doctor import examine, report_lines

        found = examine()
    show(found, report_lines(found), as_json)


def show(values: dict[str, Any], lines: list[str], as_json: bool) -> None:
    """Prints values as JSON, or the lines that tell them."""
    from export.contract.manifest import to_json

    typer.echo(to_json(values).rstrip() if as_json else "\n".join(lines))


def show_plan(result: PlanResult) -> None:
    """Prints what a plan is made of and what was and was not verified."""
    if result.reused:
        typer.echo("nothing has changed: the plan that is there is kept")
    elif result.reason:
        typer.echo(f"built again: {result.reason}")
    for note in result.notes:
        typer.echo(note)
    show_curve(result.manifest)
    if result.verdict:
        show_verdict(result.verdict)
    checked = result.manifest["verification"]
    typer.echo("the plan is verified" if checked["verified"] else f"the plan is {checked['reason']}")
    graph = checked.get("onnx")
    if graph:
        typer.echo(f"its ONNX graph is {'verified' if graph['verified'] else 'NOT verified'}: {graph['method']}")
    if result.layers:
        typer.echo(result.layers.summary())
        if warning := result.layers.warning():
            typer.echo(f"warning: {warning}", err=True)
    elif reason := result.manifest.get("no_layers"):
        typer.echo(f"no layer report: {reason}")
    typer.echo(f"{result.path}  {result.path.stat().st_size / 1e6:,.1f} MB")


def show_curve(manifest: dict[str, Any]) -> None:
    """Prints how many products were quantized, and what more or fewer would have meant, where that was measured."""
    quantization = manifest.get("quantization") or {}
    if quantization.get("curve"):
        from export.quantization.choice import curve_lines

        told = quantization.get("rates") or ""
        typer.echo("\n".join(curve_lines(quantization["curve"], len(quantization["products"]), told)))


def choose_checkpoint(asked: str | None) -> Path | None:
    """The checkpoint to read, or None for random weights, saying so where nothing was asked."""
    if asked == "random":
        return None
    if asked is not None:
        return Path(asked)
    if DEFAULT_CHECKPOINT.exists():
        return DEFAULT_CHECKPOINT
    typer.echo(f"no --checkpoint and no {DEFAULT_CHECKPOINT} here: exporting seeded RANDOM weights", err=True)
    return None


def parse_size(size: str) -> int | tuple[int, int]:
    """Reads `1008` or `1008x672` (height x width)."""
    sides = size.lower().split("x")
    try:
        numbers = [int(side) for side in sides]
    except ValueError:
        raise typer.BadParameter(
            f"{size!r}: expected pixels such as 1008 or 1008x672", param_hint="--image-size"
        ) from None
    if len(numbers) > 2:
        raise typer.BadParameter(f"{size!r}: expected one or two numbers", param_hint="--image-size")
    return numbers[0] if len(numbers) == 1 else (numbers[0], numbers[1])


def image_folder(images: Path | None, image_range: str | None) -> Path | ImageFolder | None:
    """The folder of --images, read as --image-range says (`LOW:HIGH`); tells which of its files are skipped."""
    if images is None:
        if image_range is not None:
            raise typer.BadParameter("--image-range requires --images", param_hint="--image-range")
        return None
    from neck.images import ImageError, ImageFolder, ValueRange, find_images, skipped_line

    with contextlib.suppress(ImageError):  # the stage says it, with what was skipped
        if find_images(images) and (skipped := skipped_line(images)):
            typer.echo(f"note: {skipped}", err=True)
    if image_range is None:
        return images
    try:
        return ImageFolder(images, ValueRange.parse(image_range))
    except ImageError as error:
        raise typer.BadParameter(str(error), param_hint="--image-range") from None


def parse_places(given: list[str] | None, count: int, option: str) -> tuple[tuple[float, ...], ...]:
    """Reads points or boxes: so many numbers with commas each."""
    try:
        places = tuple(tuple(map(float, text.split(","))) for text in given or ())
    except ValueError:
        places = ((),)
    if any(len(place) != count for place in places):
        raise typer.BadParameter(f"expected {count} numbers with commas, such as 0.5", param_hint=option)
    return places


def parse_opset(opset: str) -> int | None:
    """Reads a number or `auto`."""
    if opset == "auto":
        return None
    if not opset.isdecimal():
        raise typer.BadParameter(f"{opset!r}: expected a number from 17 to 24, or auto", param_hint="--opset")
    return int(opset)


def parse_tolerances(given: list[str] | None) -> dict[str, float]:
    """Reads NAME=VALUE pairs."""
    pairs = {}
    for pair in given or []:
        name, _, value = pair.partition("=")
        try:
            pairs[name] = float(value)
        except ValueError:
            raise typer.BadParameter(
                f"{pair!r}: expected NAME=VALUE, such as sam3_feat_0=0.02", param_hint="--tolerance"
            ) from None
    return pairs


@contextlib.contextmanager
def stage() -> Iterator[Callable[[str], None]]:
    """Runs a stage: shows its progress, turns its errors into one or two lines and an exit code."""
    try:
        from neck.progress import step
        from neck.progress_display import shown

        with shown(sys.stderr):
            yield step
    except (typer.BadParameter, typer.Exit):
        raise
    except KeyboardInterrupt:
        _fail("interrupted", 130)
    except Exception as error:
        if isinstance(error, MemoryError) or any(words in str(error) for words in OUT_OF_MEMORY):
            _fail("out of memory; close other programs, or take a smaller --image-size or --batch")
        verdict = getattr(error, "verdict", None)
        if verdict is not None:
            show_verdict(verdict, err=True)
            _fail(str(error), 3)
        if type(error).__module__.split(".")[0] not in {"neck", "export", "engines", "benchmarks"}:
            raise  # a bug of ours: its traceback is wanted
        _fail(str(error))


@contextlib.contextmanager
def noted(notes: list[str]) -> Iterator[None]:
    """Prints notes after everything else, also where the stage failed."""
    try:
        yield
    finally:
        for note in notes:
            typer.echo(f"note: {note}", err=True)


def _fail(message: str, code: int = 1) -> NoReturn:
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(code)


def show_verdict(verdict: Verdict, err: bool = False) -> None:
    """Prints the error figures of every output."""
    typer.echo(verdict.method, err=err)
    typer.echo(f"{'output':20} {'max abs':>10} {'mean abs':>10} {'rel. L2':>10} {'cosine':>11}  verdict", err=err)
    for row in verdict.comparisons:
        word = "ok" if row.passed else f"{row.non_finite} non-finite" if row.non_finite else "FAILED"
        figures = f"{row.max_abs:10.2e} {row.mean_abs:10.2e} {row.relative_l2:10.2e} {row.cosine:11.8f}"
        typer.echo(f"{row.name:20} {figures}  {word}", err=err)
    if verdict.first_bad:
        typer.echo(f"first tensor that is not finite: {verdict.first_bad}", err=err)


def prepare_text() -> None:
    """Lets every path be printed, and `--option=~/file` be written, which shells leave as it is."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # what a code page lacks (cp1252, ASCII), and bytes of a path that are no UTF-8, are escaped
            stream.reconfigure(errors="backslashreplace")
    for index, argument in enumerate(sys.argv):
        option, sign, value = argument.partition("=") if argument.startswith("--") else ("", "", argument)
        if value.startswith("~/") or value == "~":
            sys.argv[index] = option + sign + os.path.expanduser(value)


def main() -> None:
    """Entry point of `neck-export`."""
    take_over_signals()
    prepare_text()
    try:
        app()
    finally:
        ignore_signals()  # while Python ends


if __name__ == "__main__":
    main()

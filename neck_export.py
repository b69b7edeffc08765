"""The command line: parses, calls one function of a stage, prints. No work of its own, no heavy import at the top."""

from __future__ import annotations

import os
import sys

from export.contract.interrupt import ignore_signals, take_over_signals

if __name__ == "__main__" or os.path.basename(sys.argv[0]) == "neck-export":  # not where a program imports it
    take_over_signals()  # before the imports that take time

import contextlib
import dataclasses
import io
from collections.abc import Callable, Iterator
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, TypeVar

import typer
import typer.core

from benchmarks.masks import options as masks_options
from benchmarks.masks.options import MasksOptions
from benchmarks.options import MEASURED, REPORT, BenchOptions
from engines.builder.options import BUILD, PlanOptions
from engines.service.options import KUBERNETES, MODEL, SERVING, RepositoryOptions
from export.contract import options as shared
from export.contract.exit_codes import Exit
from export.contract.options import DEVICE, BisectOptions, ExportOptions, VerifyOptions
from neck.option import UNSET, Option, OptionError, build, declared, parameters

if TYPE_CHECKING:
    from engines.plan import PlanResult
    from export.pipeline import ExportResult
    from export.verification.fidelity import Verdict

HELP = """SAM 3's image encoder: from a checkpoint to a verified ONNX file, a TensorRT plan and a service.

The usual sequence:

\b
  neck-export onnx --checkpoint sam3.pt --precision fp16   writes build/sam3-encoder.onnx
  neck-export trt --fp16                                   writes build/sam3-encoder.plan
  neck-export triton build/sam3-encoder.plan               writes model_repository/
"""

PANELS = (
    *(masks_options.MODEL, masks_options.PROMPTS, shared.WEIGHTS, shared.TENSORS, shared.PRECISION, shared.TARGET),
    *(BUILD, MODEL, SERVING, KUBERNETES, MEASURED, REPORT, shared.VERIFICATION, shared.FILES, Option.panel),
)
"""The headings of the options, in the order in which `--help` prints them."""

app = typer.Typer(
    help=HELP,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # rich would take half of the time that --help takes
    context_settings={"max_content_width": 100},
)

OUT_OF_MEMORY = ("can't allocate memory", "bad allocation", "bad_alloc", "Failed to allocate memory")
"""What torch and ONNX Runtime say, whose errors are no MemoryError."""

AsJson = Annotated[bool, Option("Print the result as JSON instead of text, for use by other programs.", name="--json")]
Options = TypeVar("Options")


class GroupedCommand(typer.core.TyperCommand):
    """A command whose `--help` lists its options by heading."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Writes arguments, then the options of each heading; `--help` comes last."""
        panels: dict[str, list[tuple[str, str]]] = {}
        for one in self.get_params(ctx):
            record = one.get_help_record(ctx)
            if record is not None:
                other = "Arguments" if one.param_type_name == "argument" else Option.panel
                panels.setdefault(getattr(one, "rich_help_panel", None) or other, []).append(record)
        for title, records in panels.items():
            with formatter.section(title):
                formatter.write_dl(records)


def command(options: type | None = None) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Makes a command of a function: its options are those of a dataclass, and the function's own parameters.

    With a dataclass, the function's first parameter makes it of the values that were given, and refuses those that
    cannot be. A parameter that has the name of one of its options takes the value that was given for it.
    """

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        own = list(signature(function, eval_str=True).parameters.values())[1 if options else 0 :]
        shown = dict(parameters(options)) if options else {}
        names = list(shown)
        for one in own:
            if one.name not in shown:
                kind, found = declared(one.annotation)
                assert isinstance(found, Option), one.name
                default = UNSET if one.default is Parameter.empty else one.default
                shown[one.name] = found.but(read=kind, default=default)
        ordered = sorted(shown.items(), key=lambda one: not one[1].argument and 1 + PANELS.index(one[1].panel))
        made = [_parameter(name, one) for name, one in ordered]

        def run(**given: Any) -> None:
            values = {name: given[name] for name in names}
            first = (lambda: build(options, values),) if options else ()
            function(*first, **{one.name: given[one.name] for one in own})

        run.__signature__ = Signature(made)  # type: ignore[attr-defined]
        run.__annotations__ = {one.name: one.annotation for one in made}
        run.__name__, run.__doc__ = function.__name__, function.__doc__
        return app.command(cls=GroupedCommand)(run)

    return decorate


def _parameter(name: str, one: Option) -> Parameter:
    """What typer reads an option as."""
    kind = one.read | None if one.default is None else one.read
    spelled = (one.name,) if one.name.startswith("--") else ()
    how: Any = (
        typer.Argument(help=one.help)
        if one.argument
        else typer.Option(*spelled, help=one.help, rich_help_panel=one.panel, **one.settings)
    )
    default = Parameter.empty if one.default is UNSET else one.default
    return Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, how])


@command(ExportOptions)
def onnx(asked: Callable[[], ExportOptions]) -> None:
    """Export the encoder to ONNX and compare the file with PyTorch."""
    with stage() as report:
        from export.pipeline import export_onnx

        result = export_onnx(asked(), report)
    show_export(result)


@command(PlanOptions)
def trt(
    asked: Callable[[], PlanOptions],
    tune: Annotated[
        bool,
        Option(
            "Build several plans that compute attention and upsampling differently, measure each on the GPU, and keep "
            "the fastest one that passes verification.",
            BUILD,
        ),
    ] = False,
) -> None:
    """Build a TensorRT plan from an ONNX file, or from a checkpoint, and compare it with PyTorch."""
    with stage() as report:
        options = asked()
        from engines.api import make_engine

        result = make_engine(options, tune, report)
    if result.exported:
        show_export(result.exported)
    if result.tuning:
        from engines.tune import tuning_lines

        typer.echo("\n".join(tuning_lines(result.tuning)))
    show_plan(result)


@command()
def profile(
    plan: Annotated[Path, Option("Measure this TensorRT plan; it must have been built by neck-export.", argument=True)],
    batch: Annotated[
        int | None,
        Option(
            "Measure with this batch size (images per inference call), e.g. 4. [default: the plan's optimal batch "
            "size]",
            shared.TENSORS,
        ),
    ] = None,
    device: Annotated[int | None, DEVICE] = None,
    as_json: AsJson = False,
) -> None:
    """Measure a plan's latency on the GPU: percentiles, transfers, memory, start and layers."""
    with stage():
        from engines.run.latency import profile_lines
        from engines.run.profiling import profile_plan

        found = profile_plan(plan, batch=batch, device=device)
    show(found.to_dict(), profile_lines(found), as_json)


@command(BisectOptions)
def bisect(asked: Callable[[], BisectOptions]) -> None:
    """Find the block that leaves tolerance first, and the smallest FP32 part that repairs the file."""
    with stage() as report:
        from engines.bisect import bisect as search
        from engines.bisect import finding_lines

        it = asked()
        finding = search(it.file, it.checkpoint, it.images, it.tolerances, report, adapter=it.adapter)
    typer.echo("\n".join(finding_lines(finding)))


@command(VerifyOptions)
def verify(asked: Callable[[], VerifyOptions]) -> None:
    """Compare a file with the original PyTorch module and write the verdict into its manifest.

    An ONNX file without a manifest may be anyone's SAM 3 encoder: name the weights that it should have with
    --checkpoint. Its input and its outputs are identified by value, and if the file is wrong, the cause is
    named.
    """
    notes: list[str] = []
    with noted(notes), stage() as report:
        from engines.builder.plan_kind import is_plan
        from export.foreign.judge import ForeignVerdict

        it, line = asked(), None
        given = (it.checkpoint, it.images, it.tolerances, report)
        more: dict[str, Any] = {"adapter": it.adapter, "save": it.save_reference, "notes": notes}
        plan = is_plan(it.file)
        if it.device is not None and not plan:
            raise typer.BadParameter(
                "--device chooses the GPU for a plan, but an ONNX file is verified on the CPU; leave out --device"
            )
        if plan and (it.state or it.prefix or it.config or it.write_manifest):
            raise typer.BadParameter(
                "--state, --prefix, --config and --write-manifest apply only to ONNX files, but the given "
                "file is a plan; leave these options out"
            )
        if plan:
            from engines.run.verify import verify_plan_file

            verdict = verify_plan_file(it.file, *given, **more, device=it.device)
        else:
            from export.contract.onnx_file import OnnxFile
            from export.pipeline import verify_file
            from export.verification.target_check import graph_needs, read_by

            parsed = OnnxFile(it.file)
            more |= {"state": it.state, "prefix": it.prefix, "config": it.config, "write_manifest": it.write_manifest}
            verdict = verify_file(parsed, *given, **more, targets=it.targets)
            line = read_by(graph_needs(parsed.model))
        show_verdict(verdict)
        if line and isinstance(verdict, ForeignVerdict):
            from engines.foreign_builds import builder_lines

            typer.echo("\n".join(builder_lines(parsed, verdict, report)))
        elif line:
            typer.echo(line)
        if it.save_reference:
            typer.echo(it.save_reference)


@command(MasksOptions)
def masks(asked: Callable[[], MasksOptions]) -> None:
    """Run the whole SAM 3 with its own encoder and with the file, and compare the masks."""
    notes: list[str] = []
    with stage() as report:
        options = asked()
        from benchmarks.masks.compare import compare_masks
        from benchmarks.masks.objects import lines, worst_lines

        found = compare_masks(options, report, notes)
    typer.echo("\n".join([*lines(found), *(f"note: {note}" for note in notes)]))
    if not found["passed"]:
        _fail(
            "\n".join(
                [
                    f"{options.file}: the encoder in this file failed the mask comparison with the model's own "
                    "encoder. Try a file with a higher precision, for example FP32 instead of FP16",
                    f"mean mask IoU: {found['mean_iou']:.4f}; --gate requires at least {found['gate']:g}",
                    "objects found only with the model's own encoder or only with the exported encoder: "
                    f"{found['lost'] + found['found']}; the comparison requires 0",
                    f"NaN or infinite values in the model's outputs: {found['non_finite']['own']} with the model's own "
                    f"encoder, {found['non_finite']['file']} with the exported encoder; the comparison requires 0 for "
                    "each encoder",
                    *worst_lines(found),
                ]
            ),
            Exit.REFUSED,
        )


@command(RepositoryOptions)
def triton(
    asked: Callable[[], RepositoryOptions],
    activate: Annotated[
        int | None,
        Option(
            "Serve an existing version, e.g. 2, of the model that --name names, instead of adding a version. Do not "
            "pass MODEL with this option. [default: a version is added]",
            MODEL,
        ),
    ] = None,
) -> None:
    """Add a plan or an ONNX file to a Triton model repository, or choose the version to serve."""
    options = asked()
    if activate is not None and not options.model:
        _activate(options, activate)
        return
    if not options.model or activate is not None:
        raise typer.BadParameter(
            "pass the path of a plan or ONNX file, or pass --activate with a version number, but not both",
            param_hint="MODEL",
        )
    if options.kubernetes:
        options = dataclasses.replace(options, kubernetes=options.output.parent / options.kubernetes)
    with stage() as report:
        from engines.service.repository import make_repository

        made = make_repository(options, report)
    for note in made.notes:
        typer.echo(note)
    for path in made.files:
        typer.echo(path)
    typer.echo(f"after the server has started, measure the model with this command: {made.measure}")


def _activate(options: RepositoryOptions, version: int) -> None:
    with stage() as report:
        from engines.service.activation import activate_version

        made = activate_version(options.output, options.name, version, options.keep, report)
    before = f" instead of version {made.before}" if made.before not in (None, version) else ""
    typer.echo(f"Triton serves version {version} of {options.name}{before}")
    for path in made.removed:
        typer.echo(f"removed {path}")


@command(BenchOptions)
def bench(
    asked: Callable[[], BenchOptions],
    output: Path,
    files: Annotated[
        list[Path] | None,
        Option("Merge these report.json files into one report; this requires --merge.", argument=True),
    ] = None,
    merge: Annotated[
        bool,
        Option(
            "Do not measure anything; merge the report.json files given as arguments, e.g. those of several machines, "
            "into one report.",
            REPORT,
            "--merge",
        ),
    ] = False,
    compare: Annotated[
        Path | None,
        Option(
            "Compare the result with this older report.json, and exit with code 3 if a backend has become slower "
            "or less accurate. [default: no comparison]",
            REPORT,
        ),
    ] = None,
) -> None:
    """Measure every way to run the encoder on this machine, and how exact each is; write a report."""
    if bool(files) != merge:
        raise typer.BadParameter(
            "--merge and the paths of report.json files must be passed together; add what is missing, or "
            "leave out both",
            param_hint="--merge",
        )
    with stage() as report:
        from benchmarks.bench import run_bench
        from benchmarks.report.report_files import check_folder, write_report
        from benchmarks.results.comparison import compare_results
        from benchmarks.results.result_files import merge_results, read_result

        check_folder(output)
        older = read_result(compare) if compare else None
        result = merge_results([read_result(file) for file in files]) if files else run_bench(asked(), report)
        _, text, page = write_report(result, output)
        changes = compare_results(result, older) if older else []
    typer.echo(text.read_text(encoding="utf-8"))
    typer.echo(page)
    for change in changes:
        typer.echo(change, err=True)
    if changes:
        raise typer.Exit(Exit.REFUSED)


@command()
def inspect(
    file: Annotated[Path, Option("Describe this ONNX file or TensorRT plan.", argument=True)],
    as_json: AsJson = False,
    check: Annotated[
        bool,
        Option(
            "Before describing an ONNX file, check that the file and its weights are unchanged: compare the SHA-256 of "
            "each with the value in the manifest, and fail if they differ.",
            shared.VERIFICATION,
            "--check",
        ),
    ] = False,
    card: Annotated[
        bool,
        Option(
            "Write a folder that can be uploaded to the Hugging Face Hub. It is written beside the file and contains a "
            "model card, the file and its manifest.",
            shared.FILES,
            "--card",
        ),
    ] = False,
    gpu: Annotated[
        str | None,
        Option(
            "Also print a lower bound on the latency of a plan on these GPUs, computed from their published arithmetic "
            "throughput and memory bandwidth; separate the names of the GPUs with commas, e.g. h100,l4,rtx-4090, or "
            "use all. [default: no lower bound]",
            MEASURED,
        ),
    ] = None,
    strip_header: Annotated[
        Path | None,
        Option(
            "Remove the header that Ultralytics writes in front of a TensorRT plan, and write the plan without it "
            "to this file, e.g. bare.plan. [default: nothing is written]",
            shared.FILES,
        ),
    ] = None,
) -> None:
    """Show a file's contract, graph or kernels, who can load it, and what was verified."""
    with stage():
        from engines.builder import plan_kind

        if strip_header:
            found = plan_kind.strip_header(file, strip_header)
            lines = [f"{name}: {value}" for name, value in found.items()] + [str(strip_header)]
        elif card:
            from engines.card import write_card

            folder, *files = map(str, write_card(file))
            found = {"folder": folder, "files": files}
            lines = [*files, f"upload the folder with this command: hf upload OWNER/NAME {folder}"]
        elif plan_kind.is_plan(file):
            from engines.inspect import inspect_plan, plan_lines

            found = inspect_plan(file, gpu or "")
            lines = plan_lines(file, found)
        elif gpu:
            raise typer.BadParameter(
                f"--gpu applies only to plans, but {file} is not a plan; build one with `neck-export trt`",
                param_hint="--gpu",
            )
        else:
            from export.inspect import inspect_onnx, summary_lines

            found = inspect_onnx(file, check)
            lines = summary_lines(found)
    show(found, lines, as_json)


@command()
def doctor(as_json: AsJson = False) -> None:
    """Show what this machine can do, and what to install for the rest."""
    with stage():
        from engines.doctor import examine, report_lines

        found = examine()
    show(found, report_lines(found), as_json)


def show(values: dict[str, Any], lines: list[str], as_json: bool) -> None:
    """Prints values as JSON, or the lines that tell them."""
    from export.contract.manifest import to_json

    typer.echo(to_json(values).rstrip() if as_json else "\n".join(lines))


def show_export(result: ExportResult) -> None:
    """Prints what was exported, its error figures, and the files."""
    from export.weights_origin import state_line

    for note in result.manifest.get("notes", ()):
        typer.echo(f"note: {note}")
    if chosen := state_line(result.manifest["weights"]):
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


def show_plan(result: PlanResult) -> None:
    """Prints what a plan is made of and what was and was not verified."""
    if result.reused:
        typer.echo("the existing plan is kept, because its ONNX file and options have not changed")
    elif result.reason:
        typer.echo(f"the plan was built again: {result.reason}")
    for note in result.notes:
        typer.echo(note)
    show_curve(result.manifest)
    if result.verdict:
        show_verdict(result.verdict)
    checked = result.manifest["verification"]
    typer.echo(
        "the plan passed verification: the outputs of the plan match the outputs of PyTorch within the tolerances"
        if checked["verified"]
        else f"the plan is not verified: {checked['reason'].removeprefix('not verified: ')}"
    )
    graph = checked.get("onnx")
    if graph:
        typer.echo(
            f"the ONNX graph that the plan was built from is {'verified' if graph['verified'] else 'NOT verified'}: "
            f"{graph['method']}"
        )
    if result.layers:
        typer.echo(result.layers.summary())
        if warning := result.layers.warning():
            typer.echo(f"warning: {warning}", err=True)
    elif reason := result.manifest.get("no_layers"):
        typer.echo(f"the plan has no layer report: {reason}")
    from engines.layers.plan_memory import memory_lines

    typer.echo("\n".join(line.strip() for line in memory_lines(result.manifest)))
    typer.echo(f"{result.path}  {result.path.stat().st_size / 1e6:,.1f} MB")


def show_curve(manifest: dict[str, Any]) -> None:
    """Prints how many products were quantized, and what more or fewer would have meant, where that was measured."""
    quantization = manifest.get("quantization") or {}
    if quantization.get("curve"):
        from export.quantization.choice import curve_lines

        told = quantization.get("rates") or ""
        count = sum(len(quantization.get(key) or ()) for key in ("products", "attentions", "results"))
        typer.echo("\n".join(curve_lines(quantization["curve"], count, told)))


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
    except OptionError as error:
        raise typer.BadParameter(str(error), param_hint=f"--{error.name}") from None
    except KeyboardInterrupt:
        _fail("interrupted", Exit.INTERRUPTED)
    except Exception as error:
        if isinstance(error, MemoryError) or any(words in str(error) for words in OUT_OF_MEMORY):
            _fail(
                "this machine has too little free host memory (RAM) for this command; close other programs, or use a "
                "smaller --image-size or --batch"
            )
        verdict = getattr(error, "verdict", None)
        if verdict is not None:
            show_verdict(verdict, err=True)
            _fail(str(error), Exit.REFUSED)
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


def _fail(message: str, code: Exit = Exit.FAILED) -> NoReturn:
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
    for line in verdict.lines():
        typer.echo(line, err=err)


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

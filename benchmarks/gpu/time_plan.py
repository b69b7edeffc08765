"""The plan of time: what a GPU machine is asked for, how long each part should take, what is left out first."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

MINUTES = 9.0
"""What `make gpu` takes at most, unless GPU_MINUTES says otherwise."""


INSTALL_MINUTES = 0.3
"""For the environment, before the first stage."""


@dataclasses.dataclass(frozen=True)
class Stage:
    """One part of a session, in a process of its own.

    Attributes:
        name, what: in files, and in words.
        minutes: expected on an H100 with 16 cores. Nobody has measured them there yet.
        most: after so many it is ended; the rest of the session's time, where that is less.
        drop: where the time is short, the stage of the lowest number is left out first; None never is.
        backends: ids that it measures, the reference aside.
        points: sweeps that it measures: image sizes and batches.
        answer_s: how long one backend may take for one answer, such as its load with its build.
    """

    name: str
    what: str
    minutes: float
    most: float
    drop: int | None = None
    backends: tuple[str, ...] = ()
    points: bool = False
    answer_s: float = 45.0


EAGER = ("eager-rewritten-fp32", "eager-fp16", "eager-rewritten-fp16", "eager-bf16", "eager-rewritten-bf16")
COMPILED = {"cuda": ("compile-rewritten-fp16",), "cpu": ("compile-rewritten-fp32",)}
PLAIN = {"cuda": ("compile-fp16",), "cpu": ()}
ANSWER = {"cuda": 90.0, "cpu": 300.0}
TUNED = ("compile-max-rewritten-fp16",)

Device = Literal["cpu", "cuda"]

FOLDER = "stages"
"""Of a session's folder: what each stage found and printed."""


def plan(device: Device) -> tuple[Stage, ...]:
    """The stages in their order: the most wanted first."""
    return (
        Stage("doctor", "examine the machine, and list other programs that use the GPU", 0.3, 2.0),
        Stage("cpp", "test the C++ library with real CUDA and a mock of TensorRT", 0.7, 1.6, 8),
        Stage(
            "session",
            "test the Python code that runs plans, including CUDA graphs and DLPack, with real CUDA and a mock of "
            "TensorRT",
            0.3,
            1.0,
            9,
        ),
        Stage("weights", "make the random weights, and check that they are the same as on other machines", 0.4, 1.0),
        Stage(
            "eager",
            "measure PyTorch eager without and with the graph rewrites of neck-export, each in FP32, FP16 and BF16",
            1.9,
            3.0,
            backends=EAGER,
        ),
        Stage(
            "compiled",
            "measure torch.compile in default mode with the graph rewrites of neck-export",
            1.0,
            2.5,
            7,
            COMPILED[device],
            answer_s=ANSWER[device],
        ),
        Stage("rates", "measure the matrix multiplication and copy rates of the machine", 0.3, 1.0, 6),
        REPORT,
        Stage(
            "points",
            "measure the fastest backend at batch 4 and 8, and at 672 and 1344 pixels",
            0.7,
            2.3,
            2,
            points=True,
        ),
        Stage(
            "plain",
            "measure torch.compile in default mode without the graph rewrites of neck-export",
            0.7,
            2.5,
            3,
            PLAIN[device],
            answer_s=ANSWER[device],
        ),
        Stage(
            "tuned", "measure torch.compile in max-autotune mode, with CUDA graphs", 0.7, 3.0, 1, TUNED, answer_s=150.0
        ),
        Stage(
            "tests",
            "run the pytest tests with the marker gpu, except tests that only repeat the work of another stage",
            0.4,
            1.6,
            4,
        ),
    )


REPORT = Stage("report", "write report.json, report.md and report.html", 0.6, 0.6)
"""After what is most wanted, and again at the end if anything was measured since."""

QUICK_BUILD_S = 20.0
"""`points` takes the fastest backend that was built in so long: at each of its four points it is built again."""

POINT_SCALES, POINT_BATCHES = (2 / 3, 4 / 3), (4, 8)


def fitting(stages: Sequence[Stage], minutes: float) -> list[Stage]:
    """The stages that fit into the time; those with the lowest `drop` are left out first."""
    kept = list(stages)
    droppable = sorted((one for one in stages if one.drop is not None), key=lambda one: one.drop or 0)
    for one in droppable:
        again = REPORT.minutes if kept and kept[-1] != REPORT else 0.0
        if sum(stage.minutes for stage in kept) + again <= minutes + 1e-6:
            break
        kept.remove(one)
    return kept


def time_limit(stage: Stage, left_s: float, scale: float = 1.0) -> float:
    """Seconds that a stage may take where so many are left: the report's are kept for it.

    Args:
        stage: which.
        left_s: of the session.
        scale: the session's time over MINUTES, where it is longer: a slow machine's stages may then take longer.
    """
    spare = 0.0 if stage == REPORT else 60 * REPORT.most * scale
    return max(0.0, min(60 * stage.most * scale, left_s - spare))


def total_minutes(device: Device = "cuda") -> float:
    """The expected minutes of everything: the environment, every stage, and the second report."""
    return INSTALL_MINUTES + sum(one.minutes for one in plan(device)) + REPORT.minutes


def table(device: Device = "cuda") -> list[str]:
    """The plan as lines of text."""
    lines = [
        f"{one.name:10} {one.minutes:4.1f} min  {'never' if one.drop is None else one.drop!s:>5}  {one.what}"
        for one in plan(device)
    ]
    total = total_minutes(device)
    head = [f"{'stage':10} {'expected':8}  left out", f"{'install':10} {INSTALL_MINUTES:4.1f} min  never"]
    return [*head, *lines, f"{'all':10} {total:4.1f} min"]

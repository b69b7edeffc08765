"""The benchmark as a whole on tiny encoders: real workers, real files, every backend that a CPU has."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import shared_encoder, tiny_config
from synthetic import KNOWN_RATES, Tags
from worker_here import WorkerHere

import benchmarks.measure.rounds
import benchmarks.measure.run
import benchmarks.measure.work_folder
import benchmarks.measure.worker
from benchmarks.bench import run_bench
from benchmarks.errors import BenchError
from benchmarks.measure import machine_rates
from benchmarks.measure.backends import REFERENCE, Backend, RunRequest, backends_for
from benchmarks.measure.measure_point import MeasurePoint, Schedule
from benchmarks.measure.run import Run
from benchmarks.measure.samples import Samples
from benchmarks.measure.work_folder import ArtifactCache
from benchmarks.measure.worker_process import ROOT, Worker, WorkerError
from benchmarks.options import BenchOptions
from benchmarks.report.charts import error_plot, latency_chart, parts_chart, roofline_plot
from benchmarks.report.findings import ranked
from benchmarks.report.report_files import write_report
from benchmarks.results.comparison import compare_results
from benchmarks.results.result import _sound
from benchmarks.results.result_files import check_result, merge_results, read_result
from benchmarks.results.rows import best_rates, make_row, raise_rates, ratio
from benchmarks.roofline import encoder_parts, floor_ms, total_operations
from engines.run.latency import summarize
from export.contract.atomic import locked
from export.contract.options import Rewrites
from export.contract.signature import encoder_signature
from export.graph.deployed_module import DeployEncoder
from export.graph.trace import trace

CONFIG = tiny_config()
POINT = MeasurePoint("p", None, CONFIG, encoder_signature(CONFIG), Schedule(1, 1, 1, 0.0, 1.0, 0.0))
ORT = "ort-cpu-rewritten-fp32"
NAMES = [REFERENCE, "eager-rewritten-fp32", "ort-cpu-plain-fp32", ORT]

SECONDS = 600.0
"""A hang would else hold the tests."""


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all runs of this file, so that the weights and files are made once."""
    return tmp_path_factory.mktemp("bench")


def options_for(output: Path, **changes: Any) -> BenchOptions:
    values = {"config": CONFIG, "device": "cpu", "sweep": False, "rounds": 2, "backends": (ORT,), "timeout_s": SECONDS}
    return BenchOptions(output, **{**values, **changes})  # type: ignore[arg-type]


@dataclasses.dataclass(frozen=True)
class Ran:
    """A finished run: its result, and the samples that it left."""

    options: BenchOptions
    result: dict[str, Any]
    samples: Path

    def rows(self, sweep: str | None = None) -> dict[tuple[str, int, int], dict[str, Any]]:
        chosen = [row for row in self.result["rows"] if row["sweep"] == sweep]
        return {(row["backend"], row["image_size"][0], row["batch"]): row for row in chosen}


def samples_of(output: Path) -> Path:
    """The file that was written last."""
    return max(output.glob("work/run-*/samples.jsonl"), key=lambda file: file.stat().st_mtime_ns)


def rates_are_known(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Run, "_measure_rates", lambda run, when: run.samples.add("rates", when=when, **KNOWN_RATES))


@pytest.fixture
def known_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rates that nobody measured, where they are not what is tested."""
    rates_are_known(monkeypatch)


@pytest.fixture(autouse=True, scope="module")
def _prepared_here() -> Iterator[None]:
    """Weights and files are made in this process; what is measured runs in workers of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(benchmarks.measure.work_folder, "Worker", WorkerHere)
        yield


@pytest.fixture
def reference_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's worker is this process, which has torch, where another backend's is what is tested."""
    monkeypatch.setattr(
        benchmarks.measure.rounds,
        "Worker",
        lambda log, *more: WorkerHere(log) if log.stem == REFERENCE else Worker(log, *more),
    )


def test_a_worker_measures_the_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    """The real ones, of small matrices and a small copy."""
    monkeypatch.setattr(machine_rates, "PRODUCT_SECONDS", 1e-4)
    monkeypatch.setattr(machine_rates, "REPEATS", {"cpu": 1})
    monkeypatch.setattr(machine_rates, "COPY_BYTES", {"cpu": 1 << 20})
    rates = benchmarks.measure.worker.Worker().answer("rates", device="cpu")
    assert set(rates["flops_per_s"]) == {"fp32", "fp16", "bf16"}
    assert min(rates["flops_per_s"].values()) > 0 and rates["copy_bytes_per_s"] > 0


@pytest.fixture(scope="module")
def ran(output: Path) -> Ran:
    """Four backends and a sweep; torch exports here what the files are, which costs a cold process 12 s each."""
    for size, rewrites in ((112, Rewrites()), (112, Rewrites.none()), (56, Rewrites())):
        config = dataclasses.replace(CONFIG, image_size=size)
        trace(DeployEncoder(shared_encoder(config), encoder_signature(config), rewrites))
    options = options_for(
        output, backends=tuple(NAMES[1:]), sweep=True, sizes=(56, 112), batches=(1,), command="neck-export bench"
    )
    with pytest.MonkeyPatch.context() as patch:
        rates_are_known(patch)
        return Ran(options, run_bench(options), samples_of(output))


def lines_of(path: Path, kind: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [line for line in lines if line.get("sample") == kind]


def test_the_result_has_the_form_of_a_results_file(ran: Ran) -> None:
    check_result(json.loads(json.dumps(ran.result)), "the result")
    assert ran.result["command"] == "neck-export bench"
    encoder = ran.result["encoder"]
    assert encoder["checkpoint"] == "random (seed 0)" and encoder["image_size"] == [112, 112]
    assert ran.result["machines"][0]["environment"]["versions"]["torch"]
    damaged = {**ran.result, "schema": 2}
    with pytest.raises(BenchError):
        check_result(damaged, "the result")


def test_backends_take_turns(ran: Ran) -> None:
    order = [line["backend"] for line in lines_of(ran.samples, "times") if line["point"] == "112x112 batch 1"]
    assert order == NAMES * 2


def test_rows_have_every_figure(ran: Ran) -> None:
    rows = ran.rows()
    assert [name for name, _, _ in rows] == NAMES
    for (name, _, _), row in rows.items():
        assert row["status"] == "measured" and len(row["times_ms"]) == 2 and row["warm_up_runs"] == 1
        assert row["latency"] == dataclasses.asdict(summarize(row["times_ms"]))
        assert row["images_per_s"] == pytest.approx(1e3 / np.mean(row["times_ms"]))
        assert row["peak_host_bytes"] > 20e6 and row["peak_device_bytes"] is None and row["load_s"] > 0
        assert (row["file_bytes"] is not None and row["build_s"] > 0) == name.startswith("ort")
        assert row["floor_ms"] > 0 and row["share_of_floor"] == row["floor_ms"] / row["latency"]["p50_ms"]
        assert {error["name"] for error in row["errors"]} == (
            set() if name == REFERENCE else {spec.name for spec in encoder_signature(CONFIG).outputs}
        )
        assert row["passed"] is (None if name == REFERENCE else True)


def test_ratios_are_round_by_round(ran: Ran) -> None:
    rows = ran.rows()
    one, other = (rows[name, 112, 1] for name in (ORT, REFERENCE))
    ratios = sorted(a / b for a, b in zip(one["times_ms"], other["times_ms"], strict=True))
    assert one["ratio"] == {"to": REFERENCE, "median": np.mean(ratios), "low": ratios[0], "high": ratios[1]}
    assert one["ratio_to_plain"]["to"] == "ort-cpu-plain-fp32" and other["ratio_to_plain"] is None
    assert rows["eager-rewritten-fp32", 112, 1]["ratio_to_plain"]["to"] == REFERENCE


def test_sweeps_are_beside_the_closed_form(ran: Ran) -> None:
    for sweep, points in (("image_size", [(56, 1), (112, 1)]), ("batch", [(112, 1)])):
        rows = ran.rows(sweep)
        for name in (REFERENCE, ORT):
            assert [key[1:] for key in rows if key[0] == name] == points
        assert all(row["status"] == "measured" and row["passed"] is not False for row in rows.values())
        assert "eager-rewritten-fp32" not in {key[0] for key in rows}
    growth = {(point["image_size"][0], point["batch"]): point["operations"] for point in ran.result["growth"]}
    assert sorted(growth) == [(56, 1), (112, 1)] and growth[112, 1] > 4 * growth[56, 1]
    assert not list(ran.options.output.glob("work/encoder-*/*-56x56-*/*.onnx"))  # the disk is given back


def test_work_and_time_of_each_part(ran: Ran) -> None:
    work = ran.result["work"]
    parts = encoder_parts(CONFIG, encoder_signature(CONFIG), 1, rewritten=False)
    assert work["operations"] == total_operations(parts) == sum(part["operations"] for part in work["parts"])
    assert all(part["ms"] > 0 for part in work["parts"] if part["operations"])
    row, roofline = ran.rows()[ORT, 112, 1], ran.result["machines"][0]["roofline"]
    least = encoder_parts(CONFIG, encoder_signature(CONFIG), 1)
    assert row["floor_ms"] == floor_ms(least, "fp32", roofline["flops_per_s"], roofline["copy_bytes_per_s"])


def test_images_of_the_features(ran: Ran) -> None:
    features = ran.result["features"]
    passed = [row for row in ran.rows().values() if row["passed"]]
    assert features["candidate"] == min(passed, key=lambda row: row["latency"]["p50_ms"])["backend"]
    assert [level["name"] for level in features["levels"]] == [f"sam3_feat_{level}" for level in range(4)]


def test_a_rerun_measures_nothing_again(ran: Ran) -> None:
    said: list[str] = []
    before = ran.samples.read_bytes()
    again = run_bench(ran.options, said.append)
    assert ran.samples.read_bytes() == before
    assert again == {**ran.result, "machines": again["machines"]}
    assert any("after 3 rounds" in line for line in said)


def test_a_measured_result_becomes_a_report(ran: Ran, tmp_path: Path) -> None:
    measured, machine = ran.result, ran.result["machines"][0]
    path, markdown, page = write_report(measured, tmp_path)
    assert read_result(path) == json.loads(json.dumps(measured))
    for text in (markdown.read_text(encoding="utf-8"), page.read_text(encoding="utf-8")):
        for row in measured["rows"]:
            assert row["label"] in text
    assert [row["backend"] for row in ranked(measured, machine)] != []
    for chart in (latency_chart, parts_chart, error_plot, roofline_plot):
        assert chart(measured, machine), chart
    assert measured["features"]["levels"] and Tags(page.read_text(encoding="utf-8")).open == []


def test_a_measured_result_is_no_worse_than_itself(ran: Ran) -> None:
    measured = ran.result
    assert compare_results(measured, measured) == []
    worse = json.loads(json.dumps(measured))
    for row in worse["rows"]:
        if row["status"] == "measured":
            row["times_ms"] = [time * 3 for time in row["times_ms"]]
            row["latency"]["p50_ms"] *= 3
    assert {change.kind for change in compare_results(worse, measured)} == {"slower"}
    with pytest.raises(BenchError, match="same runs"):
        merge_results([measured, measured])


@pytest.mark.usefixtures("known_rates", "reference_here")
def test_other_options_begin_anew(ran: Ran) -> None:
    one = run_bench(options_for(ran.options.output, rounds=1))
    assert len(one["rows"][0]["times_ms"]) == 1
    assert samples_of(ran.options.output) != ran.samples and ran.samples.is_file()


KILLED = """
import json, os, pickle, signal, sys
from pathlib import Path
from benchmarks.bench import run_bench
from benchmarks.measure.run import Run
from benchmarks.measure.samples import Samples
from benchmarks.measure.work_folder import ArtifactCache
from benchmarks.options import BenchOptions
from neck.config import EncoderConfig
told = pickle.loads(Path(sys.argv[5]).read_bytes())
ArtifactCache.ask = lambda place, command, **asked: told[command]
add = Samples.add
def added(samples, kind, **values):
    add(samples, kind, **values)
    if kind == "round" and len(samples.all("round")) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
Samples.add = added
config = EncoderConfig.from_file(Path(sys.argv[2]))
Run._measure_rates = lambda run, when: run.samples.add("rates", when=when, **json.loads(sys.argv[4]))
options = {"device": "cpu", "sweep": False, "rounds": 6, "backends": (sys.argv[3],)}
run_bench(BenchOptions(Path(sys.argv[1]), config=config, **options))
"""


ROUNDS = 6
"""As KILLED asks."""


def workers_of(log: Path) -> list[int]:
    """Processes that write into a folder's logs."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            target = os.readlink(process / "fd" / "2")
        except OSError:
            continue
        if target.startswith(str(log)):
            found.append(int(process.name))
    return found


@pytest.mark.usefixtures("ran", "known_rates", "reference_here")
def test_a_killed_run_goes_on(output: Path, tmp_path: Path, place: ArtifactCache) -> None:
    config = tmp_path / "encoder.json"
    config.write_text(json.dumps(CONFIG.to_dict()))
    known = set(output.glob("work/run-*"))
    told = tmp_path / "told"  # what the worker that prepares says, which would import torch
    told.write_bytes(pickle.dumps({"facts": place.ask("facts"), "weights": place.prepare()}))
    command = [sys.executable, "-c", KILLED, str(output), str(config), ORT, json.dumps(KNOWN_RATES), str(told)]
    assert subprocess.run(command, cwd=ROOT, timeout=SECONDS, check=False).returncode == -signal.SIGKILL
    (samples,) = (folder / "samples.jsonl" for folder in set(output.glob("work/run-*")) - known)
    data = samples.read_bytes()
    samples.write_bytes(data + b'{"sample": "times", "po')  # cut in the middle of a line
    before = lines_of(tmp_path_copy(tmp_path, data), "times")
    done = len(lines_of(tmp_path_copy(tmp_path, data), "round"))
    assert done == 3
    ends = time.monotonic() + SECONDS
    while workers_of(samples.parent) and time.monotonic() < ends:
        time.sleep(0.02)
    assert not workers_of(samples.parent)  # they ended with it

    said: list[str] = []
    result = run_bench(options_for(output, rounds=ROUNDS), said.append)
    assert any(f"after {done} rounds" in line for line in said)
    rows = {row["backend"]: row for row in result["rows"]}
    kept = [time for line in before if line["backend"] == ORT and line["round"] < done for time in line["times_ms"]]
    assert rows[ORT]["times_ms"][:done] == kept and len(rows[ORT]["times_ms"]) == ROUNDS
    assert f"loaded 2 times in {ROUNDS} rounds" in rows[ORT]["note"] and rows[ORT]["passed"]


def tmp_path_copy(folder: Path, data: bytes) -> Path:
    """The whole lines of a file that may have been cut."""
    path = folder / "copy.jsonl"
    path.write_bytes(data[: data.rfind(b"\n") + 1])
    return path


@pytest.mark.usefixtures("ran", "known_rates", "reference_here")
def test_out_of_memory_costs_one_row(output: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One is given an image of 8 GB (of holes in the file) where a worker may take 3, one needs more than there is."""
    huge = np.lib.format.open_memmap(tmp_path / "huge.npy", mode="w+", dtype=np.float32, shape=(2 << 30,))
    del huge
    make, needed, plain = ArtifactCache.jobs, benchmarks.measure.run.needed_bytes, "ort-cpu-plain-fp32"

    def jobs(place: ArtifactCache, *rest: Any) -> dict[str, RunRequest | WorkerError]:
        found = make(place, *rest)
        assert isinstance(found[ORT], RunRequest)
        return {**found, ORT: dataclasses.replace(found[ORT], image=tmp_path / "huge.npy")}

    def estimate(backend: Backend, *rest: Any) -> int:
        return 1 << 60 if backend.id == plain else needed(backend, *rest)

    monkeypatch.setattr(ArtifactCache, "jobs", jobs)
    monkeypatch.setattr(benchmarks.measure.run, "needed_bytes", estimate)
    monkeypatch.setattr(benchmarks.measure.rounds, "available_bytes", lambda: 3 << 30)
    said: list[str] = []
    result = run_bench(options_for(output, backends=(ORT, plain), rounds=3), said.append)
    rows = {row["backend"]: row for row in result["rows"]}
    assert rows[ORT]["status"] == "failed" and "out of memory" in rows[ORT]["reason"]
    assert rows[plain]["status"] == "unavailable" and "needs about 1152921504.6 GB of memory" in rows[plain]["reason"]
    assert rows[ORT]["latency"] is None is rows[plain]["latency"]
    assert rows[REFERENCE]["status"] == "measured" and len(rows[REFERENCE]["times_ms"]) == 3
    assert any("unloading the other backends" in line for line in said)
    check_result(result, "the result")


@pytest.mark.parametrize("first", ['{"schema": 99, "kind": "bench-samples", "key": "key"}', "[1]", "no JSON"])
def test_samples_of_another_schema_are_left_alone(first: str, tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    path.write_text(first + "\n")
    with pytest.raises(BenchError, match=r"samples\.jsonl: .*move the file, or choose another --output"):
        Samples(path, "key")
    assert path.read_text() == first + "\n"


def test_samples_are_read_back(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    samples = Samples(path, "key")
    assert not samples.resumed
    samples.add("times", point="p", backend="a", round=0, times_ms=[2.0])
    samples.add("times", point="p", backend="a", round=1, times_ms=[8.0])
    samples.add("times", point="p", backend="b", round=0, times_ms=[1.0])
    samples.close()
    with path.open("ab") as file:
        file.write(b'{"sample": "round"')
    again = Samples(path, "key")
    assert again.resumed and again.times("p", "a") == [[2.0], [8.0]] and again.rounds("p") == 0
    assert ratio(again, "p", "a", "b") == {"to": "b", "median": 2.0, "low": 2.0, "high": 2.0}
    again.add("times", point="p", backend="a", round=1, times_ms=[4.0])  # the round was cut and is measured again
    again.close()
    assert again.times("p", "a") == [[2.0], [4.0]]
    with pytest.raises(BenchError, match="another key"):
        Samples(path, "another key")


def test_the_best_rates_count() -> None:
    one = {"device": "cpu", "flops_per_s": {"fp32": 1.0, "bf16": 4.0}, "copy_bytes_per_s": 5.0}
    other = {"device": "cpu", "flops_per_s": {"fp32": 2.0, "bf16": 3.0}, "copy_bytes_per_s": 4.0}
    assert best_rates([one, other]) == {
        "device": "cpu",
        "flops_per_s": {"fp32": 2.0, "bf16": 4.0},
        "copy_bytes_per_s": 5.0,
    }


def test_no_rate_is_less_than_what_a_backend_reached(tmp_path: Path) -> None:
    operations = total_operations(POINT.parts)
    known = {"flops_per_s": {"fp32": operations * 100.0, "bf16": 1.0}}
    with Samples(tmp_path / "samples.jsonl", "key") as samples:
        samples.add("times", point="p", backend=REFERENCE, round=0, times_ms=[20.0, 40.0])
        slower = raise_rates(known, [POINT], backends_for("cpu"), samples)
        assert slower == {**known, "reached_by": {"fp32": None, "bf16": None}}
        samples.add("times", point="p", backend=ORT, round=0, times_ms=[50.0, 5.0])
        raised = raise_rates(known, [POINT], backends_for("cpu"), samples)
    assert raised["flops_per_s"] == {"fp32": pytest.approx(operations * 200.0), "bf16": 1.0}
    assert raised["reached_by"] == {"fp32": ORT, "bf16": None}


def test_a_row_whose_figures_cannot_be_does_not_cost_the_report(tmp_path: Path) -> None:
    backend = backends_for("cpu")[0]
    with Samples(tmp_path / "samples.jsonl", "key") as samples:
        samples.add("times", point="p", backend=REFERENCE, round=0, times_ms=[20.0])
        samples.add("errors", point="p", backend=REFERENCE, errors=[], passed=None)
        samples.add("memory", point="p", backend=REFERENCE, peak_host_bytes=5, peak_device_bytes=-5)
        rates = {"flops_per_s": {"fp32": 1.0}, "copy_bytes_per_s": 1.0}
        row = make_row(backend, POINT, samples, rates)
    found = _sound(row, backend, POINT)
    assert found["status"] == "failed" and "peak_device_bytes: -5 is less than the minimum" in found["reason"]
    sound = {**row, "peak_device_bytes": 5}
    assert _sound(sound, backend, POINT) is sound


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "unknown": ({"backends": ("tensorflow",)}, "--backend tensorflow .* cpu"),
    "unavailable": ({"backends": ("ort-cpu-rewritten-fp16",)}, "no backend can run here: .*fp16: .*FP32"),
    "size": ({"image_size": 100}, "image size 100 is not a multiple"),
    "sweep": ({"sweep": True, "sizes": (112, 20160)}, "20160x20160 .*8064"),
}


@pytest.fixture(scope="module")
def place(output: Path) -> Iterator[ArtifactCache]:
    """The tiny encoder's."""
    with ArtifactCache(output / "work", options_for(output)) as made:
        yield made


@pytest.mark.parametrize("case", BAD)
def test_bad_options_are_refused(case: str, output: Path, place: ArtifactCache) -> None:
    changes, told = BAD[case]
    with pytest.raises(BenchError, match=told):
        Run(options_for(output, **changes), place, print)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"rounds": 0}, "--rounds is 0"),
        ({"export": True}, "--export .* cannot be combined with --config"),
        ({"positions": "file"}, "--positions=file"),
        ({"checkpoint": None, "adapter_alpha": 8.0}, "--adapter-alpha cannot be combined with random weights"),
        (
            {"checkpoint": None, "state": "ema", "prefix": "a."},
            "--state, --prefix cannot be combined with random weights",
        ),
    ],
)
def test_bad_options_are_refused_at_once(changes: dict[str, Any], told: str, output: Path) -> None:
    with pytest.raises(BenchError, match=told):
        run_bench(options_for(output, **changes))


def test_a_worker_that_cannot_load_the_encoder_says_why(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real worker that prepares: it examines the machine first."""
    monkeypatch.setattr(benchmarks.measure.work_folder, "Worker", Worker)
    with pytest.raises(BenchError, match=r"the encoder cannot be loaded: .*nowhere.pt"):
        run_bench(options_for(output, checkpoint=Path("nowhere.pt")))


def test_a_second_run_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    with locked(tmp_path / "work"), pytest.raises(BenchError, match="another"):
        run_bench(options_for(tmp_path))


def test_an_output_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "report").write_text("mine")
    with pytest.raises(BenchError, match=r"report.*choose another --output"):
        run_bench(options_for(tmp_path / "report"))
    assert (tmp_path / "report").read_text() == "mine"


@pytest.mark.gpu
def test_a_gpu_fills_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU that torch can use")
    monkeypatch.setattr(benchmarks.measure.work_folder, "Worker", Worker)
    options = options_for(tmp_path, device="cuda", quick=True, backends=(), timeout_s=600.0)
    result = run_bench(options)
    check_result(result, "the result")
    rows = {row["backend"]: row for row in result["rows"]}
    assert rows[REFERENCE]["peak_device_bytes"] > 0
    assert rows["eager-fp16"]["status"] == "measured" and rows["eager-fp16"]["share_of_floor"] > 0

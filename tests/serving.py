"""What the tests of a running Triton server share: images, PyTorch's answers, clients that send without a pause."""

from __future__ import annotations

import dataclasses
import functools
import io
import threading
import time
from typing import Any

import numpy as np
import torch
import tritonclient.http
from conftest import load_golden, named_outputs
from PIL import Image
from synthetic_images import images_of
from triton_server import Server

from engines.service.triton_client.client import TritonClient
from export.verification.fidelity import compare
from neck.images import normalize

CLIENTS = 8
IMAGES = 24
FP32 = 1e-4
"""Largest error of an answer over the largest value; other batch sizes sum in another order: up to 3e-6."""

Arrays = dict[str, np.ndarray]


def reference(images: np.ndarray) -> Arrays:
    """What the plain PyTorch module gives."""
    return {
        name: value.numpy()
        for name, value in named_outputs(load_golden("meta-dual").encoder, torch.from_numpy(images)).items()
    }


def as_file(pixels: np.ndarray, kind: str = "PNG") -> bytes:
    """One image as the bytes of a file."""
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind, quality=90)
    return stream.getvalue()


def passes(expected: Arrays, found: Arrays) -> bool:
    """Whether answers are within the FP32 tolerance, and complete."""
    return sorted(expected) == sorted(found) and compare(expected, found, "fp32", "test").passed


@functools.cache
def pixels() -> np.ndarray:
    return images_of(0, IMAGES)


@functools.cache
def images() -> np.ndarray:
    return normalize(pixels()).numpy()


@functools.cache
def files() -> np.ndarray:
    """The same images as PNG files, one in a row."""
    data = np.empty((IMAGES, 1), dtype=np.object_)
    data[:, 0] = [as_file(one) for one in pixels()]
    return data


@functools.cache
def expected() -> Arrays:
    return reference(images())


def part(indices: list[int]) -> Arrays:
    return {name: value[indices] for name, value in expected().items()}


def same(wanted: Arrays, found: Arrays) -> bool:
    """`passes` in a tenth of its time, for thousands of answers."""
    return sorted(wanted) == sorted(found) and all(
        found[name].shape == value.shape
        and float(np.abs(found[name] - value).max()) <= FP32 * float(np.abs(value).max())
        for name, value in wanted.items()
    )


def client_of(server: Server, protocol: str = "http", **options: Any) -> TritonClient:
    url = server.http_url if protocol == "http" else server.grpc_url
    return TritonClient(url, protocol=protocol, timeout_s=600, **options)  # type: ignore[arg-type]


def still_right(server: Server) -> bool:
    """Whether the server lives and answers as PyTorch does."""
    with client_of(server) as client:
        return server.process.poll() is None and passes(part([3]), client.infer(images()[[3]]))


def statistics_of(server: Server, model: str) -> tuple[int, int]:
    """Requests that were answered, and executions that it took."""
    with tritonclient.http.InferenceServerClient(server.http_url) as control:
        rows = control.get_inference_statistics(model)["model_stats"]
    return sum(row["inference_stats"]["success"]["count"] for row in rows), sum(row["execution_count"] for row in rows)


@dataclasses.dataclass
class Answers:
    """What clients that send without a pause were answered; `wrong` and `failed` should stay empty."""

    count: int = 0
    versions: list[int] = dataclasses.field(default_factory=list)
    wrong: list[str] = dataclasses.field(default_factory=list)
    failed: list[str] = dataclasses.field(default_factory=list)


def one_answer(
    client: TritonClient,
    inputs: np.ndarray,
    chance: np.random.Generator,
    references: list[Arrays],
    answers: Answers,
    number: int,
) -> None:
    """Sends 1 to 3 images of its own choice and checks that the answer is one version's, of these images."""
    indices = chance.choice(IMAGES, size=int(chance.integers(1, 4)), replace=False).tolist()
    found = client.infer(inputs[indices])
    wanted = [{name: value[indices] for name, value in one.items()} for one in references]
    fits = [version for version, one in enumerate(wanted, start=1) if same(one, found)]
    if len(fits) != 1:
        answers.wrong.append(f"client {number}, images {indices}: fits versions {fits}")
    answers.versions.append(fits[0] if fits else 0)
    answers.count += 1


def one_client(
    server: Server,
    number: int,
    stop: threading.Event,
    references: list[Arrays],
    ensemble: bool,
    answers: Answers,
    pause_s: float,
) -> None:
    """Sends requests and checks each answer against its own images."""
    chance = np.random.default_rng(number)
    model, inputs = ("sam3-encoder-images", files()) if ensemble else ("sam3-encoder", images())
    try:
        with client_of(server, "http" if number % 2 else "grpc", model=model) as client:
            while not stop.wait(pause_s):
                one_answer(client, inputs, chance, references, answers, number)
    except Exception as error:  # a thread's error would be lost
        answers.failed.append(f"client {number}: {error!r}")


class Load:
    """Clients that send for as long as the block takes, the first few of them image files to the ensemble."""

    def __init__(
        self,
        server: Server,
        references: list[Arrays],
        clients: int = CLIENTS,
        ensemble: int = 0,
        pause_s: float = 0,
    ) -> None:
        self.stop, self.answers = threading.Event(), [Answers() for _ in range(clients)]
        self.threads = [
            threading.Thread(
                target=one_client, args=(server, number, self.stop, references, number < ensemble, answers, pause_s)
            )
            for number, answers in enumerate(self.answers)
        ]

    def __enter__(self) -> Load:
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        for thread in self.threads:
            thread.join(timeout=600)

    def wait(self, seconds: float) -> None:
        """Waits until every client had five more answers and the time is over, or one failed; 600 s would be a hang."""
        before, end = [each.count for each in self.answers], time.monotonic() + seconds
        while time.monotonic() < end + 600 and not self.faults:
            more = all(now.count >= was + 5 for now, was in zip(self.answers, before, strict=True))
            if more and time.monotonic() >= end:
                return
            time.sleep(0.02)

    @property
    def faults(self) -> list[str]:
        return [text for each in self.answers for text in (*each.failed, *each.wrong)]

    def newest(self) -> set[int]:
        """The versions of every client's last answer."""
        return {each.versions[-1] for each in self.answers}

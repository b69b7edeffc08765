"""`python -m engines.service.triton_client image.jpg`; of a copied folder, `python -m triton_client image.jpg`."""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from .address import PORTS
from .client import TritonClient
from .errors import ClientError

SECRETS = "A bearer token is read from NECK_TRITON_TOKEN. Passwords, tokens and headers are never printed."


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns 0, or 1 after an error in one line."""
    parser = argparse.ArgumentParser(
        description="Send images to a Triton server and receive the encoder's features.", epilog=SECRETS
    )
    parser.add_argument("images", nargs="+", type=Path, help="image files (PNG, JPEG, ...)")
    parser.add_argument("--url", default="localhost", help="[https://]HOST[:PORT]; port 8000 (http) or 8001 (grpc)")
    parser.add_argument(
        "--model",
        default="sam3-encoder",
        help=("model to call; sam3-encoder-images is the ensemble that takes image files"),
    )
    parser.add_argument("--version", default="", help="version of the model; the latest version if left out")
    parser.add_argument("--protocol", choices=list(PORTS), default="http")
    parser.add_argument("--shared-memory", choices=["none", "system", "cuda"], default="none", dest="memory")
    parser.add_argument(
        "--outputs",
        default="",
        help=(
            "outputs to request: names or wildcards separated by commas, such as sam3_feat_*; all outputs if left out"
        ),
    )
    parser.add_argument("--runs", type=int, default=1, help="number of times that each request is sent")
    parser.add_argument("--timeout", type=float, default=60.0, help="time limit of a call in seconds")
    parser.add_argument(
        "--user", default="", help="user name for basic authentication; the password is read from NECK_TRITON_PASSWORD"
    )
    parser.add_argument(
        "--header",
        action="append",
        default=[],
        help="HTTP header to send with every request, written 'NAME: VALUE'; the option can be repeated",
    )
    parser.add_argument(
        "--ca",
        type=Path,
        help=(
            "PEM file with the certificates to trust for https (default: the file named in the environment variable "
            "SSL_CERT_FILE, or else the certificates that the HTTP or gRPC library trusts)"
        ),
    )
    parser.add_argument("--save", type=Path, help="write the features to this .npz file")
    try:
        _run(parser.parse_args(arguments))
    except ClientError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _run(asked: argparse.Namespace) -> None:
    outputs = [name.strip() for name in asked.outputs.split(",") if name.strip()]
    if not all(":" in header for header in asked.header):
        raise ClientError(
            "the value of a --header option contains no colon; write --header 'NAME: VALUE', such as --header "
            "'X-Tenant: a'"
        )
    options = {
        "protocol": asked.protocol,
        "memory": asked.memory,
        "outputs": outputs,
        "timeout_s": asked.timeout,
        "user": asked.user,
        "password": os.environ.get("NECK_TRITON_PASSWORD", ""),
        "token": os.environ.get("NECK_TRITON_TOKEN", ""),
        "headers": {name.strip(): text.strip() for name, _, text in (one.partition(":") for one in asked.header)},
        "ca": asked.ca,
    }
    parts, milliseconds = [], []
    with TritonClient(asked.url, asked.model, asked.version, **options) as client:
        for batch in client.split(asked.images):
            images = client.prepare(batch)
            for _ in range(max(1, asked.runs)):
                start = time.perf_counter()
                answer = client.infer(images)
                milliseconds.append(1000 * (time.perf_counter() - start))
            parts.append(answer)
    features = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    for name, value in features.items():
        print(f"{name}: {value.dtype} {tuple(value.shape)}")
    print(f"{len(milliseconds)} requests, median {statistics.median(milliseconds):.1f} ms, {asked.protocol}")
    if asked.save:
        try:
            with asked.save.open("wb") as file:
                np.savez(file, **features)  # type: ignore[arg-type]
        except OSError as error:
            raise ClientError(
                f"{asked.save}: the file cannot be written ({error.strerror}); choose another file with --save"
            ) from None


if __name__ == "__main__":
    sys.exit(main())

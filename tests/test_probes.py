"""Probes, closed interfaces and proxy of the Kubernetes files, on a real tritonserver and a real nginx."""

from __future__ import annotations

import contextlib
import gzip
import http.client
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

pytest.importorskip("tritonclient.http", reason="needs tritonclient; pip install '.[triton]'")

from serving import as_file, client_of, files, images, part, passes, pixels
from test_docs import of
from triton_server import (
    ROOT,
    Server,
    ask,
    decoders,
    fake_plan,
    fake_repository,
    free_ports,
    running,
    why_missing,
)

from engines.service.triton_client.__main__ import main
from engines.service.triton_client.client import TritonClient
from engines.service.triton_client.errors import ClientError

pytestmark = pytest.mark.skipif(why_missing() is not None, reason=str(why_missing()))

UID = "6e1f0b0e-5a0c-4a53-8d4b-0c1d5b1f6a11"
"""What Kubernetes would put in the place of $(POD_UID)."""

needs_nginx = pytest.mark.skipif(shutil.which("nginx") is None, reason="needs nginx; apt-get install nginx-light")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("probes")


@pytest.fixture(scope="module")
def repository(folder: Path) -> Path:
    """The repository of an ensemble and, beside it, the Kubernetes files."""
    plan = fake_plan(folder)
    image = "registry.example.com/encoder:1"
    return fake_repository(folder, plan, ensemble=True, image=image, kubernetes=folder / "cluster")


@pytest.fixture(scope="module")
def pod(folder: Path, repository: Path) -> dict[str, dict[str, Any]]:
    """The containers of the Deployment by name, and the data of its ConfigMap as `files`."""
    documents = list(yaml.safe_load_all((folder / "cluster" / "deployment.yaml").read_text()))
    data = next(one["data"] for one in documents if one["kind"] == "ConfigMap")
    spec = next(one["spec"]["template"]["spec"] for one in documents if one["kind"] == "Deployment")
    return {container["name"]: container for container in spec["containers"]} | {"files": data}


def arguments_of(pod: dict[str, dict[str, Any]]) -> list[str]:
    """The Deployment's arguments of Triton, but those that say where things are on this machine."""
    elsewhere = ("--model-repository", "--http-address", "--grpc-address", "--metrics-address", "--exit-timeout")
    arguments = [word for word in pod["triton"]["args"][1:] if not word.startswith(elsewhere)]
    return [word.replace("$(POD_UID)", UID) for word in arguments]


@pytest.fixture(scope="module")
def server(repository: Path, pod: dict[str, dict[str, Any]]) -> Iterator[Server]:
    # as on a volume that is mounted read-only: or Python's own cache makes Triton load the decoders once more
    (repository / "sam3-encoder-preprocess" / "1" / "__pycache__").write_text("")
    with running(repository, *arguments_of(pod)) as one:
        wait_for(lambda: one.get(ready_path(pod))[0] == 200)
        yield one


def wait_for(done: Any, seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end
        time.sleep(0.05)


def ready_path(pod: dict[str, dict[str, Any]]) -> str:
    return str(pod["triton"]["readinessProbe"]["httpGet"]["path"])


def probe(pod: dict[str, dict[str, Any]], server: Server, folder: Path) -> subprocess.CompletedProcess[str]:
    """Runs the command of the liveness probe against a server."""
    script = folder / "canary.py"
    script.write_text(pod["files"]["canary.py"])
    python, where, port, *more = pod["triton"]["livenessProbe"]["exec"]["command"]
    assert (python, where, port) == ("python3", "/etc/neck/canary.py", "8000")
    words = [sys.executable, "-I", str(script), server.http_url.rpartition(":")[2], *more, str(server.process.pid)]
    return subprocess.run(words, capture_output=True, text=True, check=False)


def test_an_empty_volume_is_not_ready(pod: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    with running(tmp_path, *arguments_of(pod)) as empty:
        assert empty.get("/v2/health/ready")[0] == 200  # why it is not what is probed
        assert empty.get(ready_path(pod))[0] == 400


def test_a_pod_that_serves_is_ready_and_live(server: Server, pod: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    assert ready_path(pod) == "/v2/models/sam3-encoder-images/ready" and server.get(ready_path(pod))[0] == 200
    ran = probe(pod, server, tmp_path)
    assert (ran.returncode, ran.stderr) == (0, "")


CLOSED = ("/v2/systemsharedmemory/status", "/v2/cudasharedmemory/status", "/v2/trace/setting", "/v2/logging")


def test_tritons_own_interfaces_are_closed(server: Server) -> None:
    for path in CLOSED:
        assert server.get(path)[0] == 403
    assert ask(server.http_url, CLOSED[0], closed_by=UID)[0] == 200  # the control: who may read the pod may come in
    for protocol in ("http", "grpc"):
        with pytest.raises(ClientError, match="restricted"):
            client_of(server, protocol, memory="system")
        with client_of(server, protocol) as client:
            assert passes(part([0]), client.infer(images()[:1]))


def test_the_server_and_the_clients_of_the_docs(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As docs/serve.md starts and asks them, but for the ports and the folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "image.jpg").write_bytes(as_file(pixels()[0], "JPEG"))
    words = next(words for words in of("docker", "run") if "tritonserver" in words)
    options = [word for word in words[words.index("tritonserver") + 1 :] if not word.startswith("--model-repository")]
    with running(repository, *options) as one:
        for command in of("python", "-m", "engines.service.triton_client"):
            url = one.grpc_url if "grpc" in command else one.http_url
            assert main([*command[3:], "--url", url]) == 0, capsys.readouterr().err
    assert (tmp_path / "features.npz").is_file()


READ_ONLY = """
set -e
mount --make-rprivate /
mount --bind / / && mount -o remount,ro,bind /
mount --bind /tmp /mnt && mount -o remount,ro,bind /mnt
mount -t tmpfs tmpfs /tmp && mount -t tmpfs tmpfs /dev/shm
while [ "$1" != -- ]; do
  case $1 in /tmp/*) mkdir -p "$1"; mount --bind "/mnt${1#/tmp}" "$1" && mount -o remount,ro,bind "$1" ;; esac
  shift
done
shift
exec setpriv --no-new-privs --inh-caps=-all --bounding-set=-all "$@"
"""
"""Everything is read-only but /tmp and /dev/shm, which are empty; without capabilities, as the pods' containers."""


def test_it_serves_from_a_read_only_root(repository: Path, pod: dict[str, dict[str, Any]]) -> None:
    def inside(backends: Path) -> list[str | Path]:
        return ["unshare", "-m", "sh", "-c", READ_ONLY, "sh", repository, backends, ROOT, "--"]

    if not all(map(shutil.which, ("unshare", "setpriv"))) or subprocess.run([*inside(ROOT), "true"]).returncode:
        pytest.skip("needs unshare and setpriv of util-linux, as root, and the right to mount")
    assert pod["triton"]["securityContext"]["readOnlyRootFilesystem"] is True
    assert {mount["mountPath"] for mount in pod["triton"]["volumeMounts"] if not mount.get("readOnly")} == {
        "/tmp",
        "/dev/shm",
    }

    with running(repository, *arguments_of(pod), inside=inside) as one:
        with client_of(one, model="sam3-encoder-images") as client:
            assert passes(part([1, 2]), client.infer(files()[[1, 2]]))
        root = Path("/proc", str(one.process.pid), "root")
        for folder in (ROOT, repository, Path("/var/tmp")):  # the control: nothing can be written there
            with pytest.raises(OSError, match="Read-only"):
                Path(f"{root}{folder}", "written").touch()
        written = [path for place in ("tmp", "dev/shm") for path in (root / place).rglob("*") if path.is_file()]
        print(sorted(str(path.relative_to(root)) for path in written if repository.name not in str(path)))


@contextlib.contextmanager
def proxy(pod: dict[str, dict[str, Any]], server: Server, folder: Path) -> Iterator[tuple[str, str, subprocess.Popen]]:
    """nginx as the pod runs it, on ports of its own: `host:port` for HTTP and gRPC, and its process."""
    web, grpc = free_ports(2)
    text = pod["files"]["nginx.conf"]
    changes = {
        "listen 8080": f"listen 127.0.0.1:{web}",
        "listen 8081": f"listen 127.0.0.1:{grpc}",
        "127.0.0.1:8000": server.http_url,
        "127.0.0.1:8001": server.grpc_url,
        "/tmp/": f"{folder}/",
    }
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new)
    config = folder / "nginx.conf"
    config.write_text(text)
    process = subprocess.Popen(["nginx", "-c", config, "-e", "stderr", "-g", "daemon off;"])
    try:
        wait_for(lambda: (folder / "nginx.pid").is_file() and (folder / "nginx.pid").read_text())
        yield f"127.0.0.1:{web}", f"127.0.0.1:{grpc}", process
    finally:
        process.kill()
        process.wait()


@needs_nginx
def test_answers_by_the_proxy_are_pytorchs(server: Server, pod: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    with proxy(pod, server, tmp_path) as (web, grpc, _):
        with TritonClient(web, timeout_s=600) as client:
            assert passes(part([1, 2]), client.infer(images()[[1, 2]]))
        with TritonClient(web, "sam3-encoder-images", timeout_s=600) as client:
            assert passes(part([3]), client.infer(files()[[3]]))
        with TritonClient(grpc, protocol="grpc", timeout_s=600) as client:
            assert passes(part([4]), client.infer(images()[[4]]))
            assert not passes(part([5]), client.infer(images()[[4]]))  # the control
        assert ask(web, ready_path(pod))[0] == 200


@needs_nginx
def test_the_proxy_refuses_compressed_requests_and_what_is_closed(
    server: Server, pod: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    good = b'{"inputs": [{"name": "image_file", "shape": [1, 1], "datatype": "BYTES", "data": ["x"]}]}'
    path = "/v2/models/sam3-encoder-preprocess/infer"
    with proxy(pod, server, tmp_path) as (web, grpc, _):
        for headers in ({}, {"Content_Encoding": "identity"}):
            assert ask(web, path, good, **headers)[0] == 400  # Triton's own answer
        for encoding in ("gzip", "deflate", "GZIP", "gzip, gzip", "br"):
            assert ask(web, path, gzip.compress(good), Content_Encoding=encoding)[0] == 415
        closed = (*CLOSED, "/v2/%74race/setting", "/v2//logging", "/v2/models/sam3-encoder/trace/setting")
        for one in closed:
            assert ask(web, one)[0] == 403
        for one in ("index", "models/sam3-encoder/load", "models/sam3-encoder/unload"):
            assert ask(web, f"/v2/repository/{one}", b"{}")[0] == 403
        with pytest.raises(ClientError, match="403"):
            TritonClient(grpc, protocol="grpc", memory="system", timeout_s=600)


@needs_nginx
def test_a_proxy_that_quits_closes_kept_alive_connections(
    server: Server, pod: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    """Triton alone goes on serving them until its exit timeout is over and then resets them (seen with 2.51)."""
    with proxy(pod, server, tmp_path) as (web, _, process):
        kept = http.client.HTTPConnection(web, timeout=600)
        for _ in range(2):
            kept.request("GET", "/v2/health/live")
            response = kept.getresponse()
            response.read()
            assert response.status == 200 and not response.will_close
        (sentence,) = re.findall(r"nginx (-c .*) -s quit;", pod["proxy"]["lifecycle"]["preStop"]["exec"]["command"][2])
        words = sentence.replace("/etc/neck", str(tmp_path)).split()
        subprocess.run(["nginx", *words, "-s", "quit"], check=True, capture_output=True)
        assert kept.sock.recv(1) == b""  # closed, not reset
        assert process.wait(timeout=60) == 0
        kept.close()


def test_a_dead_decoder_is_noticed(server: Server, pod: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    """Triton 2.51 does not start it again, and both of its own health paths go on saying yes; one of two is enough.

    Under load, too, when the living one gets nearly every request.
    """
    stop, refused = threading.Event(), []

    def send_images() -> None:
        with client_of(server, model="sam3-encoder-images") as client:
            while not stop.is_set():
                try:
                    client.infer(np.array(files()[:1]))
                except ClientError as error:
                    refused.append(str(error))

    threads = [threading.Thread(target=send_images) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        assert len(decoders(server)) == 2
        assert probe(pod, server, tmp_path).returncode == 0  # the control
        os.kill(decoders(server)[0], signal.SIGKILL)
        wait_for(lambda: refused)
        for _ in range(3):  # what the kubelet wants before it starts the container again
            ran = probe(pod, server, tmp_path)
            assert ran.returncode == 1 and "sam3-encoder-preprocess" in ran.stderr
        assert server.get("/v2/health/live")[0] == server.get(ready_path(pod))[0] == 200
    finally:
        stop.set()
        for thread in threads:
            thread.join(timeout=600)
    assert all("not healthy" in text for text in refused)

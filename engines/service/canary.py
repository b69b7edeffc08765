"""Liveness probe of a pod: exit 0 if Triton lives and its decoder processes answer; needs nothing but Python.

Triton's Python backend does not start a process again that was killed (tritonserver 2.51: the pod stays live and ready,
and each request that such a process gets is answered 500). So the probe counts the processes: under load the living
ones answer so much faster that a request of the probe hardly ever meets the dead one. And it sends requests that a
living process refuses with 400 at no cost, twice as many as there are processes, to see that they answer.

    python3 canary.py PORT [MODEL PROCESSES [SERVER]]

SERVER is tritonserver's process id, where several run beside each other, which they do in no pod.
"""

import glob
import http.client
import json
import sys

TIMEOUT_S = 50.0
"""For each answer: a request waits behind the images that wait for the decoders already."""


def main(port: str, model: str = "", processes: str = "0", server: str = "") -> str:
    """Returns what is wrong; empty if nothing is."""
    alive = count_alive(model, server)
    if 0 < alive < int(processes):  # none: they are called otherwise there, and the requests must tell
        return f"{alive} of {processes} processes of {model} are alive"
    requests = [("GET", "/v2/health/live", "")]
    body = {"inputs": [{"name": "image_file", "shape": [1, 1], "datatype": "BYTES", "data": ["canary"]}]}
    requests += [("POST", f"/v2/models/{model}/infer", json.dumps(body))] * (2 * int(processes))
    for method, path, text in requests:
        connection = http.client.HTTPConnection("127.0.0.1", int(port), timeout=TIMEOUT_S)
        try:
            connection.request(method, path, text)
            response = connection.getresponse()
            answer = response.read(500)
        except (OSError, http.client.HTTPException) as error:
            return f"{path}: Triton did not answer ({error})"
        finally:
            connection.close()
        if response.status >= 500 or (method == "GET" and response.status != 200):
            return f"{path}: Triton answered with HTTP status {response.status}: {answer!r}"
    return ""


def count_alive(model: str, server: str) -> int:
    """The model's processes; their arguments have its instance's name and the server's process id, a dead one none."""
    count = 0
    for path in glob.glob("/proc/[0-9]*/cmdline"):
        try:
            with open(path, encoding="utf-8", errors="replace") as file:
                words = file.read().split("\0")
        except OSError:  # it ended just now
            continue
        ours = words[0].endswith("triton_python_backend_stub") and (not server or server in words)
        count += ours and any(word.startswith(f"{model}_") for word in words)
    return count


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]) or 0)

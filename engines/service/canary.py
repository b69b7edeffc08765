"""Liveness probe of a pod: exit 0 if Triton lives and its decoder processes answer; needs nothing but Python.

Triton's Python backend does not start a process again that was killed (tritonserver 2.51: the pod stays live and ready,
and each request that such a process gets is answered 500). So the probe sends requests that a living process refuses
with 400 at no cost, twice as many as there are processes: Triton hands them out in turn.

    python3 canary.py PORT [MODEL PROCESSES]
"""

import http.client
import json
import sys

TIMEOUT_S = 50.0
"""For each answer: a request waits behind the pictures that wait for the decoders already."""


def main(port: str, model: str = "", processes: str = "0") -> str:
    """Returns what is wrong, empty if nothing is."""
    requests = [("GET", "/v2/health/live", "")]
    body = {"inputs": [{"name": "picture", "shape": [1, 1], "datatype": "BYTES", "data": ["canary"]}]}
    requests += [("POST", f"/v2/models/{model}/infer", json.dumps(body))] * (2 * int(processes))
    for method, path, text in requests:
        connection = http.client.HTTPConnection("127.0.0.1", int(port), timeout=TIMEOUT_S)
        try:
            connection.request(method, path, text)
            response = connection.getresponse()
            answer = response.read(500)
        except (OSError, http.client.HTTPException) as error:
            return f"{path}: no answer ({error})"
        finally:
            connection.close()
        if response.status >= 500 or (method == "GET" and response.status != 200):
            return f"{path}: status {response.status} {answer!r}"
    return ""


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]) or 0)

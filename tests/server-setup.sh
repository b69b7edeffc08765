#!/bin/sh
# Sets up .triton/: a real tritonserver (2.51, from the nvidia-pytriton wheel) and what its Python models import.
# `sh tests/server-setup.sh [folder]` ends with folder/ready; PYTHON names the Python (3.10 to 3.12).
set -eu
cd "$(dirname "$0")/.."
folder=${1:-.triton}
python=${PYTHON:-python3}
state=$(sha256sum tests/server-setup.sh | cut -d ' ' -f 1)  # a folder that another state of this file made is made again
if [ -f "$folder/ready" ] && [ "$(cat "$folder/ready")" = "$state" ]; then
    touch "$folder/ready"
    exit 0
fi
rm -rf "$folder"
"$python" -m venv "$folder"
pip="$folder/bin/python -m pip install --quiet --disable-pip-version-check"
# numpy 2 would give the Python backend zero bytes without an error; of pytriton the server alone is used, last, for
# pip would tell of its other dependencies
$pip 'numpy<2' 'onnxruntime>=1.23' 'pillow>=11'
$pip --no-deps nvidia-pytriton==0.7.0
server=$("$folder/bin/python" -c 'import pathlib, sysconfig; print(pathlib.Path(sysconfig.get_paths()["purelib"], "pytriton", "tritonserver"))')
version=$("$folder/bin/python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
stub=$server/python_backend_stubs/$version/triton_python_backend_stub
if [ ! -f "$stub" ]; then
    echo "server-setup: nvidia-pytriton 0.7.0 has no stub for Python $version; set PYTHON to one of 3.10 to 3.12" >&2
    exit 1
fi
if ldd "$stub" | grep 'not found' >&2; then
    echo "server-setup: install Python's shared library (Debian: libpython$version)" >&2
    exit 1
fi
cp "$stub" "$server/backends/python/"
ln -s "$(realpath --relative-to="$folder" "$server")" "$folder/tritonserver"
echo "$state" > "$folder/ready"

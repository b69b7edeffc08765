#!/bin/sh
# Sets up .triton/: a real tritonserver (2.51, from the nvidia-pytriton wheel) and what its Python models import.
# `sh tests/server-setup.sh [folder]` ends with folder/ready; where that cannot be, folder/why says why and the tests
# that need it are skipped. PYTHON names the Python, else the first of python3, python3.12, 3.11, 3.10 that will do.
set -eu
cd "$(dirname "$0")/.."
folder=${1:-.triton}
lock=tests/server.lock
. tests/setup-folder.sh

for python in "${PYTHON:-python3}" python3.12 python3.11 python3.10 ''; do
    [ -n "$python" ] || refuse "no Triton server: its stub and numpy 1 need Python 3.10 to 3.12 (set PYTHON)"
    # numpy 2 would give the Python backend zero bytes without an error, and numpy 1 has no wheel for 3.13
    "$python" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null && break
done
"$python" -m venv "$folder"
# of pytriton the server alone is used, so it comes without its dependencies; the lock names all that the others need
"$folder/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps --requirement "$lock" ||
    refuse "no Triton server: pip could not install it (above)"
server=$("$folder/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib") + "/pytriton/tritonserver")')
version=$("$folder/bin/python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
stub=$server/python_backend_stubs/$version/triton_python_backend_stub
[ -f "$stub" ] || refuse "no Triton server: nvidia-pytriton 0.7.0 has no stub for Python $version"
if ldd "$stub" | grep 'not found' >&2; then
    refuse "no Triton server: its stub needs Python $version's shared library (Debian: libpython$version)"
fi
cp "$stub" "$server/backends/python/"
ln -s "$(realpath --relative-to="$folder" "$server")" "$folder/tritonserver"
echo "$state" > "$folder/ready"

#!/bin/sh
# Renews the locks (`make lock`): of every package that `make` installs the newest version that goes with PyTorch 2.13.0,
# for Python 3.10 to 3.14 on Linux. Then checks that each of these Pythons finds wheels of just these versions.
set -eu
cd "$(dirname "$0")/.."
export UV_PYTHON_DOWNLOADS=never UV_CUSTOM_COMPILE_COMMAND='make lock'
uv=${UV:-.venv/bin/uv}
extras='--extra cpu --extra rtx --extra triton --extra hub --extra bench --extra sam3 --extra dev'

compile() { # what is asked, and the file
    output=$1
    shift
    "$uv" pip compile --quiet --universal --upgrade --python-version 3.10 --no-annotate --output-file "$output" "$@"
}

# shellcheck disable=SC2086
compile requirements.lock pyproject.toml $extras --group build
compile tests/families.lock --group families --no-deps
compile tests/server.lock --group server
compile tests/pytriton.lock --group pytriton --no-deps && grep '==' tests/pytriton.lock >> tests/server.lock
rm tests/pytriton.lock

# NVIDIA and iopath publish these two, in pure Python, as sources only
sources='--no-binary tensorrt-rtx-cu13 --no-binary iopath'
for version in 3.10 3.11 3.12 3.13 3.14; do
    check="$uv pip compile --quiet --no-header --no-annotate --python-version $version --only-binary :all: $sources"
    $check requirements.lock >/dev/null
    $check tests/families.lock --no-deps >/dev/null
    [ "$version" \> 3.12 ] || $check tests/server.lock --no-deps >/dev/null # as far as tritonserver's stub goes
    echo "Python $version: every package has a wheel"
done

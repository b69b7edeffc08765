#!/bin/sh
# Sets up .families/: Meta's and Ultralytics' packages with their SAM 3 and what those import, to be put on PYTHONPATH
# over .venv, whose torch they take. `sh tests/families-setup.sh [folder]` ends with folder/ready; where that cannot be
# (no network), folder/why says why and the tests that need it are skipped.
set -eu
cd "$(dirname "$0")/.."
folder=${1:-.families}
lock=tests/families.lock
. tests/setup-folder.sh

# without their dependencies, of which torch would bring CUDA; the lock names each of them
.venv/bin/python -m pip install --quiet --disable-pip-version-check --target "$folder" --no-deps \
    --requirement "$lock" --build-constraint requirements.lock ||
    refuse "no packages with SAM 3: pip could not install them (above)"
echo "$state" > "$folder/ready"

#!/bin/sh
# Sets up .families/: Meta's and Ultralytics' packages with their SAM 3 and what those import, to be put on PYTHONPATH
# over .venv, whose torch they take. `sh tests/families-setup.sh [folder]` ends with folder/ready; where that cannot be
# (no network), folder/why says why and the tests that need it are skipped.
set -eu
cd "$(dirname "$0")/.."
folder=${1:-.families}
python=.venv/bin/python
. tests/setup-folder.sh

# torchvision goes with one torch alone: 0.28 with 2.13
vision=$("$python" -c 'import importlib.metadata as m; print("0.%d.*" % (int(m.version("torch").split(".")[1]) + 15))')
# without their dependencies, of which torch would bring CUDA
"$python" -m pip install --quiet --disable-pip-version-check --target "$folder" --no-deps \
    "torchvision==$vision" sam3==0.1.4 ultralytics==8.4.190 'timm>=1.0.17' 'iopath>=0.1.10' 'portalocker>=2' \
    'ftfy>=6.1' 'wcwidth>=0.2' 'einops>=0.8' 'pycocotools>=2' 'requests>=2.23' 'opencv-python-headless>=4.7' ||
    refuse "no packages with SAM 3: pip could not install them (above)"
echo "$state" > "$folder/ready"

#!/usr/bin/env bash
# Makes the folder that travels with a checkout to a GPU machine without a package registry: what Detectron2 needs, for
# a Python that has torch, torchvision, Triton, OpenCV, matplotlib, tabulate and tqdm already. EXTRA names more packages.
#
#     tools/gpu_bundle.sh [FOLDER]        # default: bundle/, which git ignores
#     TARGET=3.12 MACHINE=x86_64 EXTRA="pytest pluggy iniconfig pytest-xdist execnet" tools/gpu_bundle.sh
#
# On the machine: PYTHONPATH=bundle make gpu PY=python3
set -euo pipefail
cd "$(dirname "$0")/.."
folder=${1:-bundle}
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
target=${TARGET:-3.12}     # Python of the machine
machine=${MACHINE:-x86_64} # its processor
wheels=$(mktemp -d)
trap 'rm -rf "$wheels"' EXIT

pip() { "$python" -m pip "$@" --quiet --disable-pip-version-check; }
# Pure Python, partly from sources: the same wheels for every machine.
pip wheel --no-deps --constraint requirements/constraints.txt --wheel-dir "$wheels" \
    antlr4-python3-runtime fvcore hydra-core iopath omegaconf portalocker termcolor yacs ${EXTRA:-}
# Compiled for the machine.
pip download --no-deps --only-binary=:all: --python-version "$target" --implementation cp \
    --platform "manylinux_2_28_$machine" --platform "manylinux_2_27_$machine" \
    --platform "manylinux_2_17_$machine" --platform "manylinux2014_$machine" \
    --constraint requirements/constraints.txt --dest "$wheels" pycocotools pyyaml
# The wheel's tag allows Python 3.10 only, which pip enforces and Python does not.
pip download --no-deps --only-binary=:all: --python-version 3.10 --implementation cp --platform any \
    --require-hashes --requirement requirements/detectron2.txt --dest "$wheels"

rm -rf "$folder"
mkdir -p "$folder"
for wheel in "$wheels"/*.whl; do
    "$python" -m zipfile -e "$wheel" "$folder"
done
rm -f "$folder"/detectron2/_C*.so # loads in Python 3.10 alone
echo "$folder: $(du -sm "$folder" | cut -f1) MB for Python $target, $machine"

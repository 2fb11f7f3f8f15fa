# Everything a fresh machine needs is Python >= 3.10 and a package registry.
PYTHON ?= python3
VENV := .venv
PY ?= $(VENV)/bin/python
DEMO_CONFIG := configs/Digits-Detection/megdet_R18_FPN_b32_bn32.yaml
DEMO_OUTPUT ?= output/demo
TODAY := $(shell date +%F)

.PHONY: setup demo backbone test test-slow older matrix gpu bundle test-gpu bench-gpu lint docs

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml requirements/setup.txt requirements/constraints.txt requirements/detectron2.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
		|| { echo "megdet_d2 needs Python >= 3.10: make PYTHON=/path/to/python3 ..."; exit 1; }
	@test -x $(PY) || $(PYTHON) -m venv $(VENV) \
		|| { echo "python3 -m venv failed; on Debian: apt-get install python3-venv"; rm -rf $(VENV); exit 1; }
	@echo "Installing torch and the rest into $(VENV); a few minutes."
	@$(PY) -m pip install -q -r requirements/setup.txt -c requirements/constraints.txt
	@$(PY) -c 'import importlib.util as u, sys; sys.exit(u.find_spec("detectron2") is None)' \
		|| $(MAKE) --no-print-directory detectron2
	@$(PY) -m pip install -q --no-deps --no-build-isolation -e .
	@touch $@

# The wheel is tagged for Python 3.10 and brings a compiled extension that loads nowhere else; without it Detectron2
# runs but for deformable convolution and rotated boxes.
.PHONY: detectron2
detectron2:
	@site=$$($(PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))') \
		&& $(PY) -m pip install -q --no-deps --target "$$site" --upgrade --python-version 3.10 \
			--implementation cp --platform any --only-binary=:all: \
			--require-hashes -r requirements/detectron2.txt \
		&& rm -f "$$site"/detectron2/_C*.so

# On CPU processes everywhere, GPUs or none.
demo: setup
	CUDA_VISIBLE_DEVICES= $(PY) -W ignore train_net.py --config-file $(DEMO_CONFIG) --num-gpus 2 --dist-url auto OUTPUT_DIR $(DEMO_OUTPUT)
	$(PY) -W ignore -m megdet_cli report $(DEMO_OUTPUT)

# What the reduced experiments start from, as the paper's do from ImageNet's (docs/experiments.md).
backbone: setup
	$(PY) -c 'import torch; \
		model = torch.load("$(DEMO_OUTPUT)/model_final.pth", weights_only=True)["model"]; \
		kept = {k: v for k, v in model.items() if k.startswith("backbone.bottom_up.")}; \
		torch.save({"model": kept}, "$(DEMO_OUTPUT)/backbone.pth")'

# Coverage is of the test process alone and costs about a seventh of its time; `make test COVERAGE=` goes without.
COVERAGE ?= --cov --cov-report=term:skip-covered

test: setup lint
	$(PY) -m pytest $(COVERAGE)

test-slow: setup
	$(PY) -m pytest -m slow

# The oldest torch whose Triton the kernels support, in .nox/; some slow tests use it where it is.
OLDER := .nox/tests-torch-2-11
older: setup
	@rm -f $(OLDER)/.ready
	$(PY) -m nox -s "tests(torch-2.11)" --install-only
	@touch $(OLDER)/.ready

# All versions of noxfile.py whose Python is here.
matrix: setup
	$(PY) -m nox -s tests

# On a machine with a GPU: tests and measurements in 8 minutes (docs/gpu.md). It goes on where it was stopped.
# PY=python3 takes a Python of the machine with torch.
OUT ?= # folder for results and log
PARTS ?= # all
FORCE ?= # 1: repeats what has passed
DRY ?= # 1: tries it on a CPU
gpu: $(if $(findstring $(VENV),$(PY)),setup)
	$(PY) -W ignore benchmarks/gpu.py $(if $(OUT),--output $(OUT)) $(if $(PARTS),--parts $(PARTS)) \
		$(if $(FORCE),--force) $(if $(DRY),--dry-run)

# What a GPU machine without a package registry lacks, into bundle/.
bundle: setup
	tools/gpu_bundle.sh

# On a machine with a GPU.
test-gpu: setup
	MEGDET_TEST_GPU=1 $(PY) -m pytest tests/norm/test_cuda.py

# On a machine with a GPU: correct first, then the long tables beside the peers, into docs/results/.
bench-gpu: test-gpu
	for dtype in float32 bfloat16 float16; do \
		$(PY) -W ignore benchmarks/norm.py --fake-group --height 800 --width 1344 --repeats 20 --dtype $$dtype \
			--output docs/results/norm_gpu_$${dtype}_$(TODAY).json || exit 1; \
	done
	$(PY) -W ignore benchmarks/exactness.py --output docs/results/exactness_gpu_$(TODAY).json
	$(PY) -W ignore benchmarks/train_step.py --processes 1 --height 800 --width 1344 \
		--output docs/results/train_step_gpu_$(TODAY).json

lint: setup
	@$(PY) -m ruff check . && $(PY) -m ruff format --check . && $(PY) -m mypy

# The site, into output/site; `python -m http.server -d output/site` shows it. NO_MKDOCS_2_WARNING silences a
# notice about the theme's successor.
docs: setup
	NO_MKDOCS_2_WARNING=1 $(PY) -W ignore -m mkdocs build --strict

# `make demo` and `make test` set up everything; VENV=... uses an existing environment.
PYTHON ?= $(firstword $(foreach version,3.11 3.12 3.13 3.14,$(shell python$(version) -c 'print("python$(version)")' 2>/dev/null)) python3)
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(BIN)/fastface
DEV_MODULES := pytest xdist hypothesis mypy playwright dlib ray fastapi openai axe_playwright_python
# Without an NVIDIA GPU, a CPU build of PyTorch saves a download of several gigabytes on Linux.
TORCH_INDEX ?= $(if $(filter Linux,$(shell uname -s)),$(if $(shell command -v nvidia-smi),,https://download.pytorch.org/whl/cpu))
PIP_INSTALL := $(BIN)/python -m pip install --constraint constraints.txt
# On small models two processes with one thread each are faster than one process with two threads.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q

.PHONY: ready demo test test-slow fuzz faults lint bench pocket-report clean

$(INSTALLED):
	$(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) --retries 1 torch $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
	$(PIP_INSTALL) --editable .

ready: | $(INSTALLED)
	@$(BIN)/python -c 'import importlib.util, sys; sys.exit(not all(map(importlib.util.find_spec, sys.argv[1:])))' \
		$(DEV_MODULES) || $(PIP_INSTALL) --editable '.[dev,dlib,ray,serve]'

demo: | $(INSTALLED)  ## generate a contact sheet with the pocket stack: one photo, five styles
	$(BIN)/fastface generate --recipe pocket --face examples/portrait.png --seed 5 \
		--prompt "a photo of a smiling woman" --prompt "comic book style; a smiling woman" \
		--prompt "pencil drawing; a smiling woman" --prompt "watercolour painting; a smiling woman" \
		--prompt "black and white photograph; a smiling woman" --grid --force --output "out/demo-{index}.png"

test: ready  ## the test suite, about ten minutes on two cores
	$(PYTEST) -n 2

test-slow: ready  ## full-size structure, killed runs, installation: at most thirty minutes
	$(PYTEST) -m slow

EXAMPLES ?= 1000
fuzz: ready  ## untrusted files: a thousand examples for each reader, about five minutes
	FASTFACE_FUZZ=$(EXAMPLES) $(PYTEST) tests/fuzz --hypothesis-show-statistics

faults: ready  ## kills, power cuts, full disks: about ninety seconds; FASTFACE_FAULTS=long for the full sizes
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.faults

lint: ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: ready  ## speed of the pocket stack; benchmarks/gpu.sh measures a GPU
	$(BIN)/python benchmarks/bench.py

pocket-report: ready  ## quality of the pocket stack; needs the training portraits next to the checkout
	$(BIN)/python -m training.report

clean:
	rm -rf .venv out build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis

# `make demo` and `make test` set up everything; VENV=... uses an existing environment.
PYTHON ?= python3.11
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(BIN)/fastface
# On small models two processes with one thread each are faster than one process with two threads.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q

.PHONY: demo test test-slow fuzz faults lint bench pocket-report clean

$(READY):
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,dlib,ray]'

demo: $(READY)  ## generate one image with the pocket stack and print its path
	$(BIN)/fastface generate --recipe pocket --face examples/portrait.png \
		--prompt "watercolour; a smiling woman" --seed 3 --force --output out/demo.png

test: $(READY)  ## the test suite, at most ten minutes on two cores
	$(PYTEST) -n 2

test-slow: $(READY)  ## full-size structure, killed runs, installation: at most thirty minutes
	$(PYTEST) -m slow

fuzz: $(READY)  ## untrusted files: a thousand examples for each reader, about five minutes
	FASTFACE_FUZZ=1000 $(PYTEST) tests/fuzz --hypothesis-show-statistics

faults: $(READY)  ## kills, power cuts, full disks: about ninety seconds; FASTFACE_FAULTS=long for the full sizes
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.faults

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(READY)  ## speed of the pocket stack; benchmarks/gpu.sh measures a GPU
	$(BIN)/python benchmarks/bench.py

pocket-report: $(READY)  ## quality of the pocket stack; needs the training portraits next to the checkout
	$(BIN)/python -m training.report

clean:
	rm -rf .venv out build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis

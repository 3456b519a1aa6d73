# `make demo` and `make test` work from nothing; VENV=... uses an environment that exists already.
PYTHON ?= python3.11
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(BIN)/fastface
# Two processes of one thread each beat one process of two threads on small models.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q

.PHONY: demo test test-slow fuzz lint bench pocket-report clean

$(READY):
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,dlib,ray]'

demo: $(READY)  ## one picture with the miniature stack; prints its path
	$(BIN)/fastface generate --recipe pocket --face examples/portrait.png \
		--prompt "watercolor; a smiling woman" --seed 3 --force --output out/demo.png

test: $(READY)  ## the suite, at most ten minutes on two cores
	$(PYTEST) -n 2

test-slow: $(READY)  ## full-size structure, kills, installs: at most thirty minutes
	$(PYTEST) -m slow

fuzz: $(READY)  ## files of somebody else: a thousand examples for each reader, about five minutes
	FASTFACE_FUZZ=1000 $(PYTEST) tests/fuzz --hypothesis-show-statistics

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(READY)  ## what the pocket stack's speed is worth; benchmarks/gpu.sh measures a GPU
	$(BIN)/python benchmarks/bench.py

pocket-report: $(READY)  ## the pocket's numbers; needs the training portraits beside the checkout
	$(BIN)/python -m training.report

clean:
	rm -rf .venv out build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis

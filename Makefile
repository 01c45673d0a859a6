# `make demo` and `make test` each set up what they need on a fresh machine; a second call starts at once.

PYTHON ?= python3
VENV ?= .venv

BIN := $(VENV)/bin
ENVIRONMENT := $(VENV)/.environment
OPERATOR := $(VENV)/.operator
CSRC := $(wildcard $(foreach suffix,h cuh cpp cu,csrc/*.$(suffix) csrc/*/*.$(suffix)))

.PHONY: help setup demo test stress lint format clean

help:
	@echo "make demo     train small Deformable DETRs on generated data and on ten photos, evaluate and draw"
	@echo "make test     lint and run every test"
	@echo "make stress   reliability figures: fuzzing, kills, memory, broken data (about an hour)"
	@echo "make setup    only create $(VENV), install PyTorch and Detectron2, build the operator"
	@echo "make lint     check the style of Python, C++ and CUDA;  make format applies it"
	@echo "make clean    remove what was built and drawn (not your trainings in output/, and not $(VENV):"
	@echo "              remove that to start afresh)"
	@echo "Variables: PYTHON=$(PYTHON) (3.10 or newer), VENV=$(VENV)"

setup: $(OPERATOR)

demo: $(OPERATOR)
	$(BIN)/python tools/demo.py

# A process for each core, as a test uses one. Neighbours stay together, so that few build what they share twice.
test: lint $(OPERATOR)
	$(BIN)/python -m pytest --numprocesses logical --maxprocesses 4 --dist worksteal

# Not part of `make test`, which runs the same tests at a small size.
stress: $(OPERATOR)
	$(BIN)/python -m pytest tests/stress --stress --timeout 3600

lint: $(ENVIRONMENT)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/clang-format --dry-run -Werror $(CSRC)

format: $(ENVIRONMENT)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(CSRC)

clean:
	rm -rf build output/demo .pytest_cache .ruff_cache .hypothesis $(OPERATOR)
	rm -f projects/deformable_detr/*.so
	rm -rf projects/*.egg-info
	find configs projects tests tools -name __pycache__ -prune -exec rm -rf {} +

# constraints.txt names every package of the environment, so installing it needs no resolving.
$(ENVIRONMENT): constraints.txt tools/install_detectron2.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
		|| { echo "error: $(PYTHON) must be Python 3.10 or newer; choose another: make PYTHON=python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' \
		|| { echo "error: $(PYTHON) cannot create environments; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --requirement constraints.txt
	$(BIN)/python tools/install_detectron2.py --constraint constraints.txt
	@touch $@

# No build isolation: the operator must be compiled against the PyTorch that will load it. No dependencies: they are
# there, with the OpenCV that runs without a display in place of the one that setup.py names.
$(OPERATOR): $(ENVIRONMENT) setup.py pyproject.toml $(CSRC)
	$(BIN)/python -m pip install --disable-pip-version-check --no-build-isolation --no-deps --editable .
	@touch $@

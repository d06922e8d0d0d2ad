# Everything goes into one virtual environment; set VENV or PYTHON to choose another.
VENV ?= .venv
BIN := $(VENV)/bin
PYTEST_ARGS ?=
VM_ARGS ?=
SOAK_ARGS ?=

.PHONY: help demo test test-unit test-vm lint bench soak clean

help:
	@echo 'make demo       run notebooks/tour.ipynb on the kernel, show what each cell used'
	@echo 'make test       install what the tests need, system packages included, and run them all'
	@echo 'make test-unit  the tests that need no container'
	@echo 'make test-vm    what needs systemd, cgroup v2 or an ordinary user, in a virtual machine'
	@echo 'make lint       ruff, mypy, import-linter'
	@echo 'make bench      measure against stock ipykernel'
	@echo 'make soak       10 000 cells, hostile ones too, and a thousand kills; look for leaks'
	@echo 'make clean      remove the environment and what was built'

$(BIN)/python:
	.ci/venv $(VENV)

demo: $(BIN)/python
	.ci/packages host
	$(BIN)/python -m pip install --quiet '.[demo]'
	$(BIN)/sandbox-kernel install --sys-prefix
	$(BIN)/python notebooks/demo.py notebooks/tour.ipynb build

# Editable: the tests run the code of this folder.
$(BIN)/pytest: $(BIN)/python pyproject.toml
	$(BIN)/python -m pip install --quiet --editable '.[test,bench,demo]'
	@touch $@

test: $(BIN)/python
	.ci/packages test
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	$(BIN)/python -m pytest -q $(PYTEST_ARGS)

test-unit: $(BIN)/pytest
	$(BIN)/python -m pytest -q tests/unit $(PYTEST_ARGS)

# The guest has a Python of its own; here nothing but the wheel is made.
test-vm: $(BIN)/python
	.ci/packages vm
	$(BIN)/python -m tests.vm test $(VM_ARGS)

lint: $(BIN)/pytest
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(BIN)/python
	.ci/packages bench
	$(BIN)/python -m pip install --quiet --editable '.[bench]'
	@mkdir -p build
	$(BIN)/python -m tests.bench

soak: $(BIN)/pytest
	$(BIN)/python -m tests.soak --json build/soak.json $(SOAK_ARGS)

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

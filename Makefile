# `make demo` and `make test` set up everything they need: a virtual environment, the package, the model, the data.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
# One worker a core, each with a thread; a file's tests share what its fixtures made, so they stay together.
SIDE_BY_SIDE ?= --numprocesses auto --maxprocesses 8 --dist loadfile

.DEFAULT_GOAL := help
.PHONY: help demo test lint docs bench clean

help:
	@echo "make demo   fine-tune a real model on real data with LoRA and with CE-LoRA, compare them (offline)"
	@echo "make test   run the tests"
	@echo "make lint   check format, lint and types"
	@echo "make docs   build the documentation into build/site; a broken link is an error"
	@echo "make bench  measure whole training steps on this machine"

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "celora needs Python 3.11 or newer; this is " + sys.version.split()[0] + ". Try: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev,docs]'
	@touch $@

demo: $(STAMP)
	$(BIN)/celora demo

test: $(STAMP)
	$(BIN)/python -m pytest $(SIDE_BY_SIDE)

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench: $(STAMP)
	$(BIN)/celora bench

clean:
	rm -rf $(VENV) dist build .pytest_cache .mypy_cache .ruff_cache

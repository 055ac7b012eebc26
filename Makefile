# make demo: from nothing to a report.   make test: from nothing to a tested checkout.
# make test-typed: the same, with the shapes and types of calls checked, which takes longer; CI runs this one.
PYTHON ?= python3
VENV   ?= .venv
WORKERS ?= 2
BIN    := $(VENV)/bin
# tests that use the library from outside, in processes of their own or through a page: checking types again there only costs time
PLAIN  := tests/app tests/notebooks tests/test_readme.py tests/jobs/test_faults.py tests/jobs/test_cluster.py

.PHONY: demo test test-typed lint models wheel clean
.DELETE_ON_ERROR:

demo: $(VENV)/.installed
	$(BIN)/interp discover

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n $(WORKERS)

test-typed: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n $(WORKERS) --jaxtyping-packages=interp,interp_kernels,beartype.beartype \
	  $(foreach path,$(PLAIN),--ignore=$(path))
	$(BIN)/python -m pytest -n $(WORKERS) $(PLAIN)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# retrains the bundled models from scratch (hours), then measures them and writes their cards
models: $(VENV)/.installed
	$(BIN)/python data/train_mini.py --model mini-gpt2
	$(BIN)/python data/train_mini.py --model mini-llama
	$(BIN)/python data/evaluate_mini.py

wheel: $(VENV)/.installed-dev
	$(BIN)/pip wheel --no-deps --wheel-dir dist .

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .hypothesis

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "interp needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1). Try: make PYTHON=python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)

# torch by itself first: with the pinned build in place, no other requirement pulls another one
$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(VENV)/.installed
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

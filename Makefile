# The two commands of the README: `make demo` and `make test`. Each needs Python 3.11 or newer only.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin

# One back end for mlx: none to choose on macOS (Metal), on Linux the CPU unless VAUBAN_BACKEND
# says cuda12 or cuda13.
ifeq ($(shell uname -s),Linux)
VAUBAN_BACKEND ?= cpu
BACKEND := $(VAUBAN_BACKEND)
else
BACKEND :=
endif
comma := ,
DEMO_EXTRAS := [$(if $(BACKEND),$(BACKEND)$(comma))plots]
TEST_EXTRAS := [$(if $(BACKEND),$(BACKEND)$(comma))test]
DOCS_EXTRAS := [$(if $(BACKEND),$(BACKEND)$(comma))docs]

.PHONY: demo test oldest lint docs clean

demo: $(VENV)/.demo
	$(BIN)/vauban demo --force

test: $(VENV)/.test
	$(BIN)/python -m pytest -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder

# The oldest mlx-lm that pyproject.toml admits, with its mlx, in an environment of its own.
oldest: $(VENV)-oldest/.ready
	$(VENV)-oldest/bin/python -m pytest tests/architectures/test_smoke.py tests/generation/test_replacing.py

$(VENV)-oldest/.ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)-oldest
	$(VENV)-oldest/bin/python -m pip install --quiet --editable '.$(DEMO_EXTRAS)' \
		'mlx-lm==0.31.1' 'mlx==0.30.6' pytest hypothesis
	touch $@

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python data/check.py

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

$(VENV)/.demo: pyproject.toml | $(BIN)/python
	@echo "installing vauban into $(VENV) ..."
	@$(BIN)/python -m pip install --quiet --editable '.$(DEMO_EXTRAS)'
	@touch $@

$(VENV)/.test: pyproject.toml | $(BIN)/python
	@echo "installing vauban into $(VENV) ..."
	@$(BIN)/python -m pip install --quiet --editable '.$(TEST_EXTRAS)'
	@touch $@

$(VENV)/.docs: pyproject.toml | $(BIN)/python
	@echo "installing vauban into $(VENV) ..."
	@$(BIN)/python -m pip install --quiet --editable '.$(DOCS_EXTRAS)'
	@touch $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "vauban needs Python 3.11 or newer; this is %d.%d: make PYTHON=python3.12 ..." % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)

clean:
	rm -rf $(VENV) $(VENV)-oldest site dist vauban-demo

# Needs Python 3.10+ and make; everything else goes into .venv (about 1.5 GB, most of it torch).
#
#   make demo       the main job on the bundled model: two lenses fitted, measured and drawn, a first patchscope
#   make test       all tests on the newest TransformerLens; ARGS="-k lens" picks some
#   make test-all   the tests on TransformerLens 2.18, 3.9 and 4.3, each in its own environment
#   make lint       ruff and pyright
#   make numbers    after a lab model has changed: every number that cites one, measured again
#   make clean      remove the environments
#
# On Linux the torch of PyPI brings CUDA (gigabytes). For the CPU build, name torch's CPU index, as its own installation
# page does: PIP_EXTRA_INDEX_URL=... make demo, and UV_TORCH_BACKEND=cpu for make test-all.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install -c constraints.txt
SESSIONS ?= tests-2.18 tests-3.9 tests-4.3
ARGS ?=
# Two processes: the models of the tests are too small for a second thread each.
WORKERS ?= 2

.PHONY: demo test test-all lint numbers clean

demo: $(VENV)/.installed-plot
	$(BIN)/tl-lenses demo

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n $(WORKERS) $(ARGS)

test-all: $(VENV)/.installed-dev
	$(BIN)/python -m nox --sessions $(SESSIONS) -- -n $(WORKERS) $(ARGS)

lint: $(VENV)/.installed-dev
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(BIN)/python -m pyright --pythonpath $(BIN)/python

numbers: $(VENV)/.installed-dev
	$(BIN)/python tools/lab_numbers.py $(ARGS)

clean:
	rm -rf $(VENV) .nox

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || \
		{ echo "tl-lenses needs Python 3.10 or newer; '$(PYTHON)' is $$($(PYTHON) --version 2>&1 | tail -n 1): make PYTHON=python3.12 ..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# Torch first and by itself, so that nothing that follows picks another one.
$(VENV)/.installed-plot: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) torch
	@echo "installing tl-lenses and what it needs (a minute or two)"
	@$(PIP) -q -e ".[plot]"
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed-plot
	@echo "installing what the tests need"
	@$(PIP) -q -e ".[plot,detect,experiments,dev]"
	@touch $@

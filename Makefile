# Each target makes what it needs: a virtual environment of its own, then the packages.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c requirements.txt

.PHONY: demo test lint bench clean

demo: $(VENV)/.base
	$(BIN)/python -m launch.demo

test: $(VENV)/.test
	$(BIN)/python -m pytest

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.test
	$(BIN)/python -m launch.benchmark --suite=decode_step

clean:
	rm -rf $(VENV) build *.egg-info demo_output bench_output

$(VENV)/.base: setup.py requirements.txt
	$(PYTHON) -m venv $(VENV) || python3 -m venv $(VENV)
	$(INSTALL) -e .
	touch $@

$(VENV)/.test: $(VENV)/.base
	$(INSTALL) -e .[test]
	touch $@

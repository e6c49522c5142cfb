# Each target makes what it needs: a virtual environment of its own, then the packages.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
# Modules are compiled when they are first imported: most of what is installed never is.
INSTALL := $(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check -c requirements.txt
# Compilers for GPUs and TPUs, which need no such device, in an environment of their own.
AOT_VENV := .venv-aot

.PHONY: demo test test-slow test-aot lint bench clean

demo: $(VENV)/.base
	$(BIN)/python -m launch.demo

test: $(VENV)/.test
	$(BIN)/python -m pytest -n 2 -m "not slow" --ignore=tests/aot

test-slow: $(VENV)/.test
	$(BIN)/python -m pytest -n 2 --dist worksteal -s -m slow --ignore=tests/aot

test-aot:
	$(MAKE) VENV=$(AOT_VENV) $(AOT_VENV)/.aot
	PYTHONPATH=tests $(AOT_VENV)/bin/python -m pytest -n 2 --noconftest -p aot.dumping tests/aot

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.test
	-$(INSTALL) --no-build-isolation -e .[bench]
	$(BIN)/python -m launch.benchmark --suite=decode --rounds=3
	$(BIN)/python -m launch.benchmark --suite=evaluate --rounds=3
	$(BIN)/python -m launch.benchmark --suite=decode_step
	$(BIN)/python -m launch.benchmark --suite=kernels
	$(BIN)/python -m launch.benchmark --suite=train
	$(BIN)/python -m launch.benchmark --suite=convert --rounds=3
	$(BIN)/python -m launch.benchmark --suite=restore --rounds=3
	$(BIN)/python -m launch.benchmark --suite=serve --rounds=3

clean:
	rm -rf $(VENV) $(AOT_VENV) build *.egg-info demo_output bench_output glm_jax/kernels/*/*.so convert/*.so

$(VENV)/.base: setup.py requirements.txt $(wildcard glm_jax/kernels/*.h glm_jax/kernels/*/cpu* convert/*.cc)
	$(PYTHON) -m venv $(VENV) || python3 -m venv $(VENV)
	$(INSTALL) jaxlib setuptools
	$(INSTALL) --no-build-isolation -e .
	touch $@

$(VENV)/.test: $(VENV)/.base
	$(INSTALL) --no-build-isolation -e .[test]
	touch $@

$(VENV)/.aot: $(VENV)/.base
	$(INSTALL) --no-build-isolation -e .[aot]
	touch $@

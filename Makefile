# `run`, `test` and `lint` do their own set-up; a second call finds the stamp and starts at once.
PYTHON ?= python3
ACCELERATOR := $(shell nvidia-smi -L >/dev/null 2>&1 && echo cuda || echo cpu)
STAMP := .venv/.installed-$(ACCELERATOR)
MADE := .venv/.made-by-make
comma := ,

# An environment that already holds a CUDA torch is used as it is, with nothing installed into
# it: the active one (or PYTHON=...), else a .venv that this file did not make.
ifeq ($(ACCELERATOR),cuda)
AS_IS := $(shell for p in $(PYTHON) $(if $(wildcard $(MADE)),,.venv/bin/python); do \
	$$p -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null \
	&& echo $$p && break; done)
endif

PY := $(or $(AS_IS),.venv/bin/python)

# On a GPU the tests share one device and measure its memory, so they run one at a time.
WORKERS := $(if $(filter cpu,$(ACCELERATOR)),-n auto --maxprocesses 4)
EXTRAS := dev$(comma)serve$(comma)eval$(comma)ray$(if $(filter cuda,$(ACCELERATOR)),$(comma)cuda)

.PHONY: help venv run test lint
help: ## this list
	@sed -n 's/^\([a-z]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST)

venv: $(if $(AS_IS),,$(STAMP)) ## set up .venv with pinned versions
	@$(if $(AS_IS),echo "using $(PY) as it is: it holds a CUDA torch",:)

run: venv ## answer held-out word problems with every prefill replayed from breakable graphs
	$(PY) -m breakgraph run --model-path examples/arithmetic/qwen3 \
		--questions examples/arithmetic/test.jsonl --compare-eager --enable-breakable-cuda-graph

test: venv ## all tests; ARGS="-k name" passes options on
	$(PY) -m pytest -q $(WORKERS) $(ARGS)

lint: venv ## ruff and mypy
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

$(MADE):
	test -x .venv/bin/pip || $(PYTHON) -m venv .venv
	touch $@

$(STAMP): $(MADE) pyproject.toml $(wildcard constraints/*.txt)
	.venv/bin/python -m pip install -c constraints/$(ACCELERATOR).txt -e '.[$(EXTRAS)]'
	touch $@

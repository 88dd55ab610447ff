# Fivefold. `make help` explains every target; every target sets the environment up first if it must.
SHELL   := /bin/bash
.DEFAULT_GOAL := help

PROFILE ?= small
SEEDS   ?=
JOBS    ?=
TRAINER ?= cpu
MODEL   ?=
INSTEAD ?=
RERUN   ?=
SPACE   ?=
TRIALS  ?=
WORKERS ?=
STORAGE ?=
DATA_ROOT ?=

VENV := .venv
BIN  := $(VENV)/bin
STAMP := $(VENV)/.installed
FIVEFOLD := $(BIN)/fivefold
FLAGS := --profile $(PROFILE) $(if $(SEEDS),--seeds $(SEEDS)) $(if $(JOBS),--jobs $(JOBS))
RUN_FLAGS = $(FLAGS) --trainer $(TRAINER) $(if $(MODEL),--model $(MODEL)) $(if $(INSTEAD),--instead $(INSTEAD)) $(if $(RERUN),$(if $(filter stale,$(RERUN)),--rerun-stale,$(error RERUN is 'stale' or nothing)))

SWEEP_FLAGS = --profile $(PROFILE) --trainer $(TRAINER) $(if $(SPACE),--space $(SPACE)) $(if $(TRIALS),--trials $(TRIALS)) $(if $(WORKERS),--workers $(WORKERS))

ifneq ($(strip $(DATA_ROOT)),)
export DATA_ROOT
endif
ifneq ($(strip $(STORAGE)),)
export FIVEFOLD_STORAGE := $(STORAGE)
endif

.PHONY: help setup test lint report ui sweep-ui bench data clean reproduce-all

help: ## Say what each target does
	@echo "Fivefold: five papers' ablations, reproduced with verdicts."
	@echo
	@awk -F ':.*## ' '/^[a-zA-Z_%N-]+:.*## / {printf "  make %-20s %s\n", $$1, $$2}' $(MAKEFILE_LIST) | sed 's/-%/-N/'
	@echo
	@echo "Variables (make TARGET NAME=value):"
	@echo "  PROFILE=smoke|small|gpu|paper  how much is run (default small: real data, at most 20 minutes on 2 cores; gpu: paper 1"
	@echo "                              on one 80 GB GPU; paper: as published or nearest, paper 1 for eight of those)"
	@echo "  SEEDS=n                     seeds per cell instead of the profile's"
	@echo "  JOBS=n                      cells at once, one thread each (default: one per core; one on GPUs)"
	@echo "  TRAINER=cpu|gpu|ddp|fsdp    where cells run: on cores (default), on one GPU, or each on all GPUs of this machine, which"
	@echo "                              hold the net whole (ddp) or divide it (fsdp); both for paper 1; fsdp_cpu: two cores"
	@echo "  MODEL=name                  another size of net than the profile's, a file of conf/model/PAPER, such as gpt_2b (paper 1);"
	@echo "                              its results go to a folder of their own under runs/"
	@echo "  INSTEAD=other=name          data set NAME in the place of the paper's OTHER, such as faces=lfw (paper 2); its results go to"
	@echo "                              a folder of their own under runs/"
	@echo "  RERUN=stale                 run cells again whose code or settings have changed since"
	@echo "  SPACE=name                  the search space of a sweep, a file of sweeps/spaces/PAPER; TRIALS=n in all, WORKERS=n at once"
	@echo "  STORAGE=url                 where studies lie: sqlite:///FILE (default runs/optuna.db), postgresql://..., journal:FILE"
	@echo "  DATA_ROOT=folder            where data sets already lie or are to be put (default .data)"
	@echo
	@echo "Papers (N): 1 MoE upcycling, 2 face deblurring, 3 tropical CNNs, 4 Min-Max-Plus nets, 5 Auto-MAP."

setup: $(STAMP) ## Make the environment .venv from requirements.lock (quick when nothing changed)

$(STAMP): requirements.lock pyproject.toml .ci/setup.sh
	@bash .ci/setup.sh $(VENV)
	@touch $@

PYTEST_ARGS ?= -n auto --dist loadfile

test: $(STAMP) ## Run the tests, a process on each core
	$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: $(STAMP) ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

plan-paper-%: $(STAMP) ## Show what reproduce-paper-N would do: done, stale, failed, to do, cost and ETA
	@$(FIVEFOLD) plan $* $(RUN_FLAGS)

reproduce-paper-%: $(STAMP) ## Run what paper N's claims need, then write its tables, figures and verdicts
	@$(FIVEFOLD) reproduce $* $(RUN_FLAGS)

reproduce-all: $(STAMP) ## The same for every paper that exists
	@$(FIVEFOLD) reproduce all $(RUN_FLAGS)

sweep-paper-%: $(STAMP) ## Optuna sweep over SPACE of paper N, then its winner on fresh seeds and a report; no SPACE lists them
	@$(FIVEFOLD) sweep $* $(SWEEP_FLAGS)

sweep-ui: $(STAMP) ## Serve optuna-dashboard over the studies on this machine only
	@$(FIVEFOLD) sweep-ui

report: $(STAMP) ## Write results/ again from the finished runs
	@$(FIVEFOLD) report $(FLAGS)

ui: $(STAMP) ## Serve the MLflow UI over runs/mlflow.db on this machine only
	@$(FIVEFOLD) ui

bench: $(STAMP) ## Speed and memory of the kernels, as ratios against named peers
	@$(FIVEFOLD) bench

data: $(STAMP) ## Fetch and check every data set
	@$(FIVEFOLD) data

clean: ## Remove caches and the environment; keeps runs/, results/ and data
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

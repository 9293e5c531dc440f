# nano-functiongemma.  `make help` lists the targets; everything sets itself up in .venv first.
# With PYTHON=python3 (or any interpreter that has the packages) nothing is installed.

PYTHON ?= .venv/bin/python
MODEL  ?= build/demo/model
DATA   ?= build/demo/rows.jsonl
DEMO   := $(filter build/demo/model,$(MODEL))
OUT    ?= runs/$(if $(DEMO),demo,$(notdir $(patsubst %/,%,$(MODEL))))
SHARED := ../shared
export REAL_MODEL ?= $(HOME)/.cache/nano-functiongemma/gemma-3-270m

# The demo trains a small model from nothing: every parameter, a high learning rate, many small steps.
DEMO_FLAGS := --full --dtype fp32 --device cpu --lr 4e-3 --beta2 0.98 --batch-rows 8 --steps 2200 --eval-fraction 0.02 \
              --eval-rows 200 --eval-calls 200 --eval-every 550 --save-every 550 --log-every 100

.DEFAULT_GOAL := help
.PHONY: help setup setup-dev test test-all test-slow test-gpu check-kernels faults lint finetune report bench gpu clean

help:                    ## this list
	@awk -F '##' '/^[a-z-]+:.*##/ { split($$0, name, ":"); printf "  make %-13s %s\n", name[1], $$2 }' Makefile

setup: $(if $(filter .venv/bin/python,$(PYTHON)),.venv/ready)       ## .venv with what training needs

.venv/ready: requirements.txt
	@python3 -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; this is " + sys.version)'
	python3 -m venv .venv
	.venv/bin/python -m pip install --quiet -r requirements.txt
	@touch $@

setup-dev: setup $(if $(filter .venv/bin/python,$(PYTHON)),.venv/ready-dev)      ## … and what tests and benchmarks need

.venv/ready-dev: requirements-dev.txt .venv/ready
	.venv/bin/python -m pip install --quiet -r requirements-dev.txt
	@touch $@

finetune: setup          ## train: the embedded demo, or MODEL=name-or-folder DATA=name-or-file [OUT=…] [FLAGS="…"]
	$(if $(DEMO),$(PYTHON) examples/demo.py build/demo)
	$(PYTHON) train.py --model $(MODEL) --data $(DATA) --out $(OUT) $(if $(DEMO),$(DEMO_FLAGS) --overwrite) $(FLAGS)

report: setup            ## a run's report.html: make report OUT=runs/mine; or rows': make report DATA=rows.jsonl MODEL=… → OUT/data.html
	$(PYTHON) $(if $(filter file,$(origin DATA)),evaluate.py --report $(OUT),train.py --model $(MODEL) --data $(DATA) --survey --out $(OUT) $(FLAGS))

# Tests run in a process per core where pytest-xdist is there, each with one thread.
PARALLEL = $$($(PYTHON) -c 'import xdist' 2>/dev/null && echo '-n auto --dist worksteal')

test: setup-dev real-model lint      ## the tests, but for the slow ones
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -m "not slow" $(PARALLEL)

test-all: test test-slow             ## every test, and the compile gate

test-slow: setup-dev real-model check-kernels
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -m slow $(PARALLEL)

test-gpu: setup-dev      ## the tests that need a CUDA device; most of the time goes into compiling, by 12 processes where pytest-xdist is there
	$(PYTHON) -m pytest -m gpu $$($(PYTHON) -c 'import xdist' 2>/dev/null && echo '-n 12 --dist worksteal')

check-kernels: setup-dev ## compile every kernel for sm_80 and sm_90, no GPU needed: registers, spills, tensor cores
	$(PYTHON) tests/check_kernels.py

faults: setup-dev        ## break runs in every way we know and compare what came of it; JSON in benchmarks/results
	$(PYTHON) tests/faults.py --save && $(PYTHON) benchmarks/tables.py

lint: setup-dev          ## ruff
	$(PYTHON) -m ruff check .

bench: setup-dev         ## side by side with the peer on a CPU; JSON in benchmarks/results
	$(PYTHON) benchmarks/cpu_vs_peft.py --save

# It installs nothing: .venv where it is, or else python3.
GPU_PYTHON = $(if $(filter .venv/bin/python,$(PYTHON)),$(or $(wildcard .venv/bin/python),python3),$(PYTHON))
gpu:                     ## every figure of a GPU, in nine minutes; JSON in benchmarks/results/gpu
	$(GPU_PYTHON) benchmarks/gpu.py $(FLAGS)

# Real weights for the tests that compare with them. Built once, where the means are there; without them those tests skip.
.PHONY: real-model
real-model:
	@if [ -e "$(REAL_MODEL)/config.json" ]; then :; \
	elif [ -x $(SHARED)/real_model/build ]; then \
		echo "building real weights in $(REAL_MODEL) (one minute)"; rm -rf "$(REAL_MODEL).part"; \
		python3 $(SHARED)/real_model/build "$(REAL_MODEL).part" && mv "$(REAL_MODEL).part" "$(REAL_MODEL)" || \
		echo "*** NO REAL WEIGHTS: building them failed; the tests that need them are SKIPPED ***"; \
	else echo "*** no real weights in $(REAL_MODEL): the tests that need them are skipped ***"; fi

clean:                   ## remove what was built: .venv, build, runs
	rm -rf .venv build runs

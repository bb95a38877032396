# make demo and make test do everything on a fresh machine: both make .venv first if it is not there.
PYTHON ?= python3
VENV   := .venv
PY     := $(VENV)/bin/python
METHOD ?= fada
SEEDS  ?= 0 1 2
NAME   ?= toy
JOBS   ?= 1
ARGS   ?= --toy

help:                     ## show this list
	@grep -E '^[a-z]+:.*##' Makefile | sed -E 's/:[^#]*## */\t/' | expand -t 12

setup: $(VENV)/ready      ## make .venv with the five packages and the tools for tests

$(VENV)/ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --upgrade pip
	$(PY) -m pip install --quiet torch torchvision numpy pillow scipy pytest pytest-xdist ruff matplotlib tensorboard scikit-image scikit-learn cityscapesscripts
	touch $@

demo: setup               ## toy city, FADA end to end in minutes: table and pictures
	$(PY) fada.py --toy --tag demo $(DEMO)

DEMO = --source-iterations 200 --adversarial-iterations 200 --distill-iterations 100

test: setup lint          ## lint, then all tests
	$(PY) -m pytest -n 2 --dist loadfile

soak: setup               ## hours: 200 kills, 40 of torchrun, 5,000 damaged files, a leak over 2,000 iterations
	$(PY) -m pytest --soak tests/test_faults.py tests/test_distributed.py tests/test_fuzz.py

lint: setup               ## style
	$(PY) -m ruff check .

bench: setup              ## speed, as ratios measured side by side in one run
	$(PY) tests/bench.py

results: setup            ## METHOD=fada, or pair: all runs of docs/results.md [SEEDS="0 1 2"] [NAME=i2c ARGS="--data PATH --init PATH"]
	$(PY) -m common.results $(METHOD) --seeds $(SEEDS) --name $(NAME) --jobs $(JOBS) -- $(ARGS)

page: setup               ## the tables of docs/results.md again [RUNS="runs/*-i2c-*": with these run folders]
	$(PY) -m common.page $(RUNS)

clean:                    ## remove .venv, runs and the toy city
	rm -rf $(VENV) runs data/toycity .ruff_cache
	find . -name __pycache__ -prune -exec rm -rf {} +

.PHONY: help setup demo test soak lint bench results page clean

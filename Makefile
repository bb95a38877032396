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

setup: $(VENV)/ready      ## make .venv with the five packages; builds of torch that are there already stay

$(VENV)/ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install "torch>=2.11" "torchvision>=0.26" numpy pillow "scipy>=1.15"
	touch $@

$(VENV)/ready-for-tests: $(VENV)/ready
	$(PY) -m pip install pytest pytest-xdist ruff matplotlib tensorboard scikit-image scikit-learn cityscapesscripts
	touch $@

demo: setup               ## toy city, FADA's first two stages in minutes: table, pictures, what was gained
	$(PY) fada.py --toy --tag demo --no-distill $(DEMO)
	@$(PY) -c "$$GAINED"

DEMO = --source-iterations 180 --adversarial-iterations 240 --test-scales 1.0

define GAINED
import json
stages = json.load(open("runs/fada-gta5-demo/results.json"))
before, after = (100 * stages[stage]["single-scale"]["mIoU present"] for stage in ("source", "adversarial"))
print(f"\nFADA's adversarial stage took the mIoU (present classes) on the unlabelled target from {before:.1f} to {after:.1f}.")
print("Pictures: runs/fada-gta5-demo/source.png and adversarial.png.")
print("Next: your own data (README.md), or make results METHOD=fada: three seeds, against a control of equal length.")
endef
export GAINED

test: $(VENV)/ready-for-tests lint          ## style, then all tests
	$(PY) -m pytest -n 2 --dist loadfile

soak: $(VENV)/ready-for-tests               ## hours: 200 kills, 40 of torchrun, 5,000 damaged files, a leak over 2,000 iterations
	$(PY) -m pytest --soak tests/test_faults.py tests/test_distributed.py tests/test_fuzz.py

lint: $(VENV)/ready-for-tests               ## style
	$(PY) -m ruff check .

bench: $(VENV)/ready-for-tests              ## speed, as ratios measured side by side in one run
	$(PY) tests/bench.py

results: setup            ## METHOD=fada, or pair: all runs of docs/results.md [SEEDS="0 1 2"] [NAME=i2c ARGS="--data PATH --init PATH"]
	$(PY) -m common.results $(METHOD) --seeds $(SEEDS) --name $(NAME) --jobs $(JOBS) -- $(ARGS)

page: $(VENV)/ready-for-tests               ## the tables of docs/results.md again [RUNS="runs/*-i2c-*": with these run folders]
	$(PY) -m common.page $(RUNS)

clean:                    ## remove .venv and the toy city; runs/ stays
	rm -rf $(VENV) data/toycity .ruff_cache
	find . -name __pycache__ -prune -exec rm -rf {} +

.PHONY: help setup demo test soak lint bench results page clean

# demo, test, test-full, torture, lint, reference, clean. Needs Python 3.11 or newer, make and a package index.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
# Of torch and transformers a few hundred modules are ever imported, and compiled then.
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile \
	--constraint constraints.txt

# The demo has a queue server and a job store of its own, so it disturbs nobody's jobs, and the
# matrix that one demo leaves behind is what the next one starts from.
DEMO := demo-out
DEMO_ENV := env -u TRBATCH_REDIS_URL -u REDIS_URL -u TRBATCH_STORE TRBATCH_HOME=$(CURDIR)/$(DEMO)/home
DEMO_FLAGS ?=

# What tests and their many processes compile serves the next ones, whatever the environment says.
export PYTHONDONTWRITEBYTECODE :=

# ONLY_LONG=1 leaves out what `make test` and `make torture` have just run; PYTEST_FLAGS go to pytest as they are.
PYTEST := $(BIN)/python -m pytest $(PYTEST_FLAGS)
REPORTS := build/reports

.DEFAULT_GOAL := help
.PHONY: help demo test test-full torture lint reference clean

help:
	@echo "make demo       sample prompts through the queue and a real model to a Parquet file"
	@echo "make test       the quick tests (up to 10 minutes)"
	@echo "make test-full  all tests (up to 60 minutes)"
	@echo "make torture    kill, stop and cut off workers for SECONDS=60 (with SEED=1), then the long tests"
	@echo "                of outages, recovery, broken inputs and a million rows; nothing may be lost"
	@echo "make lint       ruff, ruff format --check, mypy"
	@echo "make reference  docs/reference.md and docs/api.md from the program's own help and docstrings"
	@echo "make clean      remove the virtual environment, caches and demo output"

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "error: $(PYTHON) is older than Python 3.11" >&2; \
		     echo "hint: make PYTHON=/path/to/python3.11 …" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)

# A stamp says that its extras are installed as pyproject.toml and constraints.txt have them now.
$(VENV)/worker.stamp: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing trbatch and what a worker needs into $(VENV) (once) …"
	@$(PIP_INSTALL) --editable '.[worker]'
	@touch $@

$(VENV)/all.stamp: $(VENV)/worker.stamp
	@echo "installing what tests and checks need into $(VENV) (once) …"
	@$(PIP_INSTALL) --editable '.[worker,test,lint]'
	@touch $@

demo: $(VENV)/worker.stamp
	@mkdir -p $(DEMO)
	@trap '$(DEMO_ENV) $(BIN)/trbatch server stop >/dev/null 2>&1 || true' EXIT; \
	$(DEMO_ENV) $(BIN)/trbatch run jobs/sample_prompts.jsonl --output $(DEMO)/answers.parquet \
		--name demo-$$(date +%Y%m%d-%H%M%S) --task demo --max-tokens 96 $(DEMO_FLAGS)

# Several at a time, each with one thread for torch: most tests wait for processes, so one more than
# there are cores, and threads of two processes would wait for each other. Long ones compute more. What
# measures time or memory has the machine alone.
FILES := OMP_NUM_THREADS=1 $(PYTEST) -n 3 --dist loadfile
TESTS := OMP_NUM_THREADS=1 $(PYTEST) -n 2 --dist worksteal
NO_TORTURE := $(if $(ONLY_LONG), and not torture)
marked = $(shell grep -l 'pytest.mark.$(1)\>' tests/test_*.py) # the files of such tests: others take time, too

test: $(VENV)/all.stamp
	$(FILES) -m "not long" --junitxml=$(REPORTS)/test.xml

test-full: $(if $(ONLY_LONG),,test) $(VENV)/all.stamp
	$(TESTS) -m "long and not alone$(NO_TORTURE)" --junitxml=$(REPORTS)/test-full.xml $(call marked,long)
	$(PYTEST) -m "long and alone$(NO_TORTURE)" --junitxml=$(REPORTS)/test-alone.xml $(call marked,alone)

SECONDS ?= 60
SEED ?= 1

torture: $(VENV)/all.stamp
	$(BIN)/python tests/torture.py --seconds $(SECONDS) --seed $(SEED)
	$(TESTS) -m "torture and not alone" --junitxml=$(REPORTS)/torture.xml $(call marked,torture)
	$(PYTEST) -m "torture and alone" --junitxml=$(REPORTS)/torture-alone.xml $(call marked,torture)

lint: $(VENV)/all.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

reference: $(VENV)/worker.stamp
	$(BIN)/python docs/make_reference.py

clean:
	rm -rf $(VENV) $(DEMO) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

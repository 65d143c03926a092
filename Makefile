# Needs Python 3.11 or newer and make; everything else is installed into .venv, which no command needs activated.

PYTHON ?= python3
TORCH ?= 2.13.0
PYTEST_ARGS ?= -n 2
# Threads that wait without spinning: on a machine with busy neighbours spinning makes torch ten times slower.
export OMP_WAIT_POLICY ?= passive
BIN := .venv/bin
STAMP := .venv/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all lint check docs wheel bench lock clean

help:  ## Show this list.
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{ printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(STAMP)  ## Create .venv with the tested versions of every dependency.

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "curvkit needs Python 3.11 or newer, and $(PYTHON) is not. Name one that is: make setup PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv .venv
	$(PIP) install --quiet --upgrade pip
	$(PIP) install --quiet -c constraints.txt -e '.[all,dev]'
	@# BackPACK asks for torchvision and works without it; beside a CPU build of torch it cannot be imported.
	$(PIP) uninstall --quiet -y torchvision
	@touch $@

demo: $(STAMP)  ## Train a small network into demo-run/ and print how sharp it is.
	@# Without final.pt, what lies in demo-run/ is a demo that was interrupted: it starts again.
	@test -e demo-run/final.pt || { rm -f demo-run/step-*.pt; $(BIN)/curvkit demo demo-run; }
	$(BIN)/curvkit sharpness demo-run/final.pt

test: $(STAMP)  ## Run the tests without the slow ones (two processes; PYTEST_ARGS='-n 4' for four).
	$(BIN)/python -m pytest -m "not slow and not gpu" $(PYTEST_ARGS)

test-all: $(STAMP)  ## Run every test that needs no GPU.
	$(BIN)/python -m pytest -m "not gpu" $(PYTEST_ARGS)

lint: $(STAMP)  ## Check style, format and types.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

check: lint test  ## What a change must pass: lint, then test.

docs: $(STAMP)  ## Build the documentation into site/.
	$(BIN)/mkdocs build --strict

wheel: $(STAMP)  ## Build the source distribution and the wheel into dist/.
	rm -rf build dist
	$(BIN)/python -m build --no-isolation

bench: $(STAMP)  ## Run every script of benchmarks/.
	@set -e; for script in benchmarks/*.py; do echo "== $$script"; $(BIN)/python "$$script"; done

lock:  ## Write constraints.txt anew, from the newest versions that go with the torch of TORCH.
	rm -rf build/lock
	$(PYTHON) -m venv build/lock
	build/lock/bin/python -m pip install --quiet --upgrade pip
	build/lock/bin/python -m pip install --quiet torch==$(TORCH) '.[all,dev]'
	sed -n '/^#/p' constraints.txt > build/constraints.txt
	build/lock/bin/python -m pip freeze --all > build/frozen.txt
	grep -v -e '^pip==' -e '^curvkit ' build/frozen.txt | sed 's/+cpu$$//' >> build/constraints.txt
	mv build/constraints.txt constraints.txt
	rm -rf build/lock build/frozen.txt

clean:  ## Remove what was built, but not .venv and demo-run/.
	rm -rf build dist site *.egg-info .pytest_cache .ruff_cache .hypothesis
	find curvkit cli tests examples benchmarks -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true

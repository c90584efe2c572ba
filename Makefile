# Everything starts here: each target makes its own environment in .venv first.
# The stamp is keyed on what the environment is made from, so a second run costs nothing.
SHELL := /bin/bash
VENV := .venv
BIN := $(VENV)/bin
KEY := $(shell cat pyproject.toml constraints.txt infra/env/setup.sh | cksum | tr ' ' '-')
READY := $(VENV)/.ready-$(KEY)
OUT ?= demo
# A file of tests stays in one process, with what its tests share; the longest files come first.
SIDE_BY_SIDE := -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: help setup demo test test-unit lint format lock clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

setup: $(READY)  ## make .venv with the pinned packages, and the `animator` command in it

$(READY):
	@bash infra/env/setup.sh $(VENV)
	@rm -f $(VENV)/.ready-*
	@touch $@

demo: $(READY)  ## the whole chain on built-in material; ends with $(OUT)/report.html
	@$(BIN)/animator demo --out $(OUT)

test: $(READY)  ## all tests (real clips too when ANIMATOR_TEST_DATA names their folder)
	@$(BIN)/python -m pytest -q $(SIDE_BY_SIDE)

test-unit: $(READY)  ## the tests of single modules only
	@$(BIN)/python -m pytest -q $(SIDE_BY_SIDE) tests/unit

lint: $(READY)  ## ruff, ruff format, pyright: the three that pre-commit runs too
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/pyright --pythonpath $(BIN)/python

format: $(READY)  ## let ruff mend what it can
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

lock: $(READY)  ## write what .venv holds to constraints.txt
	@{ head -1 constraints.txt; $(BIN)/pip freeze --exclude-editable 2>/dev/null | grep -v '^#' \
	  | sed -E 's/\+(cpu|cu[0-9]+)$$//'; } > constraints.txt.new && mv constraints.txt.new constraints.txt

clean:  ## remove what the tools and the demo leave behind
	@rm -rf $(OUT) .pytest_cache .ruff_cache build dist *.egg-info

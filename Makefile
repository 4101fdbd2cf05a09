# `make demo` and `make test` do all of their own set-up: a virtual environment in .venv with pinned versions.

SHELL := /bin/bash
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
CPU_TORCH := https://download.pytorch.org/whl/cpu
USABLE := import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))

.PHONY: help demo test lint types unit format lesson constraints clean

help:
	@echo "make demo         draw pictures for a few prompts with the checkpoint that ships"
	@echo "make test         lint, types and all tests"
	@echo "make format       format and fix the code"
	@echo "make lesson       run docs/lesson.py and keep it, with its pictures, as docs/lesson.ipynb"
	@echo "make constraints  pin the newest versions that install and pass"
	@echo "make clean        remove the virtual environment and caches"

demo: $(STAMP)
	$(BIN)/python sample.py --prompts docs/demo-prompts.txt --candidates 16 --keep 4 --seed 0 --out outputs/demo
	@echo "The ranked pictures: $(CURDIR)/outputs/demo/sheet.png"

test: lint types unit

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

# One thread a worker: two workers with a thread for each core would fight over the cores.
unit: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lesson: $(STAMP)
	$(BIN)/python docs/build_lesson.py

# The stamp is younger than pyproject.toml and constraints.txt where the environment holds what they ask for.
# Linux without an NVIDIA driver takes PyTorch's CPU build, a tenth of the size, where its index can be reached.
$(STAMP): pyproject.toml constraints.txt
	@set -e; found=; for python in $(or $(PYTHON),python3 python3.13 python3.12 python3.11); do \
		if "$$python" -c '$(USABLE)' 2>/dev/null; then found=$$python; break; fi; done; \
	if [ -z "$$found" ]; then \
		echo "Python 3.11 or newer with venv is needed; install it, or name it: make PYTHON=/path/to/python" >&2; \
		exit 1; fi; \
	echo "Installing into $(VENV) with $$($$found --version); this takes a minute or two, once."; \
	$$found -m venv --clear $(VENV)
	@set -e; index=; if [ "$$(uname -s)" = Linux ] && ! command -v nvidia-smi >/dev/null && \
		$(BIN)/python -c 'import urllib.request as r; r.urlopen("$(CPU_TORCH)/torch/", timeout=5)' 2>/dev/null; then \
		index="--extra-index-url $(CPU_TORCH)"; fi; \
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $$index -c constraints.txt -e '.[test]'
	@touch $(STAMP)

constraints:
	rm -rf $(VENV)
	$(or $(PYTHON),python3) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade --disable-pip-version-check -e '.[test]'
	(head -n 1 constraints.txt; $(BIN)/python -m pip freeze --exclude-editable | sed 's/+cpu$$//') > $(VENV)/constraints
	mv $(VENV)/constraints constraints.txt
	touch $(STAMP)
	$(MAKE) test

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache

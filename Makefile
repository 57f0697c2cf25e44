PYTHON ?= python3
VENV := .venv
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
export HF_HUB_OFFLINE := 1
DEMO_JSON ?=

.PHONY: demo up test check format install repro clean

demo: install
	fade demo $(if $(DEMO_JSON),--json $(DEMO_JSON))

up: install
	fade up

# A worker a file: each has a workspace and services of its own.
test: install
	pytest --numprocesses 2 --dist loadfile

check: install
	ruff format --check .
	ruff check .
	mypy
	lint-imports

format: install
	ruff format .
	ruff check --fix .

repro: install
	dvc repro

install: $(VENV)/installed

# torch first and by itself: a CPU build that pip is told of is then kept by all that follows.
$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet -c constraints.txt torch
	$(VENV)/bin/python -m pip install --quiet -c constraints.txt -e ".[pipeline,dev]"
	touch $@

clean:
	rm -rf $(VENV) .fade .pytest_cache .mypy_cache .ruff_cache

PYTHON ?= python3
VENV := .venv
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
export HF_HUB_OFFLINE := 1
DEMO_JSON ?=

.PHONY: demo up test test-all check format install lock repro clean docs dist sbom

demo: install
	fade demo $(if $(DEMO_JSON),--json $(DEMO_JSON))

up: install
	fade up

# A worker has a workspace and services of its own, shared by the files it runs; the longest files come first.
PYTEST := pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder --durations 15
test: install
	$(PYTEST) -m "not slow"

# With what is long by nature: kills, drills, clusters, schedules that must fire, each set and method to its end.
test-all: install
	$(PYTEST)

check: install
	ruff format --check .
	ruff check .
	mypy
	lint-imports

format: install
	ruff format .
	ruff check --fix .

# The lock file says what was made; the file beside it, on which kind of processor.
repro: install
	dvc repro
	python -m tasks.dvc.versioning --recorded-here

install: $(VENV)/installed

# Everything by its hash, build tools first, so that nothing that was not locked is run while it installs. torch comes
# last and by its version alone: which build it is (CPU, CUDA) is for pip's own configuration to say, and all that a CPU
# build needs is there by then.
$(VENV)/installed: pyproject.toml constraints.txt requirements-dev.lock requirements-build.lock
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --require-hashes --no-deps -r requirements-build.lock
	$(VENV)/bin/python -m pip install --quiet --require-hashes --no-deps --no-build-isolation -r requirements-dev.lock
	$(VENV)/bin/python -m pip install --quiet -c constraints.txt torch
	$(VENV)/bin/python -m pip install --quiet --no-deps --no-build-isolation -e .
	$(VENV)/bin/python -m pip check
	touch $@

# After a change of pyproject.toml or constraints.txt, with the oldest Python that is supported and a CPU build of torch:
# the hashes of all files of each version, from the index that pip is configured with; no address is written down.
LOCK := build/lock/bin/pip-compile --quiet --generate-hashes --unsafe-package torch --strip-extras --no-header \
	--no-annotate --no-emit-index-url --no-emit-find-links --no-emit-trusted-host -c constraints.txt
RUN_EXTRAS := --extra pipeline --extra postgresql --extra redis --extra s3 --extra auth
lock:
	$(PYTHON) -m venv build/lock
	build/lock/bin/python -m pip install --quiet pip-tools
	printf 'setuptools>=77\nwheel\n' | $(LOCK) -o requirements-build.lock -
	$(LOCK) $(RUN_EXTRAS) -o requirements.lock pyproject.toml
	$(LOCK) $(RUN_EXTRAS) --extra dev -o requirements-dev.lock pyproject.toml

docs: install
	pip install --quiet -c constraints.txt -e ".[docs]"
	mkdocs build --strict

# An sdist, the wheel from the sdist, and two environments without the sources at hand: the wheel with the pipeline, and
# the sdist with the library alone. FADE_ROOT is the project that a command works on.
dist: install
	rm -rf build/dist build/try build/try-core
	python -c "from setuptools import build_meta as b; b.build_sdist('build/dist')"
	pip wheel --quiet --no-deps --wheel-dir build/dist build/dist/*.tar.gz
	$(PYTHON) -m venv build/try
	build/try/bin/python -m pip install --quiet -c constraints.txt torch
	build/try/bin/python -m pip install --quiet -c constraints.txt "$$(ls build/dist/*.whl)[pipeline]"
	build/try/bin/python -m pip check
	cd build/try && FADE_ROOT=$(CURDIR) bin/fade doctor
	$(PYTHON) -m venv build/try-core
	build/try-core/bin/python -m pip install --quiet -c constraints.txt torch
	build/try-core/bin/python -m pip install --quiet -c constraints.txt build/dist/*.tar.gz
	build/try-core/bin/python -m pip check
	build/try-core/bin/python examples/erase_in_20_lines.py

# In an environment of their own, so that the tools are not in the list.
sbom: install
	$(PYTHON) -m venv build/tools
	build/tools/bin/python -m pip install --quiet pip-licenses cyclonedx-bom
	build/tools/bin/pip-licenses --python $(VENV)/bin/python --format markdown --with-urls --output-file build/licences.md
	build/tools/bin/cyclonedx-py environment --output-file build/sbom.json $(VENV)/bin/python

clean:
	rm -rf $(VENV) .fade .pytest_cache .mypy_cache .ruff_cache

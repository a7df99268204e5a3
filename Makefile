# Only Python (3.10 or newer) and make are assumed: each target first makes .venv and installs everything in it.
#   make quickstart        a first posterior, on the digits that come with scikit-learn
#   make test              lint, then every test
#   make bench             the speed and memory tables
#   make trust             first runs with the defaults on posteriors with known moments; takes hours
#   make uci               what sampling adds to deep ensembles on UCI sets (PYRO_ADVBAYES_DATA); takes hours
#   make mutants           breaks the code in known ways, and looks whether the tests notice
#   make fuzz              10 000 calls of what is public with edge values
#   make kill-test         kills runs at 100 random moments and resumes them
#   make attack-files      500 damaged files of every kind
#   make test-matrix       installs with the oldest and newest Python, PyTorch and Pyro, and tests each
#   make docs              the documentation, docs/_build/index.html
#   make lint              ruff, the layers of the package, types
# PYTHON=python3.12 chooses the Python that .venv is made with.

PYTHON ?= python3
VENV := .venv
INSTALLED := $(VENV)/.installed

# Two test processes share the cores; one thread each keeps them, and the numbers, apart.
# Tests that fork have processes to themselves.
test: export OMP_NUM_THREADS = 1

.PHONY: quickstart test bench trust uci mutants fuzz kill-test attack-files test-matrix docs lint

quickstart: $(INSTALLED)
	$(VENV)/bin/python tutorials/quickstart.py

test: lint
	$(VENV)/bin/python -m pytest -n 2 --dist worksteal -m forks
	$(VENV)/bin/python -m pytest -n 2 --dist worksteal --durations=15 -m "not forks"

bench: $(INSTALLED)
	$(VENV)/bin/python tests/benchmarks/run.py

trust: $(INSTALLED)
	$(VENV)/bin/python tests/benchmarks/trust.py

uci: $(INSTALLED)
	$(VENV)/bin/python tests/benchmarks/uci.py

mutants: $(INSTALLED)
	$(VENV)/bin/python tests/mutations/run.py

fuzz: $(INSTALLED)
	$(VENV)/bin/python tests/fuzz/fuzz.py

kill-test: $(INSTALLED)
	$(VENV)/bin/python tests/hostile/kill.py

attack-files: $(INSTALLED)
	$(VENV)/bin/python tests/hostile/attack.py

test-matrix:
	$(PYTHON) tests/matrix.py

docs: $(INSTALLED)
	$(VENV)/bin/python -m sphinx -W --keep-going -b html docs docs/_build

lint: $(INSTALLED)
	$(VENV)/bin/python -m ruff check .
	$(VENV)/bin/python -m ruff format --check .
	$(VENV)/bin/lint-imports --no-cache
	$(VENV)/bin/python -m mypy

$(INSTALLED): pyproject.toml requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --disable-pip-version-check -c requirements.txt -e ".[dev,docs,notebooks,bench]"
	touch $@

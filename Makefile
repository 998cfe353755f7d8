.PHONY: check format test slow sim

PYTHON ?= python

check:  ## format, lint, types, import contracts, fast tests
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m ruff check .
	$(PYTHON) -m mypy
	lint-imports
	$(PYTHON) -m pytest -q -m "not slow"

format:
	$(PYTHON) -m ruff format .
	$(PYTHON) -m ruff check --fix .

test:  ## everything, as CI runs it
	$(PYTHON) -m pytest

sim:  ## the default scenario
	$(PYTHON) run_sim.py

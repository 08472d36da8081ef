# Each sets up all it needs in .venv; a second run does not install again.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test test-all lint docs gpu clean

demo: $(STAMP)
	$(BIN)/ufom q --d2 0.02 --v2 0.9 -r 10 --outer paper
	$(BIN)/ufom measure digits-few-shot --outer tuned
	$(BIN)/ufom measure digits-hypercleaning --outer tuned
	$(BIN)/python -m studies optimal_q

test: $(STAMP)
	$(BIN)/python -m pytest -n auto --dist worksteal -m "not slow" $(PYTEST_ARGS)

test-all: $(STAMP)
	$(BIN)/python -m pytest -n auto --dist worksteal $(PYTEST_ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(VENV)/.docs
	mkdir -p docs/_build/extra
	$(BIN)/python -m sphinx -n -W --keep-going -q -b html docs docs/_build/html
	$(BIN)/python docs/check_links.py docs/_build/html

# On a machine with a GPU, by its own python and torch; nothing is installed. At most 8 minutes, and what was done is kept:
# the CUDA tests, then studies/results/gpu-standard.csv and .json, which `python -m studies draw` reads.
# `make gpu GPU_SIZE=quick` tries it out on a CPU.
GPU_SIZE ?= standard
gpu: export PYTHONPATH = .
gpu:
	-timeout 140 $(PYTHON) -m pytest -q -W default -p no:cacheprovider $$($(PYTHON) -c "import xdist" 2>/dev/null && echo "-n 4") tests/runtime/test_cuda.py
	timeout 340 $(PYTHON) -m studies run gpu --size $(GPU_SIZE) --executor local --jobs 1 --cell-minutes 1.5

$(VENV)/.docs: $(STAMP)
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[docs]'
	@touch $@

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "ufom needs Python 3.11 or newer; name one with: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@echo "setting up $(VENV): a minute or two, the first time only"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) docs/_build docs/examples build *.egg-info

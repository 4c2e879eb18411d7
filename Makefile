# make nano: set up and run the whole paper at nano size.  make test: set up and pass the tests.
# make reference: a fresh run of nano for outputs/reference/, and its figures in the READMEs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# without a GPU: make nano TORCH_INDEX=<address of the CPU wheels, from PyTorch's installation page>
TORCH_INDEX ?=

.PHONY: nano test lint lab reference
nano: $(VENV)/.ready
	$(BIN)/ttl run nano

# files side by side; `python -m pytest` alone runs them one after another
test: $(VENV)/.ready-test
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile

lint: $(VENV)/.ready-test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

reference: $(VENV)/.ready
	$(BIN)/python -m ttl_utils.reference

lab: $(VENV)/.ready
	$(BIN)/jupyter lab --notebook-dir=. notebooks/01_data.ipynb

$(VENV)/bin/python:
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'Python 3.11 or newer is needed: make PYTHON=python3.12 ...')"
	$(PYTHON) -m venv $(VENV)

# a marker per set of extras, made anew when the dependencies change
$(VENV)/.ready: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(if $(TORCH_INDEX),$(BIN)/python -m pip install --quiet --no-deps -c constraints.txt --index-url $(TORCH_INDEX) torch)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e .
	touch $@

$(VENV)/.ready-test: $(VENV)/.ready
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[test]"
	touch $@

PYTHON ?= python3
VENV ?= .venv
PIP_ARGS ?=

.PHONY: demo test lint clean

demo: $(VENV)/.installed  ## fine-tune the bundled model with LOOP: about 6 minutes on 2 CPU cores
	$(VENV)/bin/fastloop train configs/shapes_demo.yaml --resume

test: lint  ## what CI runs
	$(VENV)/bin/pytest

lint: $(VENV)/.installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

clean:  ## the virtual environment only; runs/ stays
	rm -rf $(VENV)

$(VENV)/.installed: setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c constraints.txt -e ".[test]"
	touch $@

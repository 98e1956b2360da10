PYTHON ?= python3
VENV ?= .venv
PIP_ARGS ?=
PIP = $(VENV)/bin/pip install --quiet --disable-pip-version-check
PYTORCH_CPU = https://download.pytorch.org/whl/cpu

.PHONY: demo test lint clean

demo: $(VENV)/.installed  ## fine-tune the bundled model with LOOP: about 8 minutes on 2 CPU cores
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
# without a GPU PyTorch's own build for CPUs, some gigabytes smaller; where that index is out of reach, pip's
	@command -v nvidia-smi >/dev/null || $(PIP) --retries 0 --timeout 10 --no-deps -c constraints.txt torch \
		--index-url $(PYTORCH_CPU) 2>/dev/null || true
	$(PIP) $(PIP_ARGS) -c constraints.txt -e ".[test]"
	touch $@

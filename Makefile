PYTHON ?= python3
VENV ?= .venv
PIP_ARGS ?=
PIP = $(VENV)/bin/pip install --quiet --disable-pip-version-check
PYTORCH_CPU = https://download.pytorch.org/whl/cpu

.PHONY: demo test lint bench clean

demo: $(VENV)/.installed  ## fine-tune the bundled model: about 8 minutes on 2 CPU cores
	$(VENV)/bin/fastloop train configs/shapes_demo.yaml --resume

test: lint  ## what CI runs
	$(VENV)/bin/pytest -n 2 --dist loadfile --no-loadscope-reorder

lint: $(VENV)/.installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

bench: $(VENV)/.installed  ## the quick benchmarks, compared with the committed ratios: under 15 minutes on 2 CPU cores
	$(VENV)/bin/pytest bench/test_loop.py --durations=0 --benchmark-max-time=0.2 --benchmark-columns=median,iqr,rounds
	$(VENV)/bin/python bench/kernel_table.py --quick
	$(VENV)/bin/python bench/throughput.py --systems baseline,reference,fastloop,trl --repeats 3 --out runs/bench \
		$(if $(PEER),--peer-python $(PEER))
	$(VENV)/bin/python bench/regression.py runs/bench

clean:  ## the virtual environment only; runs/ stays
	rm -rf $(VENV)

$(VENV)/.installed: setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
# without a GPU PyTorch's own build for CPUs, some gigabytes smaller; where that index is out of reach, pip's
	@command -v nvidia-smi >/dev/null || $(PIP) --retries 0 --timeout 10 --no-deps -c constraints.txt torch \
		--index-url $(PYTORCH_CPU) 2>/dev/null || true
	$(PIP) $(PIP_ARGS) -c constraints.txt -e ".[test]"
	touch $@

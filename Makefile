# On a fresh machine with Python >= 3.10, pip and make, each target first sets up the environment in .venv.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

.PHONY: demo test lint bench fuzz clean

demo: $(READY)
	$(BIN)/python examples/quickstart.py

# two processes of one thread each: small tests gain nothing from threads
test: $(READY)
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(READY)
	$(BIN)/python tests/benchmarks/norms.py
	$(BIN)/python tests/benchmarks/clip.py
	$(BIN)/python tests/benchmarks/training.py

# attacks every promise: `make fuzz MINUTES=60`
MINUTES ?= 10
fuzz: $(READY)
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python tests/fuzz.py --minutes $(MINUTES) --processes 2

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache

$(READY): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -e ".[all,test]"
	touch $@

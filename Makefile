# On a fresh machine with Python >= 3.10, pip and make, each target first sets up the environment in .venv.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
# an environment of its own at the lower bounds of pyproject.toml, for which Python must be 3.10 to 3.12
OLDEST := .venv-oldest

.PHONY: demo test test-oldest lint bench fuzz clean

demo: $(READY)
	$(BIN)/python examples/quickstart.py

# two processes of one thread each: small tests gain nothing from threads
test: $(READY)
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

test-oldest: $(OLDEST)/.ready
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest -n 2 --dist worksteal

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
	rm -rf $(VENV) $(OLDEST) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache

$(READY): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -e ".[all,test]"
	touch $@

# Lightning 2.3 asks setuptools for pkg_resources, which newer ones have no more
$(OLDEST)/.ready: pyproject.toml tests/oldest.txt
	test -x $(OLDEST)/bin/python || $(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install -c tests/oldest.txt setuptools -e ".[all,test]"
	touch $@

# make demo and make test need Python 3.11 or newer and nothing else; they make .venv and install into it.
PYTHON ?= python3
BIN := .venv/bin
BASE := .venv/installed-base
INSTALLED := .venv/installed

.PHONY: demo test test-lowest lint bench compatibility clean

demo: $(BASE)
	$(BIN)/python scripts/demo.py

test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadgroup

# The core on the lowest supported transformers, PEFT and TRL, in an environment of its own.
test-lowest:
	$(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/python -m pip install --quiet --constraint constraints-lowest.txt torch
	.venv-lowest/bin/python -m pip install --quiet --constraint constraints-lowest.txt --editable '.[dev]'
	OMP_NUM_THREADS=1 .venv-lowest/bin/python -m pytest -n 2 tests/models/test_golden.py tests/tuner/test_model.py tests/tuner/test_state.py \
		tests/hf/test_decoder.py tests/hf/test_cache.py tests/training/test_trainer.py tests/data/test_resume.py \
		tests/checkpoints/test_golden.py tests/checkpoints/test_standalone.py tests/models/test_standalone.py

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(INSTALLED)
	$(BIN)/python benchmarks/train_step.py
	$(BIN)/python benchmarks/decode.py

compatibility: $(INSTALLED)
	$(BIN)/python scripts/compatibility.py

$(BASE): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	touch $@

$(INSTALLED): $(BASE)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[deepspeed,quantization,serving,evaluation,dev]'
	touch $@

clean:
	rm -rf .venv runs

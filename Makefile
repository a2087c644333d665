# Two commands matter: `make demo` and `make test`. Each sets up all it needs, once.
PYTHON ?= python3
SEED ?= 0
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
RUN := $(if $(filter 0,$(SEED)),runs/demo,runs/demo-$(SEED))
PACKAGES := -c .ci/constraints.txt -e .[demo,test,lint,pack,hub,lora,energy,card,mteb,codes,interop,onnx,search,postgresql,serve,bench,browser]

.PHONY: demo test test-all lint format docs setup clean

demo: $(READY)  ## the corpus, the training, the report; SEED=7 draws another split and another start
	@PATH="$(CURDIR)/$(BIN):$$PATH" sh data/demo.sh "$(SEED)" "$(RUN)"

test: $(READY)  ## the default tests
	$(BIN)/python -m pytest -q -n 2 --dist loadfile -m "not slow and not gpu"

test-all: $(READY)  ## the slow ones too
	$(BIN)/python -m pytest -q -m "not gpu"

lint: $(READY)  ## style, layout, types
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/basedpyright

format: $(READY)
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .

docs: $(READY)  ## docs/config.md, from the dataclasses
	$(BIN)/python docs/make_config.py

setup: $(READY)

# uv is some six times faster than pip here; where it cannot be had or fails, pip does the same.
$(READY): pyproject.toml .ci/constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "multimodal_fm needs Python 3.11 or newer: make PYTHON=/path/to/python3.11"; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Setting up $(VENV), once: torch and its CUDA libraries take about 6 GB of disk ..."
	@$(BIN)/python -m pip install -q --disable-pip-version-check uv >/dev/null 2>&1; \
	  UV_SYSTEM_CERTS=1 $(BIN)/uv pip install -q --compile-bytecode --python $(BIN)/python $(PACKAGES) || \
	  $(BIN)/python -m pip install -q --disable-pip-version-check $(PACKAGES)
	@touch $@

clean:
	rm -rf $(VENV) runs

# Every verb sets up what it needs. CI calls lint and test unchanged.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The embedded model is many small operations: more threads only wait for each other.
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM := false

.PHONY: help setup demo serve bundle test test-fast test-all test-lowest lint format bench bench-results embedded \
	ablation ablation-rl docs-performance docs-licences gpu-check clean

help:  ## list the verbs
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-17s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(VENV)/.done  ## create .venv with the pinned versions

$(VENV)/.done: constraints.txt setup.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check torch==2.13.0
	$(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check -c constraints.txt -e '.[distill,evaluate,onnx,kernels,bench,race,rtx,serve,ray,test]'
	touch $@

demo: setup  ## stream 6 seconds of the embedded model to out/demo.mp4
	@mkdir -p out
	$(BIN)/python -m engine.run --prompt "a red circle moving right slowly on a gray background" \
		--prompt-at 3.0s "a blue square moving right slowly on a white background" --seconds 6 --seed 1 --scale 8 --out out/demo.mp4

serve: setup  ## stream the embedded model to a live page, http://localhost:8000/; PORT=N
	$(BIN)/python -m serve --open --port $(or $(PORT),8000)

# One process per core, at most 4. A file's tests stay in one process, because they share fixtures. tests/conftest.py
# puts the longest files first.
PYTEST := $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

# An older bundle lends the graphs that would come out the same. It is replaced once the new one is whole.
bundle: setup  ## compile the embedded model for C++ to out/sprites.bundle: 3 minutes on an idle core, needs g++; seconds the next time
	@mkdir -p out
	@command -v $(or $(CXX),g++) >/dev/null || { echo "bundle: got no $(or $(CXX),g++), expected a C++ compiler" >&2; exit 2; }
	@echo "compiling 10 graphs: about 3 minutes of processor time, one line each"
	@rm -rf out/new.bundle
	$(BIN)/python -m export --backend aoti --out out/new.bundle $(if $(wildcard out/sprites.bundle),--reuse out/sprites.bundle)
	@rm -rf out/sprites.bundle && mv out/new.bundle out/sprites.bundle

test: setup  ## run the tests, every feature: about half an hour on two cores, less when compiled artefacts are there
	$(PYTEST) -m "not thorough" --durations=25

test-fast: setup  ## run the tests that take no more than two seconds each: about 2 minutes
	$(PYTEST) -m "not thorough and not slow"

test-all: setup  ## run all tests: also a Ray cluster, the wheel in a clean environment, sanitizers, fuzzing
	$(PYTEST) --durations=25

# Torch stays as it is: its older releases were not run.
LOWEST := out/lowest
LOWEST_TESTS := tests/engine/model tests/engine/media tests/engine/weights/test_lora.py tests/engine/test_checkpoint.py \
	tests/serve/web tests/serve/webrtc
LOWEST_EXPORTS := $(addprefix tests/export/test_export.py::,test_streams_agree_with_torch test_every_graph_equals_its_module)
test-lowest: setup  ## run tests of loading, adapters, export, media and serving with the lowest versions that setup.py allows
	@mkdir -p out
	$(BIN)/python tests/installing/declared.py bench distill gguf heic onnx serve test > $(LOWEST).txt
	$(PYTHON) -m venv --clear $(LOWEST)
	$(LOWEST)/bin/python -m pip install --quiet --no-compile --disable-pip-version-check torch==2.13.0 -r $(LOWEST).txt
	$(LOWEST)/bin/python -m pytest -n auto --maxprocesses 4 --dist loadfile -m "not thorough and not slow" $(LOWEST_TESTS)
	$(LOWEST)/bin/python -m pytest $(LOWEST_EXPORTS)

lint: setup  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup  ## rewrite the sources in the project's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: setup  ## check against the recorded cases, then time the parts; `python -m bench diff OLD NEW` compares
	@mkdir -p out/bench
	$(BIN)/python -m bench parity --cases tests/data/causal
	$(BIN)/python -m pytest bench/micro --benchmark-json=out/bench/micro.json
	$(BIN)/python -m bench scaling --chunks 400

bench-results: setup  ## measure everything on this machine into bench/results and docs/performance.md
	$(BIN)/python -m bench all --save

docs-performance: setup  ## docs/performance.md from bench/results
	$(BIN)/python -m bench report

docs-licences: setup  ## docs/licences.md from the packages in .venv
	$(BIN)/python tests/installing/licences.py

# A GPU machine often has its own torch and no network: .venv where there is one, else its python.
gpu-check:  ## on a machine with a GPU: right, how fast, where the time goes, in 9 minutes; STEPS=a,b; elsewhere tiny
	@py=$$([ -x $(BIN)/python ] && echo $(BIN)/python || echo $(PYTHON)); \
	$$py -m bench gpu-check $$($$py -c "import torch; print('' if torch.cuda.is_available() else '--smoke')")

clean:  ## remove what was built
	rm -rf $(VENV) out build *.egg-info .pytest_cache

# Long trainings, stage by stage. A stage that is done has left .done in its folder; one that was stopped goes on from
# its checkpoint. What it prints is also in log.txt there. With -j 2 stages that do not wait for each other run together.

CONFIGS := distill/configs

# $(call stage,folder,stage,config,folders that it reads)
define stage
$(1)/.done: SHELL := /bin/bash
$(1)/.done: $(addsuffix /.done,$(4)) | setup
	@mkdir -p $(1)
	set -o pipefail; $(BIN)/python -m distill $(2) --config $(CONFIGS)/$(3).toml --out $(1) 2>&1 | tee -a $(1)/log.txt
	@touch $$@
endef

# The embedded model from nothing.
$(eval $(call stage,runs/vae,train_vae,sprites))
$(eval $(call stage,runs/bank,latents,sprites,runs/vae))
$(eval $(call stage,runs/teacher,teacher,sprites,runs/bank))

$(eval $(call stage,runs/rich/vae,train_vae,scenes,runs/vae))
$(eval $(call stage,runs/rich/bank,latents,scenes,runs/rich/vae))
$(eval $(call stage,runs/rich/teacher,teacher,scenes,runs/teacher runs/rich/bank))
$(eval $(call stage,runs/rich/student,next_chunk,scenes,runs/rich/teacher))

$(eval $(call stage,runs/switches/vae,train_vae,switches,runs/rich/vae))
$(eval $(call stage,runs/switches/bank,latents,switches,runs/rich/vae))
$(eval $(call stage,runs/switches/student,next_chunk,switches,runs/rich/student runs/switches/bank))
$(eval $(call stage,runs/unified,next_chunk,unified,runs/switches/student))
$(eval $(call stage,runs/following,next_chunk,following,runs/unified))

embedded: runs/following/.done runs/switches/vae/.done  ## train the embedded model from nothing to out/sprites: hours; goes on where it was stopped
	$(BIN)/python -m distill assemble --teacher runs/rich/teacher/teacher --vae runs/switches/vae/vae \
		--student runs/following/student.pt --out out/sprites
	$(BIN)/python -m distill tiny_decoder --config $(CONFIGS)/tiny.toml --out runs/tiny_decoder
	cp -r runs/tiny_decoder/tiny_vae out/sprites/
	$(BIN)/python -m distill evaluate --model out/sprites --prompts 64 --seed 20
	$(BIN)/python -m distill evaluate --model out/sprites --prompts 32 --seed 20 --switch
	$(BIN)/python -m distill following --model out/sprites

# The experiments start from the embedded model as it is.
$(eval $(call stage,runs/experiments/bank,latents,rl))

ablation: runs/experiments/bank/.done  ## train and score students by training by steps; goes on where it was stopped; JOBS=2
	$(BIN)/python -m distill ablation --config $(CONFIGS)/ablation.toml --out runs/experiments/ablation --jobs $(or $(JOBS),1)

ablation-rl: runs/experiments/bank/.done  ## what RL and distribution matching gain where a student has room
	$(BIN)/python -m distill ablation --config $(CONFIGS)/rl.toml --out runs/experiments/rl --results docs/results/rl --jobs $(or $(JOBS),1)

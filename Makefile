# Every job by name. `make` alone lists them.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

# A word is what is typed behind a job, WORD=text. It is text, and passes through the environment as "$$WORD": neither make nor
# a shell looks into it. What the environment holds under such a name is not meant; a word that no job asked for has is told.
TYPED := $(foreach word,$(.VARIABLES),$(if $(filter command,$(origin $(word))),$(word)))
$(foreach word,$(TYPED),$(eval override $(word) := $$(value $(word))))
export TYPED $(TYPED)
H := \#
KNOWN := $(shell awk -F ':.*$H$H ' '/^[a-z][a-z-]*:.*$H$H / {while (match($$2, /[A-Z][A-Z0-9_]*=/)) {print $$1 ":" substr($$2, RSTART, RLENGTH - 1); $$2 = substr($$2, RSTART + RLENGTH)}}' Makefile)
words_of = $(patsubst $(1):%,%,$(filter $(1):%,$(KNOWN)))
EVERY := $(call words_of,setup) PYTHON UV VENV PY RUNNER OMP_NUM_THREADS TOKENIZERS_PARALLELISM
ASKED := $(or $(MAKECMDGOALS),help)
OF_ASKED := $(foreach job,$(ASKED),$(call words_of,$(job)))
$(foreach word,$(if $(SWEEP_PLAN),,$(firstword $(filter-out $(EVERY) $(OF_ASKED),$(TYPED)))),$(error make $(ASKED) has no word $(word); it has: $(or $(OF_ASKED),none)))
$(foreach word,$(filter-out TORCH_INDEX PYTHON UV VENV PY RUNNER OMP_NUM_THREADS TOKENIZERS_PARALLELISM $(TYPED),SWEEP_PLAN SHARE $(sort $(foreach pair,$(KNOWN),$(lastword $(subst :, ,$(pair)))))),$(eval override $(word) :=))

PYTHON ?= python3
UV ?= uv
VENV := .venv
PY := $(VENV)/bin/python
READY := $(VENV)/.ready
RUNNER := $(PY) notebooks/experiment.py

space := $() $()
ifeq ($(words $(RUN)),1)  # the name alone, where a shell completed it to the folder
override RUN := $(patsubst %/,%,$(patsubst runs/%,%,$(RUN)))
endif
# $(call give,WORD,NAME): the parameter that a word names. PARAMS is a file of them; P takes any other, as papermill flags.
give = $(if $($(1)),-p $(2) "$$$(1)")
NAMED = $(strip $(if $(RUN),--run "$$RUN") $(call give,MODEL,model_name) $(call give,DATASET,dataset_name) $(call give,LAYER,layer) $(call give,HOOK,hook) $(call give,SEED,seed))
OTHERS = $(strip $(if $(PARAMS),-f "$$PARAMS") $(if $(P),--words "$$P"))
FLAGS = $(NAMED) $(OTHERS)

# Half of the logical cores, shared among the jobs of make -j: torch's own default, all of them, collapses
# as soon as anything else runs. What LAUNCH starts on other machines has what it is bound to there.
CORES := $(shell nproc 2>/dev/null || sysctl -n hw.ncpu)
JOBS = $(or $(patsubst -j%,%,$(filter-out -j,$(filter -j%,$(MFLAGS)))),1)
among = $(shell n=$$(( ($(CORES) + 1) / 2 / $(1) )); echo $$(( n > 0 ? n : 1 )))
ifeq ($(LAUNCH),)
export OMP_NUM_THREADS ?= $(call among,$(JOBS))
endif
export TOKENIZERS_PARALLELISM ?= false
export IPYTHONDIR := $(CURDIR)/$(VENV)/ipython

# $(call tests,ENVIRONMENT,WHICH): two files side by side, with one thread each, the longest first. Every file is
# named, since pytest 8.0 takes `FILE FOLDER` for the file alone.
TESTS := tests/test_notebooks.py $(filter-out tests/test_notebooks.py,$(wildcard tests/test_*.py))
define tests
	@$(1)/bin/python -c 'import torch, transformers, datasets; print(f"torch {torch.__version__}, transformers {transformers.__version__}, datasets {datasets.__version__}")'
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(1)/bin/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder $(2)
endef

.PHONY: help
help: ## list the jobs
	@awk -F ':.*## ' '/^[a-z][a-z-]*:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# $(call environment,FOLDER,FILE,PIP FLAGS): an environment in FOLDER with the packages of FILE. torch comes first where
# TORCH_INDEX says from where, so that no GPU package is pulled on a machine that asks for CPU wheels.
define environment
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"Error: Python 3.11 or later is needed, this is {sys.version.split()[0]}: make setup PYTHON=python3.12")'
	test -x $(1)/bin/python || $(PYTHON) -m venv $(1)
	$(if $(TORCH_INDEX),$(1)/bin/python -m pip install --quiet --index-url "$$TORCH_INDEX" $$(grep '^torch==' requirements.txt))
	$(1)/bin/python -m pip install --quiet $(3) --requirement $(2)
	@pwd > "$$($(1)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/sae_utils.pth"
	@mkdir -p "$$IPYTHONDIR/profile_default"
	@echo 'c.IPKernelApp.log_level = 40  # no warning about the transport of a local kernel' > "$$IPYTHONDIR/profile_default/ipython_kernel_config.py"
endef

NEWEST := --upgrade --upgrade-strategy eager
.PHONY: always
$(READY): requirements.txt requirements.lock $(if $(LATEST),always)
	$(call environment,$(VENV),$(if $(LATEST),requirements.txt,requirements.lock),$(if $(LATEST),$(NEWEST)))
	@if [ -d .git ]; then \
	  git config filter.nbstripout.clean 'sh -c "if [ -x $(VENV)/bin/nbstripout ]; then $(VENV)/bin/nbstripout --keep-id; else cat; fi"'; \
	  git config filter.nbstripout.smudge cat; fi
	@touch $@

.PHONY: setup lock
setup: $(READY) ## make the environment, from requirements.lock (LATEST=1: the newest packages that requirements.txt allows; without a GPU: TORCH_INDEX=<PyTorch's index of CPU wheels>)

# For all platforms and Python 3.11 to 3.13. What CUDA builds of torch need they ask for themselves.
lock: ## write requirements.lock anew from requirements.txt (needs uv)
	$(UV) pip compile --quiet --universal --python-version 3.11 --no-annotate --no-header requirements.txt --output-file .lock.new > /dev/null
	{ echo '# Every package at the version that was tested; `make lock` writes it from requirements.txt.'; grep -vE '^(nvidia|cuda|triton)[-=]' .lock.new; } > .lock.whole
	mv .lock.whole requirements.lock && rm .lock.new

.PHONY: lab
lab: $(READY) ## open the notebooks in Jupyter, with runs/ and params/ in reach
	$(VENV)/bin/jupyter lab --ServerApp.root_dir=. --LabApp.default_url=/lab/tree/notebooks/sae_training.ipynb

.PHONY: tiny-model
tiny-model: $(READY) ## build the embedded tiny model and its text, where they are not there yet
	@test -f runs/tiny-model/config.json -a -f runs/tiny-world/corpus.jsonl || $(RUNNER) tiny_model

.PHONY: demo
demo: tiny-model ## tiny model -> SAE -> report -> patched generation, in a few minutes
	$(RUNNER) sae_training -f params/tiny.yaml -p run_dir runs/demo
	$(RUNNER) patch_neurons -f params/patch-tiny.yaml -p run_dir runs/demo
	@$(PY) -c 'import json; print("\n" + json.load(open("runs/demo/metrics.json"))["finding"]); print(json.load(open("runs/demo/patches/demo/patching.json"))["finding"])'
	@echo "report               runs/demo/report.pdf"
	@echo "patched generation   runs/demo/patches/demo/patching.html"
	@echo "executed notebooks   runs/demo/sae_training.ipynb, runs/demo/patches/demo/patch_neurons.ipynb"
	@echo "metrics              runs/demo/metrics.json, runs/demo/patches/demo/patching.json"

.PHONY: check
check: $(READY) ## whether a model will do, before its weights are fetched: MODEL=id-or-folder LAYER=n [DATASET=] [HOOK=] [PARAMS=file] [P=]
	$(RUNNER) check $(FLAGS)

.PHONY: train
train: $(READY) ## train an SAE: LAYER=6 [PARAMS=file] [MODEL=] [DATASET=] [HOOK=] [SEED=] [RUN=] [P="-p name value"]
	$(RUNNER) sae_training $(FLAGS)

# An SAE that is trained already is looked at first, on 200,000 rows of text, as a run named after it.
LOOK = "$$SAE" -p n_activations 200000 $(NAMED)
EDIT = $(call give,LATENTS,latents) $(OTHERS)
.PHONY: features patch
features: $(READY) ## look at an SAE from elsewhere as at one's own: SAE=path or hub id [MODEL=] [DATASET=] [LAYER=] [HOOK=] [SEED=] [RUN=] [PARAMS=file] [P=]
	$(if $(SAE),,$(error say which SAE: make features SAE=path))$(RUNNER) features $(LOOK) $(OTHERS)

patch: $(READY) ## edit latents of a finished run: RUN=name [LATENTS="17 23"] [PARAMS=file] [P="-p name value"]; or of SAE=path [MODEL=] [DATASET=] [LAYER=] [HOOK=], which `make features` looks at first
	$(if $(RUN)$(SAE),,$(error say which run to patch: make patch RUN=name))$(if $(SAE),,$(if $(MODEL)$(DATASET)$(LAYER)$(HOOK),$(error a run has its model, text and layer: MODEL, DATASET, LAYER and HOOK go with SAE=)))
	$(RUNNER) $(if $(SAE),patch $(LOOK) -- ,patch_neurons $(NAMED) )$(EDIT)

.PHONY: labels
labels: $(READY) ## put the names in a run's labels.csv on its features.html: RUN=name
	$(if $(RUN),,$(error say which run: make labels RUN=name))$(RUNNER) labels "runs/$$RUN"

.PHONY: look
look: $(READY) ## which latents fire on a sentence of yours: RUN=name TEXT="…"
	$(if $(and $(RUN),$(TEXT)),,$(error say which run, and a sentence: make look RUN=name TEXT="a sentence"))$(RUNNER) look "runs/$$RUN" "$$TEXT"

.PHONY: export
export: $(READY) ## write a run's SAE for other tools: RUN=name FORMAT=saelens (or safetensors, neuronpedia) [OUT=folder]
	$(if $(RUN),,$(error say which run: make export RUN=name FORMAT=saelens))$(RUNNER) export "runs/$$RUN" $(if $(FORMAT),"$$FORMAT",'') $(if $(OUT),"$$OUT")

.PHONY: publish
publish: $(READY) ## push a run's SAE to the Hugging Face hub with a model card: RUN=name REPO=user/name [FORMAT=safetensors] [PRIVATE=0] [DRY_RUN=1: only runs/<name>/export/publish]
	$(if $(and $(RUN),$(REPO)),,$(error say which run and where to: make publish RUN=name REPO=user/name))$(RUNNER) publish "runs/$$RUN" "$$REPO" $(if $(FORMAT),"$$FORMAT",saelens) \
	  $(if $(filter-out 0,$(DRY_RUN)),dry) $(if $(filter 0,$(PRIVATE)),public)

.PHONY: activations
activations: $(READY) ## harvest several layers in one pass: LAYERS="2 6 10" [PARAMS=file] [MODEL=] [DATASET=] [HOOK=] [P=]
	$(RUNNER) activations $(if $(LAYERS),"$$LAYERS",6) $(FLAGS)

# A sweep: `experiment.py cells` writes its cells as a makefile, with their flags and the harvest that each waits for;
# then make runs what is not there yet, and a table follows, of failures too.
comma := ,
axis = $(if $(2),$(1)=$(subst $(space),$(comma),$(strip $(2))))
export WHOLE_GRID = $(strip $(call axis,layer,$(LAYERS)) $(call axis,l1_coeff,$(L1S)) $(GRID) $(call axis,seed,$(SEEDS)))
PLANNED = $(findstring n,$(firstword -$(MAKEFLAGS)))
.PHONY: sweep cells
sweep: $(READY) ## train at every point of GRID="layer=2,6 k=16,32 seed=0,1" (-j4: four at once, -k: past failures) [LAYERS=] [L1S=] [SEEDS=] [LAYER=] [SEED=] [MODEL=] [DATASET=] [HOOK=] [PARAMS=] [P=] [SWEEP=name] [LAUNCH="srun -c 8": each in another machine's hands]
	@plan=$$(mktemp); trap 'rm -f "$$plan"' EXIT; $(RUNNER) cells "$$WHOLE_GRID" $(if $(SWEEP),"$$SWEEP",sweep) $(FLAGS) > "$$plan"; \
	  status=0; $(MAKE) --no-print-directory SWEEP_PLAN="$$plan" $(if $(filter file,$(origin OMP_NUM_THREADS)),SHARE=1) cells || status=$$?; $(if $(PLANNED),,$(RUNNER) table "$$plan";) exit $$status

ifneq ($(SWEEP_PLAN),)
include $(subst $(space),\ ,$(SWEEP_PLAN))
# $(call named,NAME): each line that comes out begins with the name; an interrupt leaves the last ones to be read.
named = 2>&1 | { trap '' INT; while IFS= read -r line || [ -n "$$line" ]; do printf '%s: %s\n' '$(1)' "$$line"; done; }
.PHONY: $(ROWS)
cells: $(CELLS)
$(CELLS):
	@$(LAUNCH) $(RUNNER) sae_training $(SETTINGS) $(call named,$(notdir $(@D)))
# One pass for all layers, before the cells and so with the threads of all. Exit 2 is a mistake in one of them, which its own cells meet again.
$(if $(SHARE),$(ROWS): export OMP_NUM_THREADS = $(call among,$(words $(ROWS))))
$(ROWS):
	@{ $(LAUNCH) $(RUNNER) activations '$(AT)' $(SETTINGS) || test $$? -eq 2; } $(call named,$@)
endif

.PHONY: compare runs remove
compare: $(READY) ## finished runs side by side, into runs/compare/: [RUNS="pattern"] [SORT=fvu] [AXES="layer k"] [FIGURE=fvu] [P=]
	$(RUNNER) compare_runs $(call give,RUNS,runs) $(call give,SORT,sort) $(call give,AXES,axes) $(call give,FIGURE,figure) $(OTHERS)

runs: $(READY) ## a table of all runs: [RUNS="pattern"]
	@$(RUNNER) runs $(if $(RUNS),"$$RUNS")

remove: $(READY) ## throw a run away, after a question: RUN=name [YES=1: without it]
	$(if $(RUN),,$(error say which run: make remove RUN=name))@$(RUNNER) remove "$$RUN" $(if $(filter 1,$(YES)),yes)

.PHONY: tensorboard
tensorboard: $(READY) ## watch all runs
	$(VENV)/bin/tensorboard --logdir runs

.PHONY: test test-latest test-oldest
test: $(READY) ## all tests, the notebooks on the tiny model included
	$(call tests,$(VENV),$(TESTS))

# Canaries: the newest and the oldest packages that requirements.txt allows, each in an environment of its own.
# Tests that check our arithmetic once more, or a kill at another moment, tell nothing about a package.
test-latest: ## the tests with the newest packages that requirements.txt allows
	$(call environment,.venv-latest,requirements.txt,$(NEWEST))
	$(call tests,.venv-latest,-m "not repeats" $(TESTS))

test-oldest: ## the tests with the oldest packages that requirements.txt allows
	sed -n 's/>=\([0-9.]*\),.*/==\1/p; /^torch==/p' requirements.txt > .oldest.txt
	$(call environment,.venv-oldest,.oldest.txt)
	rm .oldest.txt
	$(call tests,.venv-oldest,-m "not repeats" $(TESTS))

.PHONY: test-browser
test-browser: tiny-model ## in headless chromium: all that a run's features.html does [RUN=demo], and Run All of both notebooks in JupyterLab [SHOTS=folder, for pictures]
	$(PY) tests/browser.py $(if $(RUN),"runs/$$RUN/features.html",runs/demo/features.html)
	SHOTS=$(if $(SHOTS),"$$SHOTS") $(PY) tests/lab.py

.PHONY: smoke
smoke: $(READY) ## only the notebooks, on a smaller world, in two minutes
	HF_HUB_OFFLINE=1 $(PY) -m pytest -q tests/smoke.py

.PHONY: test-real
test-real: $(READY) ## what matters on a real model, in some minutes: MODEL=path LAYER=n [DATASET=]
	$(if $(and $(MODEL),$(LAYER)),,$(error say which: make test-real MODEL=path LAYER=n))HF_HUB_OFFLINE=1 DATASET=$(if $(DATASET),"$$DATASET") $(PY) -m pytest -q tests/real.py

.PHONY: test-faults
test-faults: $(READY) ## a day of faults in ten minutes: kills, full disks (as root), damaged files, two at once, bad inputs; prints what was survived
	$(PY) tests/faults.py

.PHONY: test-slurm
test-slurm: $(READY) ## a sweep through srun, on a Slurm of one node started for it (as root, where slurm-wlm and munge are installed)
	$(PY) -m pytest -q -s -rs tests/slurm.py

# The referees' own environment: torch as pinned, then they; torchvision's build need not match torch's, and nothing here uses it.
.PHONY: test-interop
test-interop: tiny-model ## files of sae-lens, dictionary-learning and eai-sparsify read here, ours read there, and SAELens's figures beside ours: [RUN=name, a run with normalize: scale]
	$(if $(RUN),,$(RUNNER) sae_training -f params/tiny.yaml -p normalize scale -p n_activations 100000 -p epochs 2 -p run_dir runs/interop)
	@test -x .venv-interop/bin/python || { $(PYTHON) -m venv .venv-interop && .venv-interop/bin/pip install --quiet $$(grep '^torch==' requirements.txt); }
	.venv-interop/bin/pip install --quiet $$(grep '^torch==' requirements.txt) sae-lens==6.54.12 dictionary-learning eai-sparsify pytest
	.venv-interop/bin/pip install --quiet --no-deps sae-dashboard
	.venv-interop/bin/pip uninstall --quiet --yes torchvision
	RUN=$(if $(RUN),"$$RUN",interop) .venv-interop/bin/python -m pytest -q tests/interop.py

.PHONY: bench bench-peers
bench-peers: ## the same training step in SAELens and dictionary_learning, in an environment of its own [PART=peers-run MODEL= DATASET= LAYER=: harvest and cross-entropies; PART=peers-pages RUN=: SAEDashboard's pages]
	@test -x .venv-peers/bin/python || { $(PYTHON) -m venv .venv-peers && .venv-peers/bin/pip install --quiet $$(grep '^torch==' requirements.txt); }
	.venv-peers/bin/pip install --quiet $$(grep '^torch==' requirements.txt) sae-lens dictionary-learning matplotlib
	.venv-peers/bin/pip install --quiet --no-deps sae-dashboard dataclasses-json 'marshmallow<4' typing-inspect mypy-extensions eindex-callum  # what it pins would take others' versions back
	.venv-peers/bin/pip uninstall --quiet --yes torchvision  # its build need not match torch's, and nothing here uses it
	TQDM_DISABLE=1 .venv-peers/bin/python $(if $(filter peers-run peers-pages,$(PART)),$(BENCH),tests/bench.py peers)

BENCH = tests/bench.py $(if $(PART),"$$PART") $(if $(MODEL),--model "$$MODEL") $(if $(DATASET),--text "$$DATASET") $(if $(LAYER),--layer "$$LAYER") $(if $(RUN),--run "runs/$$RUN")
bench: $(READY) ## ratios against other ways of doing the same, into runs/bench.json: [PART=harvest; PART=run MODEL= DATASET= LAYER= P=: a whole run, stage by stage]
	$(PY) $(BENCH) $(if $(filter run,$(PART)),$(if $(P),$$P))

.PHONY: clean
clean: ## delete what can be rebuilt: stored activations, the tiny model, Python's caches
	rm -rf runs/activations runs/tiny-model runs/tiny-world .pytest_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

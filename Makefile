# make reproduce   every table and figure of a profile; PROFILE=smoke|quick|shares|full, DATA=phantoms or a dataset folder
# make test        every notebook and test
# make redraw      tables and figures from committed runs under results/, nothing is trained
PROFILE ?= quick
DATA    ?= phantoms
RUNS    ?= runs
FIGURES ?= figures
PYTHON  ?= python3
README  ?= README.md
CORES   ?= $(shell nproc 2>/dev/null || sysctl -n hw.ncpu)

BIN     := .venv/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)
export PYTHONWARNINGS ?= ignore
SNAKEMAKE = snakemake --nolock --rerun-incomplete --rerun-triggers mtime --quiet all --cores $(CORES)

.PHONY: help install reproduce redraw results test readme clean

help:
	@sed -n 's/^# //p' Makefile | head -3

install: .venv/.installed

.venv/.installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet -e ".[dev]"
	touch $@

reproduce: install
	@mlds-plan begin $(PROFILE) "$(DATA)" $(RUNS) $(FIGURES)
	@$(SNAKEMAKE) --config profile=$(PROFILE) data="$(DATA)" runs=$(RUNS) figures=$(FIGURES) \
	  || { echo "Stopped. What is finished is kept: the same command goes on. Logs: $(RUNS)/plans/*/*.log"; exit 1; }
	@mlds-plan end $(PROFILE) "$(DATA)" $(RUNS) $(FIGURES)

# Where `make results` puts finished runs to be committed, and `make redraw` finds them.
COMMITTED = results/$(PROFILE)$(addprefix -,$(notdir $(filter-out phantoms,$(DATA))))

redraw: install
	@for n in $$(mlds-plan results $(PROFILE) "$(DATA)"); do \
	  papermill --no-progress-bar --log-level ERROR -k python3 nbs/experiments/$$n.ipynb $(or $(TMPDIR),/tmp)/mlds-$$n.ipynb \
	    -p profile $(PROFILE) -p data "$(DATA)" -p runs $(COMMITTED) -p figures $(FIGURES) || exit 1; done
	@mlds-plan end $(PROFILE) "$(DATA)" $(COMMITTED) $(FIGURES)

# Copies the small files of a profile's finished runs to results/, to be committed.
results: install
	@mlds-plan collect $(PROFILE) "$(DATA)" $(RUNS)

# The experiments' notebooks need runs, so tests/test_experiments.py runs them. One thread for each worker.
test: install
	@OMP_NUM_THREADS=1 nbdev-test nbs --n-workers 2 --skip-folder-re '^([_.]|experiments$$)'
	@OMP_NUM_THREADS=1 pytest -q

# The text and code of nbs/index.ipynb, without outputs and hidden cells.
readme: install
	@python .ci/readme.py $(README)

clean:
	rm -rf runs .snakemake

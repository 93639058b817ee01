# make reproduce   every table and figure of a profile; PROFILE=smoke|quick|evidence|shares|full, DATA=phantoms or a dataset folder
#                  with CONTINUE=1 runs whose numbers stand in results/ are not done again
# make test        every notebook and test
# make redraw      tables and figures from the committed results, nothing is trained
# make compare     this machine's results against the committed ones
# make status      what is stale of a profile's committed results, and because of which input
# make docs        the notebooks as a site, _docs/index.html
# make lab         the notebooks in JupyterLab
PROFILE ?= quick
DATA    ?= phantoms
RUNS    ?= runs
FIGURES ?= figures
PYTHON  ?= python3
README  ?= README.md
FLAGS   ?=                   # more for Snakemake; with --keep-going a run that fails stops its own job alone
CORES   ?= $(shell nproc 2>/dev/null || sysctl -n hw.ncpu)

CONTINUE ?=
COMMITTED := $(if $(CONTINUE),results)

BIN     := .venv/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)
export PYTHONWARNINGS ?= ignore
SNAKEMAKE = snakemake --nolock --rerun-incomplete --rerun-triggers mtime --quiet all --cores $(CORES) $(FLAGS)

.PHONY: help install reproduce redraw results compare test docs lab lock readme numbers status bundle release clean

help:
	@sed -n 's/^# //p' Makefile | head -8

install: .venv/.installed

.venv/.installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet -e ".[dev]"
	touch $@

reproduce: install
	@mlds-plan status $(PROFILE) "$(DATA)" "$(RUNS)" "$(FIGURES)" $(COMMITTED)
	@$(SNAKEMAKE) --config profile=$(PROFILE) data="$(DATA)" runs="$(RUNS)" $(COMMITTED:%=committed=%) \
	  || { echo "Stopped. What is finished is kept: the same command goes on. Logs: $(RUNS)/logs/"; exit 1; }
	@mlds-plan report $(PROFILE) "$(DATA)" "$(RUNS)" "$(FIGURES)"

# Tables and figures from the committed results; nothing is trained, no data is needed.
redraw: install
	@mlds-plan redraw $(PROFILE) "$(DATA)" results "$(FIGURES)"

# Copies a profile's results to results/, to be committed; FORCE=1 even those made with local changes.
results: install
	@mlds-plan results $(PROFILE) "$(DATA)" "$(RUNS)" results $(FORCE)

# Holds this machine's results against the committed ones, cell by cell.
compare: install
	@mlds-plan compare $(PROFILE) "$(DATA)" "$(RUNS)" results

# Committed runs that are of an earlier plan, tables that were drawn before runs came, notebooks with old numbers.
status: install
	@mlds-plan stale $(PROFILE) "$(DATA)" results "$(FIGURES)"
	@python .ci/readme.py $(README) stale

# The experiments' notebooks need runs, so tests/test_experiments.py runs them. Two workers of one thread each; a file
# of tests stays with one worker, so that what its tests share is made once.
test: install
	@OMP_NUM_THREADS=1 nbdev-test nbs --n-workers 2 --skip-folder-re '^([_.]|experiments$$)'
	@OMP_NUM_THREADS=1 pytest -q -n 2 --dist loadfile

# The site, from what pip installs; MathJax comes from npm where that is there. Broken links and the like stop it.
docs: .venv/.docs
	@OMP_NUM_THREADS=1 python .ci/site/build.py _docs
	@python .ci/site/check.py _docs && echo "The site: _docs/index.html"

.venv/.docs: .venv/.installed
	$(BIN)/pip install --quiet -e ".[docs]"
	touch $@

lab: install
	@jupyter lab nbs/index.ipynb

# The exact versions that are installed. `pip install -r requirements.lock && pip install --no-deps -e .` has the same
# ones elsewhere; on another platform or Python some may not be there.
lock: .venv/.docs
	@pip freeze --exclude-editable > requirements.lock

# The text and code of nbs/index.ipynb as README.md; `make numbers` first brings the numbers in all notebooks up to date.
readme: install
	@python .ci/readme.py $(README)

numbers: install
	@python .ci/readme.py $(README) numbers

# One archive for a machine without a network: this commit and all wheels. WITHOUT="torch torchvision" leaves out what
# the machine has; FOR=3.12 packs for another Python.
bundle: install
	@python .ci/bundle.py dist/mlds.tar --without $(WITHOUT) $(if $(FOR),--python $(FOR))

# Both archives in dist/, checked; the wheel runs the README's ten lines in an empty folder.
release: install
	@python .ci/release.py dist

clean:
	rm -rf runs .snakemake

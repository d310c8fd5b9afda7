# make demo | recipes | test | test-fast | static | coverage | bench | check | docs: each sets itself up in .venv on first use and needs Python 3.10+ and make, nothing else.
#
#   make TORCH=system demo      use the torch (and Triton) that PYTHON can already import
#   make TORCH_INDEX=URL demo   take torch from a package index of your own, such as a CPU-only one
#   make PYTHON=python3.12 ...  another interpreter

PYTHON ?= python3
TORCH ?= pinned
TORCH_INDEX ?=
VENV ?= $(if $(filter system,$(TORCH)),.venv-system,.venv)

PIP := $(VENV)/bin/python -m pip --disable-pip-version-check
RUN := $(VENV)/bin/python
ifeq ($(TORCH),system)
CONSTRAINTS := $(VENV)/constraints.txt
else
CONSTRAINTS := constraints.txt
endif

.PHONY: help demo recipes test test-fast static coverage bench check docs clean

help:
	@echo "make demo    train on real images with the fused ops and compare them with the reference (4 minutes, set-up included)"
	@echo "make recipes  every study once, one seed and few epochs: to see that they run (DATA=FOLDER: with its cifar10, speech, trec, uci, wafer)"
	@echo "make test    the test suite (10 to 15 minutes on two cores); of the compiled kernels' limits those for sm_90"
	@echo "make test-fast  the quick part of the suite, for daily use: without the tests that are marked as slow"
	@echo "make static  the full gate of the kernels' limits: seven architectures, and the bytes of every case"
	@echo "make coverage  make test, and which lines and branches of the package it runs"
	@echo "make bench   time the ops and whole steps beside what people write and other libraries (3 to 10 minutes)"
	@echo "make check   lint, format and types"
	@echo "make docs    the documentation site, in .site: a broken link or name is an error (needs no torch)"
	@echo "make clean   remove the virtual environments"

demo: $(VENV)/.recipes
	$(RUN) -m fastmix.recipes.digits $(ARGS)

# without DATA those that cannot do without files are left out
recipes: $(VENV)/.recipes
	@set -e; for name in digits toy ablation masks corrupted attacks gan regression wafer $(if $(DATA),cifar speech text amp tabular); do \
		echo "== $$name"; \
		case $$name in cifar) more="--data $(DATA)/cifar10 --model small";; text|amp) more="--data $(DATA)/trec";; \
			tabular|regression) more="--data $(or $(DATA),.)/uci";; speech) more="--data $(DATA)/speech";; \
			wafer) more="$(if $(DATA),--data $(DATA)/wafer)";; *) more="";; esac; \
		$(RUN) -m fastmix.recipes.$$name --small --out fastmix-recipes/$$name $$more; \
	done

test: $(VENV)/.peers
	$(RUN) -m pytest -n auto --dist worksteal $(ARGS)

test-fast: $(VENV)/.peers
	$(RUN) -m pytest -n auto --dist worksteal -m "not slow" $(ARGS)

static: $(VENV)/.test
	$(RUN) -m fastmix.bench static $(ARGS)

coverage: $(VENV)/.peers
	$(RUN) -m coverage run -m pytest $(ARGS)
	$(RUN) -m coverage report

bench: $(VENV)/.peers
	$(RUN) -m fastmix.bench run $(ARGS)

check: $(VENV)/.check
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

docs: $(VENV)/.docs
	$(RUN) -m zensical build --clean --strict

clean:
	rm -rf .venv .venv-system .site

$(VENV)/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "fastmix needs Python 3.10 or newer; $(PYTHON) is" `$(PYTHON) --version 2>&1`. "Try make PYTHON=python3.12"; exit 1; }
	@echo "== making a virtual environment in $(VENV)"
	$(PYTHON) -m venv $(VENV)
	@grep -v -e '^torch' -e '^triton' constraints.txt > $(VENV)/constraints.txt
	@touch $@

ifeq ($(TORCH),system)
$(VENV)/.torch: $(VENV)/.made
	@$(PYTHON) -c 'import torch' || { echo "TORCH=system: $(PYTHON) cannot import torch"; exit 1; }
	@$(PYTHON) -c 'import os, torch; print(os.path.dirname(os.path.dirname(torch.__file__)))' \
		> `$(RUN) -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])'`/system-torch.pth
	@$(RUN) -c 'import torch; print("== using torch", torch.__version__, "from", torch.__path__[0])'
	@touch $@
else
$(VENV)/.torch: $(VENV)/.made
	@echo "== installing torch 2.13.0 and, on Linux, Triton 3.7.1 (what pip has cached is not downloaded again):"
	@echo "   Linux: about 3 GB with the CUDA libraries that the default build brings, 0.4 GB as a CPU build;"
	@echo "   macOS and Windows: 0.1 GB. For a CPU build pass an index that has one: make TORCH_INDEX=URL"
	$(PIP) install -c constraints.txt $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	@touch $@
endif

$(VENV)/.base: $(VENV)/.torch setup.py constraints.txt
	@echo "== installing fastmix in place, and NumPy (20 MB)"
	$(PIP) install -q -c $(CONSTRAINTS) -e .
	@touch $@

$(VENV)/.recipes: $(VENV)/.base
	@echo "== installing what the recipes use: scikit-learn, matplotlib, rich (90 MB)"
	$(PIP) install -q -c $(CONSTRAINTS) -e '.[recipes]'
	@touch $@

$(VENV)/.test: $(VENV)/.base
	@echo "== installing pytest, pytest-benchmark and what the recipes use (90 MB)"
	$(PIP) install -q -c $(CONSTRAINTS) -e '.[test]'
	@touch $@

# without what they depend on, and each on its own: what cannot be installed is named as missing where it is compared
$(VENV)/.peers: $(VENV)/.test constraints.txt
	@echo "== installing what fastmix is compared with: timm, torchvision, Liger-Kernel, PyMaxflow (16 MB)"
	@for peer in timm liger-kernel PyMaxflow $(if $(filter system,$(TORCH)),,torchvision); do \
		$(PIP) install -q --no-deps -c $(CONSTRAINTS) $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) $$peer || \
			echo "   could not install $$peer: it will be named as missing"; \
	done
	@echo "== installing the trainers that fastmix is tested in: Lightning, transformers (250 MB)"
	@for trainer in lightning "transformers accelerate"; do \
		$(PIP) install -q -c $(CONSTRAINTS) $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) $$trainer || \
			echo "   could not install $$trainer: it will be named as missing"; \
	done
	@touch $@

# types are checked against those of torch
$(VENV)/.check: $(VENV)/.base constraints.txt
	@echo "== installing ruff and mypy (40 MB)"
	$(PIP) install -q -c $(CONSTRAINTS) ruff mypy
	@touch $@

$(VENV)/.docs: $(VENV)/.made constraints.txt
	@echo "== installing what builds the documentation (40 MB)"
	$(PIP) install -q -c $(VENV)/constraints.txt zensical 'mkdocstrings[python]'
	@touch $@

# Needs make and one of Python 3.11, 3.12, 3.13; everything else goes into .venv.
# Portable to the make that macOS ships (3.81) and to any POSIX shell.

PYTHON ?=
ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
DEMO_OUT := runs/demo

.DEFAULT_GOAL := help
.PHONY: help install demo test lint format notebook bench bench-peers lock clean

help:
	@echo "make demo      compare four systems on real handwritten digits (about a minute)"
	@echo "make test      the whole test suite            ARGS='-k krum' for a part of it"
	@echo "make lint      ruff and mypy"
	@echo "make format    let ruff format and fix the code"
	@echo "make notebook  execute notebooks/quickstart.ipynb"
	@echo "make bench     time it beside its peers        ARGS='--only training' for a part"
	@echo "make bench-peers  first, once: PyTorch, ByzFL and Flower, each set up apart (9 GB)"
	@echo "make install   only set up $(VENV)"
	@echo "make lock      pin the dependencies anew       ARGS=--upgrade for newest versions"
	@echo "make clean     remove $(VENV) and all caches (results in runs/ stay)"
	@echo
	@echo "The first use installs the pinned packages into $(VENV) (1.4 GB, a minute or two)."
	@echo "PYTHON=/path/to/python3.12 chooses the interpreter; 'make clean' first to change it."

# --- environment -----------------------------------------------------------------------

# Sets $$python to the first usable interpreter, or says what is missing and stops. Each
# candidate is run, since a name on PATH may be a shim that does not work.
define FIND_PYTHON
python=; seen=; \
for candidate in $${PYTHON_CHOICE:-python3.13 python3.12 python3.11 python3 python}; do \
  version=`"$$candidate" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null` || continue; \
  case "$$version" in \
    3.11|3.12|3.13) ;; \
    *) seen="$$seen\n  $$candidate is Python $$version"; continue ;; \
  esac; \
  if "$$candidate" -c 'import ensurepip, venv' 2>/dev/null; then python=$$candidate; break; fi; \
  seen="$$seen\n  $$candidate is Python $$version, without its venv and ensurepip modules"; \
done; \
if [ -z "$$python" ]; then \
  { printf '%s\n' "make: no usable Python found. fedjax_sim needs Python 3.11, 3.12 or 3.13 with the venv module."; \
    if [ -n "$$seen" ]; then printf "Found:$$seen\n"; else printf 'Found: none that runs%s\n' "$${PYTHON_CHOICE:+ ($$PYTHON_CHOICE)}"; fi; \
    printf '%s\n' "To get one:" \
      "  Debian, Ubuntu    sudo apt install python3 python3-venv" \
      "  Fedora            sudo dnf install python3.13" \
      "  macOS (Homebrew)  brew install python@3.13" \
      "  any system        pyenv install 3.13, or the installer from python.org" \
      "Or name one yourself: make PYTHON=/path/to/python3.12 ..."; \
  } >&2; exit 1; \
fi
endef

# One stamp for the pinned packages, one for the project itself, so that an edit of
# pyproject.toml does not install everything again. A half-made .venv has no stamp.
$(VENV)/packages.stamp: requirements.lock requirements-build.lock
	@export PYTHON_CHOICE="$(PYTHON)"; $(FIND_PYTHON); \
	echo "Setting up $(VENV) with `"$$python" --version`, pinned packages: a minute or two, once."; \
	rm -rf $(VENV) && "$$python" -m venv $(VENV)
	@$(PIP) install --quiet --require-hashes -r requirements-build.lock
	@$(PIP) install --quiet --require-hashes --no-build-isolation -r requirements.lock
	@touch $@

$(VENV)/project.stamp: $(VENV)/packages.stamp pyproject.toml
	@$(PIP) install --quiet --no-build-isolation --no-deps -e .
	@$(PIP) check >$(VENV)/check.txt || { cat $(VENV)/check.txt; \
	  echo "pyproject.toml and requirements.lock disagree: run 'make lock'."; exit 1; }
	@touch $@

install: $(VENV)/project.stamp

# --- use -------------------------------------------------------------------------------

demo: install
	@if [ -e $(DEMO_OUT) ]; then \
	  echo "Replacing the results of the last demo in $(DEMO_OUT)."; rm -rf $(DEMO_OUT); fi
	$(BIN)/python -m experiments.fltrust_mnist --preset demo --out $(DEMO_OUT) $(ARGS)

notebook: install
	$(BIN)/jupyter-execute $(ARGS) notebooks/quickstart.ipynb

bench: install
	$(BIN)/python -m benchmarks.run $(ARGS)

# Each peer in an environment of its own: what they need does not go together.
bench-peers: .venv-byzfl/stamp .venv-flower/stamp

.venv-%/stamp: benchmarks/requirements-%.txt
	@export PYTHON_CHOICE="$(PYTHON)"; $(FIND_PYTHON); \
	echo "Setting up .venv-$*: some minutes and gigabytes, once."; \
	rm -rf .venv-$* && "$$python" -m venv .venv-$*
	@.venv-$*/bin/python -m pip --disable-pip-version-check install --quiet -r $<
	@touch $@

# --- development -----------------------------------------------------------------------

# The suite spends its time in the compiler; this way it generates plain code, faster
# (docs/decisions.md, 49). CODE= tests what users run.
CODE = JAX_DISABLE_MOST_OPTIMIZATIONS=1 \
	XLA_FLAGS="$$XLA_FLAGS --xla_cpu_use_fusion_emitters=false \
	--xla_cpu_parallel_codegen_split_count=1"

test: install
	$(CODE) $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal $(ARGS)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# uv lives in an environment of its own: it is needed for nothing else.
.venv-lock/bin/uv:
	@export PYTHON_CHOICE="$(PYTHON)"; $(FIND_PYTHON); "$$python" -m venv .venv-lock
	@.venv-lock/bin/python -m pip --disable-pip-version-check install --quiet "uv>=0.9"

COMPILE = .venv-lock/bin/uv pip compile --quiet --universal --python-version 3.11 \
	--fork-strategy fewest --generate-hashes --no-annotate \
	--custom-compile-command "make lock" $(ARGS)

lock: .venv-lock/bin/uv
	$(COMPILE) --group build --output-file requirements-build.lock
	$(COMPILE) --extra dev --extra notebooks --output-file requirements.lock pyproject.toml

clean:
	rm -rf $(VENV) .venv-lock .venv-byzfl .venv-flower .mypy_cache .pytest_cache .ruff_cache build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

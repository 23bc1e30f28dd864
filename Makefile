# Every target first creates .venv; the machine needs Python 3.10 or later and make.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
READY := .venv/.installed
OPS := mmcv-torchvision-ops

.PHONY: install demo test faults tables lint lock

install: $(READY)

$(READY): requirements.txt pyproject.toml $(OPS)/pyproject.toml $(OPS)/mmcv/_ext.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "error: $$($(PYTHON) --version) is too old: give Python 3.10 or later, as in make $(or $(MAKECMDGOALS),install) PYTHON=python3.12" >&2; exit 2; }
	@$(PYTHON) -m venv .venv || \
	  { echo "error: $(PYTHON) cannot make a virtual environment: install its venv module (Debian: apt install python3-venv)" >&2; exit 2; }
	@rm -rf $(OPS)/build  # of an earlier install; setuptools would take its files
	$(PIP) -r requirements.txt
	@# mmengine asks for opencv-python, which needs the machine's libGL: the files of the headless build replace it.
	$(PIP) --no-deps --force-reinstall $$(sed -n 's/^opencv-python\(==[0-9.]*\).*/opencv-python-headless\1/p' requirements.txt)
	@touch $@

# PoolFormer-S12 on 5,000 real digits, a few minutes on two cores; ARGS go to dist_train.sh.
demo: $(READY)
	PYTHON=$(CURDIR)/$(BIN)/python bash classification/dist_train.sh $(ARGS)

# One thread for each of pytest's processes: on these small networks more threads only wait for each other.
test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses logical --dist worksteal $(ARGS)

# Kill training runs, make them fail and corrupt their files; ARGS="--rounds N" sets the number of rounds.
faults: $(READY)
	$(BIN)/python tests/faults.py $(ARGS)

# The paper's tables; ARGS=--check only checks that they are up to date.
tables: $(READY)
	$(BIN)/python analysis/make_tables.py $(ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# requirements.lock from requirements.txt: every package with the hashes of its files, at the newest versions that fit.
lock: $(READY)
	$(PIP) uv
	@{ printf '# %s\n' \
	    'Written by "make lock" for CPython 3.11 on Linux (x86-64): all packages of requirements.txt and what they need,' \
	    'without the two folders of this repository and with opencv-python-headless alone. To install it:' \
	    '  pip install --require-hashes --no-deps -r requirements.lock' \
	    '  pip install --no-build-isolation --no-deps -e . ./$(OPS)'; \
	  $(BIN)/uv pip compile requirements.txt --quiet --generate-hashes --python-version 3.11 --python-platform linux \
	    --no-header --no-annotate --no-emit-index-url --no-emit-package metaformer --no-emit-package $(OPS) \
	    --no-emit-package opencv-python; } > requirements.lock.new
	@mv requirements.lock.new requirements.lock

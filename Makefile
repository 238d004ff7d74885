# install, check, test, demo, docs, wheel: the only commands, and CI runs the same. fuzz takes an hour, and is for people.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

# Compiled modules are kept, whatever the machine says: tests start some hundred processes.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: install lock check test fuzz demo docs wheel clean
install: $(VENV)/.installed $(VENV)/.converter

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	PIP_CONSTRAINT=constraints.txt $(BIN)/python -m pip install --disable-pip-version-check --quiet --editable '.[all,dev,docs]'
	touch $@

# LiteRT's converter has an environment of its own, with its own versions. Where its packages cannot be had, that is said,
# and nothing but the target litert lacks them.
$(VENV)/.converter: $(VENV)/.installed dualtoken_deploy/targets/litert/converter.txt
	-$(BIN)/python -m dualtoken_deploy.targets.litert.environment && touch $@

# The same versions with the hash of every file, for pip install --require-hashes -r constraints-hashed.txt. Where
# torch's CPU build comes from another place than PyPI, LOCK_ARGS names it: the committed one is of
# https://download.pytorch.org/whl/cpu or a copy of its files.
lock: install
	$(BIN)/uv pip compile --quiet pyproject.toml --extra all --extra dev --constraint constraints.txt \
	  --python-version 3.11 --generate-hashes --custom-compile-command 'make lock' $(LOCK_ARGS) \
	  --output-file constraints-hashed.txt

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Three processes on two cores, since some wait for what they start, with one thread each. What torch gives back is kept
# for its next tensors: to ask the kernel for it anew takes a twentieth of the time.
TOGETHER := OMP_NUM_THREADS=1 MALLOC_MMAP_THRESHOLD_=268435456 MALLOC_TRIM_THRESHOLD_=536870912

# The environment of the outside clients is made while the first tests run, and waited for by those that need it, which
# make it themselves where this failed.
test: install
	$(BIN)/python tests/clients/make_venv.py > /dev/null 2>&1 &
	$(TOGETHER) $(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

# Each reader of what strangers send, for ten minutes: docs/serve.md has what came out.
FUZZ_SECONDS ?= 600
fuzz: install
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzz.run --seconds $(FUZZ_SECONDS) $(FUZZ_TARGETS)

demo: install
	$(BIN)/python benchmarks/demo.py

# Strict: a link that leads nowhere fails. build/site/index.html opens without a network.
docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# What other machines install: pip install 'dist/dualtoken_deploy-...whl[EXTRAS]'
wheel: install
	$(BIN)/python -m build --wheel --outdir dist .

clean:
	rm -rf $(VENV) .venv-clients build dist *.egg-info .mypy_cache .ruff_cache .import_linter_cache

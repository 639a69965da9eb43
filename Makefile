# Everything a checkout needs, from a bare Debian 12 machine (root). `make help` lists the targets.
# Installed things are cached by content: a second run does only what changed.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.ready
NATIVE := $(wildcard native/*.c native/*.h native/ffi_build.py)

.PHONY: help demo test check fuzz soak bench vm-shell setup man deb clean
.DEFAULT_GOAL := help

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

demo: setup  ## verified I/O: libblkio, the bridge and the kernel's vdpa_sim_blk in a virtual machine
	@$(BIN)/python -m tests.demo

test: setup  ## all tests: unit, host (real user-space peers), vm (real kernel vhost-vdpa), install
	@VHOST_BRIDGE_NO_SKIPS=1 $(BIN)/pytest --numprocesses=2 --dist=loadfile --durations=25

soak: setup  ## the tests with long counts at full length; results go to docs/soak.md
	@VHOST_BRIDGE_NO_SKIPS=1 VHOST_BRIDGE_SOAK=1 $(BIN)/pytest -m soak --durations=0

check: $(STAMP)  ## lint, format, types, C warnings and sanitizers
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy && sh .ci/check-native

fuzz: $(STAMP)  ## all fuzzers, for FUZZ_SECONDS (60) in all
	@sh .ci/setup-fuzz $(VENV) && $(BIN)/python -m tests.fuzz --seconds $(or $(FUZZ_SECONDS),60)

bench: setup  ## measure; prints the tables of docs/performance.md
	@$(BIN)/python -m benchmarks

vm-shell: setup  ## a shell in the test virtual machine
	@$(BIN)/python -m tests.rig shell

man: $(STAMP)  ## man pages, into man/
	@$(BIN)/python packaging/man.py man

deb: $(STAMP)  ## the Debian packages, into dist/
	@$(BIN)/python -m tests.rig.deb dist

# Tests start the daemon hundreds of times; with PYTHONDONTWRITEBYTECODE set it would compile each time.
setup: $(STAMP)
	@$(BIN)/python -m compileall -q vhostbridge tests benchmarks
	@$(BIN)/python -m tests.rig setup

$(STAMP): pyproject.toml setup.py .ci/setup $(NATIVE)
	@sh .ci/setup $(PYTHON) $(VENV)
	@touch $@

clean:  ## remove what was built here; the cache stays (python -m tests.rig clean removes that)
	rm -rf $(VENV) build dist out man *.egg-info native/*.so native/*.o native/_native.c

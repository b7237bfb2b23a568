# make demo    contact sheets of people who are kept (FACE=path for your own photo)
# make test    everything that can be tested without a WebUI
# make bench   speed and memory of the injection against the official formulas
# make lint    ruff and mypy
# make test-host WEBUI_DIR=<checkout of A1111 or Forge that runs> [WEBUI_PYTHON=...] [ARGS=...]    see docs/hosts.md
# make test-host-long WEBUI_DIR=...    100 pictures in a row
# make test-host-sequences WEBUI_DIR=...    100 random sequences of settings, pictures, faults and interruptions
# All keep their packages in .venv and use the one that is there.

PYTHON ?= python3
OUT ?= outputs
BIN := .venv/bin
QUIET := PIP_DISABLE_PIP_VERSION_CHECK=1

.PHONY: demo test bench lint clean test-host test-host-long test-host-sequences

demo: .venv/standalone
	$(BIN)/python -m lib_pulid demo $(if $(FACE),--face "$(FACE)") --out "$(OUT)"

test: .venv/test
	$(BIN)/python -m ruff check .
	$(BIN)/python -m pytest -n auto --dist loadfile

bench: .venv/test
	$(BIN)/python -m tests.bench

lint: .venv/test
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy

test-host: .venv/host
	@test -n "$(WEBUI_DIR)" || { echo 'WEBUI_DIR=<a checkout of A1111 or Forge that runs> is needed'; exit 2; }
	$(BIN)/python -m tests.host "$(WEBUI_DIR)" $(if $(WEBUI_PYTHON),--python "$(WEBUI_PYTHON)") $(ARGS)

test-host-long:
	$(MAKE) test-host ARGS="--only long $(ARGS)"

test-host-sequences:
	$(MAKE) test-host ARGS="--only sequences $(ARGS)"

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit("Python 3.10 to 3.12 is needed") if not (3, 10) <= sys.version_info[:2] <= (3, 12) else 0'
	$(PYTHON) -m venv .venv || { rm -rf .venv; echo 'No venv module: apt-get install python3-venv'; exit 1; }

# opencv-python wants libGL; the headless build of the same library, put over it, does not.
.venv/standalone: requirements-standalone.txt | $(BIN)/python
	@echo 'Installing packages into .venv (about 6 GB, most of it torch); a few minutes ...'
	$(QUIET) $(BIN)/python -m pip install -q -r requirements-standalone.txt
	$(QUIET) $(BIN)/python -m pip install -q --no-deps --force-reinstall 'opencv-python-headless>=4.8'
	@touch $@

.venv/host: requirements-host.txt .venv/test
	$(QUIET) $(BIN)/python -m pip install -q -r requirements-host.txt
	@which chromium >/dev/null || echo 'No chromium: the rows of the page will be left out (apt-get install chromium)'
	@touch $@

.venv/test: requirements-test.txt .venv/standalone
	$(QUIET) $(BIN)/python -m pip install -q -r requirements-test.txt
	@touch $@

clean:
	rm -rf .venv outputs .pytest_cache .ruff_cache .mypy_cache

# make demo    contact sheets of people who are kept (FACE=path for your own photo)
# make test    everything that can be tested without a WebUI
# make test-long    more random sequences and damaged files, every fault at every stage, which take long
# make bench   what a face costs, beside the official formulas: counted as on a GPU, timed, kept in memory
# make bench-gpu    the times of sites and whole steps on a GPU, in both 16-bit formats; a few minutes
# make lint    ruff and its format, mypy
# make test-host WEBUI_DIR=<checkout of A1111 or Forge that runs> [WEBUI_PYTHON=...] [ARGS=...]    see docs/hosts.md
# make test-host-long WEBUI_DIR=...    100 pictures in a row
# make test-host-sequences WEBUI_DIR=...    100 random sequences of settings, pictures, faults and interruptions
# All keep their packages in .venv and use the one that is there.

# The newest Python that can make an environment: python3.13 to python3.10 on the path, then pyenv's.
PYTHON ?= $(shell for minor in 13 12 11 10; do \
	for python in python3.$$minor "$${PYENV_ROOT:-$$HOME/.pyenv}"/versions/3.$$minor.*/bin/python; do \
	"$$python" -c 'import ensurepip, venv' 2>/dev/null && echo "$$python" && exit; done; done; echo python3)
OUT ?= outputs
BIN := .venv/bin
PIPS := 'pip==24.0' 'pip==25.0.1' 'pip>=26'  # with which the tests run install.py; without them those are skipped
QUIET := PIP_DISABLE_PIP_VERSION_CHECK=1

.PHONY: demo test test-long bench bench-gpu lint clean test-host test-host-long test-host-sequences

demo: .venv/standalone
	$(BIN)/python -m lib_pulid demo $(if $(FACE),--face "$(FACE)") --out "$(OUT)"

test: .venv/test
	$(BIN)/python -m ruff check .
	$(BIN)/python -m mypy
	$(BIN)/python -m pytest -n auto --dist loadfile

test-long: .venv/test
	PULID_SEQUENCES=500 PULID_FUZZ=60 PULID_FAULTS=all \
		$(BIN)/python -m pytest -n auto --dist loadfile tests/test_sequences.py tests/test_fuzz.py tests/test_faults.py

bench: .venv/test
	$(BIN)/python -m lib_pulid bench

bench-gpu: .venv/test
	mkdir -p "$(OUT)"
	for dtype in float16 bfloat16; do \
		$(BIN)/python -m lib_pulid bench sites steps --device cuda --dtype $$dtype --json > "$(OUT)/bench-$$dtype.json" || exit 1; \
	done

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
	$(PYTHON) -c 'import sys; sys.exit("Python 3.10 to 3.13 is needed") if not (3, 10) <= sys.version_info[:2] <= (3, 13) else 0'
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
	for pip in $(PIPS); do $(QUIET) $(BIN)/python -m pip download -q --no-deps -d .venv/pips "$$pip" || true; done
	@touch $@

clean:
	rm -rf .venv outputs .pytest_cache .ruff_cache .mypy_cache

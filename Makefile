# Everything that is typed here. `make` alone says what there is.
#
# A fresh machine needs Python 3.11 or 3.12, `make`, and a package registry within reach:
# uv, Java and Delta's jars are brought where they are missing.

.DEFAULT_GOAL := help
SHELL         := /bin/bash
VENV          := .venv
BIN           := $(VENV)/bin
DOCS          := build/docs
ifndef PYTHON
PYTHON        := $(firstword $(foreach name,python3.12 python3.11 python3 python,\
                   $(shell $(name) -c 'import sys; print(sys.executable) if (3, 11) <= sys.version_info[:2] < (3, 13) else None' 2>/dev/null)))
endif
# A uv that runs and is new enough, or the one that we bring.
UV            := $(or $(shell found=$$(uv --version 2>/dev/null) && printf 'uv 0.9\n%s\n' "$$found" \
                   | sort -VC && command -v uv),build/uv/bin/uv)
WORKERS       ?= 2
KILLS         ?= 200
MARK          ?= long
SITE          ?= build/site
LONG          ?= $(shell grep -rl --include='test_*.py' 'mark\.long' tests)

# The tools run from the environment: no activation is assumed, and none is disturbed.
export PATH := $(abspath $(BIN)):$(PATH)
unexport PYTHONHOME PYTHONPATH
export VIRTUAL_ENV := $(abspath $(VENV))

.PHONY: help setup demo clean-demo up down test test-quick test-slow test-long test-s3 check docs reference lock audit wheel

help:  ## what there is
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/\1\t\2/' \
	  | while IFS=$$'\t' read -r name words; do printf '  make %-12s %s\n' "$$name" "$$words"; done

# -- the environment ---------------------------------------------------------------------------

setup: $(VENV)/.jars  ## build the environment in .venv (runs by itself before everything else)

build/uv/bin/uv:
	@test -n "$(PYTHON)" || { echo "no Python 3.11 or 3.12 found: install one, or name it: make PYTHON=/path/to/python3.12"; exit 1; }
	@echo "no uv 0.9 or newer here: bringing one"
	@rm -rf build/uv && $(PYTHON) -m venv build/uv && build/uv/bin/pip install --quiet --disable-pip-version-check 'uv>=0.9,<1'

$(VENV)/.python: | $(UV)
	@test -n "$(PYTHON)" || { echo "no Python 3.11 or 3.12 found: install one, or name it: make PYTHON=/path/to/python3.12"; exit 1; }
	@test -x $(BIN)/python || $(UV) venv --quiet --python $(PYTHON) $(VENV)
	@$(BIN)/python -c 'import sys; assert (3, 11) <= sys.version_info[:2] < (3, 13), sys.version' \
	  || { echo "$(VENV) has another Python: remove the folder $(VENV) and run make again"; exit 1; }
	@touch $@

$(VENV)/.packages: requirements.lock pyproject.toml $(VENV)/.python | $(UV)
	@echo "installing the packages of requirements.lock into $(VENV) (7 GB, compiled; two minutes the first time)"
	@$(UV) pip sync --quiet --require-hashes --compile-bytecode --python $(BIN)/python requirements.lock
	@$(UV) pip install --quiet --no-deps --python $(BIN)/python --editable .
	@touch $@

$(VENV)/.java: infra/java/java.py infra/java/requirements.lock $(VENV)/.packages | $(UV)
	@$(BIN)/python infra/java/java.py --uv "$(UV)"
	@touch $@

$(VENV)/.jars: infra/spark/jars.py infra/spark/delta-jars.sha256 infra/spark/ivysettings.xml $(VENV)/.java
	@$(BIN)/python infra/spark/jars.py
	@touch $@

# -- the story ---------------------------------------------------------------------------------

demo: setup  ## three nights of a real log through Airflow, Spark and MLflow, then a table of methods and the gate's answer
	@$(BIN)/python infra/demo/run.py

clean-demo:  ## forget the demo: stop its servers, remove .demo
	@test ! -d .demo || test ! -x $(BIN)/python || $(BIN)/python infra/airflow/local.py stop --state .demo
	@rm -rf .demo

up: setup  ## Airflow and MLflow in the background, on this machine only (the demo's, if there was one); DB=postgres, or a URL
	@$(BIN)/python infra/airflow/local.py start --database '$(DB)'

down:  ## stop what `make up` started
	@test ! -x $(BIN)/python || $(BIN)/python infra/airflow/local.py stop

# -- proof -------------------------------------------------------------------------------------

test: setup  ## all tests but the slow and the long ones
	@$(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile --no-loadscope-reorder -m "not slow and not long and not s3" --durations=12 --junitxml=build/tests.xml

test-slow: setup  ## the slow ones: whole nights in Spark, servers; PART=1/5 is a fifth of them
	@$(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(if $(PART),--part $(PART)) -m "slow and not long and not s3" --durations=12 --junitxml=build/tests-slow.xml

test-quick: setup  ## those without a JVM, a server or another process; a minute
	@$(BIN)/python -m pytest -q -n $(WORKERS) -m "quick and not training and not slow and not long" --durations=5

test-long: setup  ## the long ones, or LONG=tests/jobs/pipeline/test_faults.py; KILLS=200 at random; kept in tests/long_runs
	@mkdir -p tests/long_runs; all=0; for file in $(LONG); do \
	  kept=tests/long_runs/$$(basename $$file .py).txt; \
	  { echo "$$(date -u +%FT%TZ), commit $$(git rev-parse --short HEAD)$$(git diff --quiet HEAD -- . ':!tests/long_runs' || echo ' and changes'), $$($(BIN)/python --version), $$(nproc) cores, $(KILLS) random kills"; \
	    $(BIN)/python -m pytest -v -n $$(grep -q '^pytestmark = pytest.mark.in_order' $$file && echo 0 || echo $(WORKERS)) -m $(MARK) --kills $(KILLS) --durations=0 --tb=short $$file; echo "exit status $$?"; } 2>&1 \
	    | sed -u 's%/tmp/pytest-of-[^/]*/[a-z]*-[0-9a-f-]*%TMP%g' | grep --line-buffered -vE '^(  /|  <class|rootdir|configfile|plugins|cachedir|hypothesis|created:|platform|scheduling|tests/|bringing)' | tee $$kept; \
	  tail -1 $$kept | grep -q 'exit status 0' || all=1; done; exit $$all

test-s3: setup  ## the lake on an S3-compatible server, made here (needs Go; 640 MB of Java); kept in tests/long_runs
	@GOBIN=$(abspath build/bin) go install github.com/versity/versitygw/cmd/versitygw@v1.8.0
	@$(BIN)/python infra/spark/jars.py --s3 --conf build/spark-s3
	@$(MAKE) --no-print-directory test-long LONG=tests/jobs/pipeline/test_s3.py MARK=s3 WORKERS=0

check: setup  ## format, lint and types, as CI runs them; changes nothing
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports --no-cache
	$(BIN)/mypy

# -- the documents -----------------------------------------------------------------------------

$(DOCS)/.packages: infra/docs/requirements.lock | $(UV)
	@test -n "$(PYTHON)" || { echo "no Python 3.11 or 3.12 found: install one, or name it: make PYTHON=/path/to/python3.12"; exit 1; }
	@test -x $(DOCS)/bin/python || $(UV) venv --quiet --python $(PYTHON) $(DOCS)
	@$(UV) pip sync --quiet --require-hashes --python $(DOCS)/bin/python infra/docs/requirements.lock
	@touch $@

docs: $(DOCS)/.packages  ## the documentation as a site, in build/site; open build/site/index.html (needs no setup)
	@NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --quiet --strict --site-dir '$(abspath $(SITE))'

# -- for maintainers ---------------------------------------------------------------------------

reference: setup  ## make docs/reference from the code
	@$(BIN)/python infra/docs/make_reference.py

lock: | $(UV)  ## resolve the dependencies anew
	@$(UV) pip compile pyproject.toml --quiet --universal --generate-hashes --all-extras --group dev -p 3.11 \
	  --custom-compile-command "make lock" -o requirements.lock
	@$(UV) pip compile --group docs --quiet --universal --generate-hashes -p 3.11 \
	  --custom-compile-command "make lock" -o infra/docs/requirements.lock
	@cd infra/java && $(if $(filter build/%,$(UV)),../../$(UV),$(UV)) pip compile requirements.in --quiet --universal --generate-hashes -p 3.11 \
	  --custom-compile-command "make lock" -o requirements.lock

audit: | $(UV)  ## known faults of the packages, where the index has them
	@$(UV) tool run pip-audit --no-deps --disable-pip --require-hashes -r requirements.lock

wheel: setup | $(UV)  ## the wheel that `spark-submit --py-files` takes to a cluster, in dist/
	@$(UV) build --quiet --wheel --python $(BIN)/python --out-dir dist . && ls dist/*.whl

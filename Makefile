# `make help` lists the targets.

SHELL := /bin/sh
PY := .venv/bin/python
# One more than a small machine has cores: the tests boot daemons and wait for them much of the time.
PYTEST_WORKERS ?= 3
PYTEST_ARGS ?=
SOAK ?= 200

.DEFAULT_GOAL := help
.PHONY: help install venv demo test coverage lint unit bench soak fuzz check-clean check-directory check-image lock clean

help: ## list the targets
	@sed -n 's/^\([a-z%-]*\):.*## \(.*\)/\1\t\2/p' $(MAKEFILE_LIST) | sort | expand -t 16

install: ## set up .venv and, as root, the Debian packages that the tests use
	@tools/bootstrap

venv:
	@tools/bootstrap --venv-only

demo: venv ## a relay at work, told as a story; Ctrl-C ends it (DEMO_EXIT=1: ends after the tour)
	@$(PY) demo/run.py

# The whole suite runs last: its summary names what was absent, and its closing line is the last of the output.
test: install lint ## everything: lint, types, layers, unit tests on each Python present, the whole suite
	@tools/unit-elsewhere 3.12 3.13 -- -n $(PYTEST_WORKERS)
	$(PY) -m pytest -n $(PYTEST_WORKERS) --dist loadfile $(PYTEST_ARGS)

coverage: install ## the whole suite once more, with the lines that it reaches (a third slower)
	$(PY) -m pytest -n $(PYTEST_WORKERS) --dist loadfile --cov --cov-report=term $(PYTEST_ARGS)

lint: venv ## ruff, mypy --strict, import layers
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/mypy --strict
	.venv/bin/lint-imports

unit: venv ## the fast tests only
	$(PY) -m pytest tests/unit $(PYTEST_ARGS)

bench: install ## the table against Postfix (root; some ten minutes); the table is all that goes to standard output
	@$(PY) bench/run.py

bench-abuse: install ## what clients in the way, broken sessions, an outage and a backlog cost everybody else
	@$(PY) bench/abuse.py

bench-directory: install ## readings of directories of 100,000 and 500,000 entries: CPU, memory, increments, what mail notices
	@$(PY) bench/directory.py

check-directory: install ## directories of 1,000 to 100,000 entries against the truth (SIZES="1000"), and 100,000 guesses that ask none
	@PYTHONPATH=. $(PY) tools/check_directory.py $(SIZES)

bench-%: install ## one part of it: bench-compare, -attack, -idle, -memory, -start, -auth, -fsync
	@$(PY) bench/run.py --part $*

soak: install ## crash and takeover tests at SOAK (200) random moments per mode
	$(PY) -m soak --moments $(SOAK)

fuzz: venv ## a million random command lines and 100,000 bodies against the session (SEED=n repeats a run)
	$(PY) -m tests.fuzz $(if $(SEED),--seed $(SEED))
	FUZZ_GROUPS=3000 $(PY) -m pytest -q tests/dialogue/test_fuzz.py

look: install ## what nmap, sslscan, testssl.sh find when they look at the relay; some two minutes
	@$(PY) -m tests.external.look

check-clean: ## demo and test in a fresh clone on a bare Debian root (root; debootstrap)
	@tools/bootstrap --with debootstrap=debootstrap
	@tools/check-clean

check-image: ## the Dockerfile's steps on bare Debian roots, and what comes out at work as a container runs it (root; debootstrap)
	@tools/bootstrap --with debootstrap=debootstrap
	@$(PY) tools/check_image.py

lock: ## write the lock files anew (needs uv)
	@tools/lock

clean: ## remove what the tools made, environments included
	rm -rf .venv .venvs .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache .coverage .coverage.* build dist
	find relay tests bench demo tools -name __pycache__ -type d -prune -exec rm -rf {} +

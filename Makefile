.DEFAULT_GOAL := help
.PHONY: help setup install uninstall demo test bench clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-9s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: ## install what the program needs; leaves it at .venv/bin/firstbyte
	@scripts/setup program

install: ## install for the whole machine, as root; PREFIX=/usr/local, DESTDIR= for packages
	@scripts/setup program
	@scripts/install

uninstall: ## remove what make install has put there; data stays
	@scripts/uninstall

demo: ## start a container from an image that is not here yet; IMAGE=ref, RUNTIME=containerd|podman
	@scripts/setup program demo
	@.venv/bin/firstbyte demo $${RUNTIME:+--runtime "$$RUNTIME"} $${IMAGE:+"$$IMAGE"}

test: ## install what the tests need, and run them all
	@scripts/setup program demo tests
	@$(MAKE) --no-print-directory --jobs=2 --output-sync=target style types layers roots
	@# on a disk: tmpfs cannot be read without waiting, nor hold an image's devices
	TMPDIR=/var/tmp .venv/bin/pytest --numprocesses 3 --dist loadfile --no-loadscope-reorder

# What "test" does before the tests, side by side.
style:
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

types:
	.venv/bin/mypy

layers:
	.venv/bin/lint-imports --no-logo

roots:
	@.venv/bin/python -m tests.support.debian_root

bench: ## measure index, store, file system and layers; prints the tables of docs/benchmarks.md
	@scripts/setup program demo bench
	@.venv/bin/firstbyte bench index --markdown
	@echo
	@.venv/bin/firstbyte bench read --markdown
	@echo
	@.venv/bin/firstbyte bench layers --markdown
	@echo
	@.venv/bin/firstbyte bench handover --markdown

clean: ## remove everything that the other targets made here
	rm -rf .venv build dist .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

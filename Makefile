# make install | demo | test | test-fast | check | format | constraints | clean
# PYTHON=/path/to/python3.12 chooses the Python of .venv; ARGS="--crash" is handed to `sftd demo`.
.DEFAULT_GOAL := install
.PHONY: install demo test test-fast check format constraints clean
.DELETE_ON_ERROR:
VENV := .venv
STAMP := $(VENV)/.installed
BIN := $(VENV)/bin
CHECKED := sftd tests migrations

export PYTHON

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@scripts/install

# A pretrained model is fine-tuned on this machine, from submit to the compared curves.
demo: install
	@$(BIN)/sftd demo $(ARGS)

test: install
	@scripts/run-checks lint tests tests/process tests/trainer tests

test-fast: install
	@scripts/run-checks tests tests/architecture tests/unit

check: install
	@scripts/run-checks lint

format: install
	@$(BIN)/ruff check --fix --quiet $(CHECKED)
	@$(BIN)/ruff format $(CHECKED)

constraints: install
	@$(BIN)/python -m pip install --quiet --upgrade --upgrade-strategy eager -e '.[test,postgres,gpu]'
	@scripts/freeze $(BIN)/python > constraints.tmp && mv constraints.tmp constraints.txt
	@touch $(STAMP)
	@echo "constraints.txt is made anew; run make test before you commit it."

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis .import_linter_cache *.egg-info

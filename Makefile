# make install | demo | wheel | test | test-fast | check | format | constraints | clean
# PYTHON=/path/to/python3.12 chooses the Python of .venv; ARGS="--crash" is handed to `sftd demo`.
.DEFAULT_GOAL := install
.PHONY: install demo wheel test test-fast check format constraints clean
.DELETE_ON_ERROR:
VENV := .venv
STAMP := $(VENV)/.installed
TEST_STAMP := $(VENV)/.installed-test
BIN := $(VENV)/bin
CHECKED := sftd tests migrations

export PYTHON

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@scripts/install

# What only the tests need.
$(TEST_STAMP): $(STAMP)
	@scripts/install test

# A pretrained model is fine-tuned on this machine, from submit to the compared curves.
demo: install
	@$(BIN)/sftd demo $(ARGS)

# To install elsewhere: pip install -c constraints.txt 'dist/sftd-VERSION-py3-none-any.whl[postgres,gpu]'
wheel: install
	@$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .
	@ls -t dist/*.whl | head -n 1

test: $(TEST_STAMP)
	@scripts/run-checks lint tests tests

test-fast: $(TEST_STAMP)
	@scripts/run-checks tests tests/architecture tests/unit

check: $(TEST_STAMP)
	@scripts/run-checks lint

format: $(TEST_STAMP)
	@$(BIN)/ruff check --fix --quiet $(CHECKED)
	@$(BIN)/ruff format $(CHECKED)

constraints: $(TEST_STAMP)
	@$(BIN)/python -m pip install --quiet --upgrade --upgrade-strategy eager -e '.[test,postgres,gpu,mutation]'
	@scripts/freeze $(BIN)/python > constraints.tmp && mv constraints.tmp constraints.txt
	@touch $(STAMP) $(TEST_STAMP)
	@echo "constraints.txt is updated; run make test before you commit it."

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis .import_linter_cache *.egg-info

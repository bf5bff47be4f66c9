# The interpreter that makes .venv; everything else runs inside it.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-ceph test-nodes test-mlflow test-browser test-monitoring soak lint requirements clean

help: ## List the targets
	@sed -nE 's/^([a-z-]+):.*## (.*)/make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 12

setup: $(INSTALLED) ## Make .venv and fetch the LPIPS backbones into the cache
	@$(BIN)/python -m pipelines.backbones

demo: setup ## Train, tune, evaluate and release a tiny model on this machine
	@$(BIN)/python -m pipelines.demo

# Tests on Ray wait half of the time, for processes to start: most others run in what they leave of the machine, and
# are shown after them.
test: setup ## Run the tests that need no GPU and no server
	@nice -n 10 $(BIN)/python -m pytest --priority low > .venv/other-tests.log 2>&1 & others=$$!; \
	$(BIN)/python -m pytest --priority usual; ray=$$?; \
	wait $$others; others=$$?; cat .venv/other-tests.log; exit $$((others + ray))

test-ceph: setup ## Run the tests of storage and data, slow ones too, against Ceph's RADOS Gateway
	@$(BIN)/python -m pytest --store ceph -m "not gpu and not remote and not tier" $(addprefix tests/pipelines/, \
	infra test_data.py test_index.py test_pack.py test_shards.py)

test-nodes: setup ## Run the tests on clusters of several nodes; as root, for the network between them
	@$(BIN)/python -m pytest -m tier tests/nodes

test-mlflow: setup ## Run the tests of tracking and registry on PostgreSQL, S3 and an MLflow server
	@$(BIN)/python -m pytest -m tier tests/mlflow

test-browser: setup ## Run the tests of the page in Chromium (apt-get install chromium chromium-driver)
	@$(BIN)/python -m pytest -m tier tests/browser

test-monitoring: setup ## Run the tests of alerts in Prometheus (apt-get install --no-install-recommends prometheus)
	@$(BIN)/python -m pytest -m tier tests/monitoring

soak: setup ## Train for two hours on two nodes of this machine, and show what grows; as root
	@$(BIN)/python -m tests.soak

lint: $(INSTALLED) ## Check format, lint and types
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy

clean: ## Remove .venv, the demo's runs, builds and caches, but not the backbones
	rm -rf .venv runs build *.egg-info .mypy_cache .pytest_cache .ruff_cache

requirements: ## Copy the dependencies from pyproject.toml to requirements.txt
	@$(PYTHON) -c 'import tomllib; \
	print("# The dependencies of pyproject.toml, which says why each is there. Written by `make requirements`."); \
	print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"], sep="\n")' > requirements.txt

$(INSTALLED): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("error: Python 3.11 or newer is needed, \
	$(PYTHON) is %d.%d. Set one: make setup PYTHON=python3.11" % sys.version_info[:2])'
	@echo "Installing this package and its tools into .venv (some minutes the first time)"
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --editable '.[dev]'
	@touch $@

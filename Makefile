# The same words on a laptop and in CI. Every target works from a clean clone; the first
# one that runs makes .venv from requirements.lock, later ones reuse it.
#
#   make demo      train four adapters on a local Ray cluster, serve them together, generate
#   make test      the whole suite: offline, on CPU
#   make conformance  other people's clients against a service: openai, litellm, langchain-openai,
#                  llm, lm-eval, schemathesis, guidellm, from the package index into
#                  .venv-conformance and .venv-guidellm
#   make extras    trackers and traces against the real MLflow, W&B, TensorBoard and OpenTelemetry,
#                  from the package index into .venv-extras
#   make check     ruff, format and pyright (strict)
#   make format    let ruff write the format
#   make bench     measure; asserts nothing
#   make docs      regenerate the reference from the code, and the table of methods and ZeRO
#                  stages from the tests (minutes)
#   make lock      resolve requirements.lock anew from pyproject.toml
#
#   TORCH=cpu  (default) the CPU build of torch, if an index or wheel folder known to pip has it
#   TORCH=cuda           the CUDA build with the NVIDIA libraries it pins: make install TORCH=cuda
#   WORKERS=2  (default) how many files of tests run at a time

PYTHON  ?= python3.11
WORKERS ?= 2
TORCH   ?= cpu
BIN     := .venv/bin
STAMP   := .venv/installed-$(TORCH)
PIP     := $(BIN)/python -m pip install --quiet --disable-pip-version-check
LOCKED  := --require-hashes --no-deps --no-build-isolation

# DeepSpeed compiles its optional kernels at first use; none are built at install time.
export DS_BUILD_OPS := 0

# '==' lets pip prefer the '+cpu' build of the same version; '===' takes the public build alone.
TORCH_VERSION := $(shell sed -n 's/^torch==\([0-9.]*\).*/\1/p' requirements.lock)
TORCH_cpu     := torch==$(TORCH_VERSION)
TORCH_cuda    := torch===$(TORCH_VERSION)

.PHONY: install demo test conformance extras check format bench docs lock

install: $(STAMP)

# In this order: torch in the build asked for; what building DeepSpeed from source needs;
# every other package at its exact version and hash; this project, editable.
$(STAMP): requirements.lock pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) '$(TORCH_$(TORCH))'
	awk '/^[a-z]/ {keep = /^(setuptools|wheel)==/} keep' requirements.lock > .venv/build.lock
	$(PIP) $(LOCKED) -r .venv/build.lock
	$(PIP) $(LOCKED) -r requirements.lock
	$(PIP) --no-deps --no-build-isolation --editable .
	rm -f .venv/installed-*
	touch $@

demo: install
	$(BIN)/python configs/demo/run.py

# First what runs in processes of its own, several files at a time; then what needs a cluster of
# processes, which loads every core itself. The second half runs whatever the first one found.
test: install
	@failed=0; \
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m 'not ray' -n $(WORKERS) --dist loadfile || failed=1; \
	$(BIN)/python -m pytest -m ray || failed=1; \
	exit $$failed

CLIENTS := .venv-conformance/installed
$(CLIENTS): tests/conformance/requirements.txt
	$(PYTHON) -m venv --clear .venv-conformance
	.venv-conformance/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	touch $@

# It imports torch, and wants other versions of what the other clients want.
GUIDELLM := .venv-guidellm/installed
$(GUIDELLM): tests/conformance/guidellm.txt
	$(PYTHON) -m venv --clear .venv-guidellm
	.venv-guidellm/bin/python -m pip install --quiet --disable-pip-version-check '$(TORCH_$(TORCH))'
	.venv-guidellm/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	touch $@

conformance: install $(CLIENTS) $(GUIDELLM)
	GRAFT_CONFORMANCE=$(CURDIR)/.venv-conformance/bin/python \
	GRAFT_GUIDELLM=$(CURDIR)/.venv-guidellm/bin/python \
	  $(BIN)/python -m pytest tests/conformance

# Over the packages of .venv, which those that need another version of one hide.
EXTRAS := .venv-extras/installed
$(EXTRAS): $(STAMP)
	$(PYTHON) -m venv --clear .venv-extras
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
	  > "$$(.venv-extras/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/below.pth"
	.venv-extras/bin/python -m pip install --quiet --disable-pip-version-check \
	  --editable '.[mlflow,wandb,otel]' tensorboard
	touch $@

extras: $(EXTRAS)
	.venv-extras/bin/python -m pytest -rs tests/training/test_tracking.py tests/serving/test_tracing.py

check: install
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright

format: install
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench: install
	$(BIN)/python tests/bench/serving.py

docs: install
	$(BIN)/python docs/generate.py
	$(BIN)/python docs/stages.py

# torch stays in the lock, and Triton, whose interpreter and compiler the tests use; the CUDA
# libraries do not, since torch itself pins each of them and the CPU build has none.
lock: install
	$(BIN)/uv pip compile pyproject.toml --extra dev --universal --python-version 3.11 \
	  --generate-hashes --no-annotate --no-header --upgrade --output-file requirements.lock
	$(BIN)/python -c "import pathlib, re; lock = pathlib.Path('requirements.lock'); \
	  lock.write_text(re.sub(r'(?m)^(nvidia-|cuda-)(.*\\\\\n)*.*\n', '', lock.read_text()))"

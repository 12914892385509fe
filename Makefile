# The same words on a laptop and in CI. Every target works from a clean clone;
# the first one that runs makes .venv from requirements.lock, later ones reuse it.
#
#   TORCH=cpu  (default) the CPU build of torch, where an index or wheel folder known to pip has one
#   TORCH=cuda           the CUDA build, with the NVIDIA libraries it pins: make install TORCH=cuda

PYTHON ?= python3.11
TORCH  ?= cpu
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/installed-$(TORCH)

# DeepSpeed compiles its optional kernels at first use, so none are built at install time.
export DS_BUILD_OPS := 0

TORCH_VERSION := $(shell sed -n 's/^torch==\([0-9.]*\).*/\1/p' requirements.lock)
# '===' takes the exact public build; '==' lets pip prefer the same version's '+cpu' build.
TORCH_cpu  := torch==$(TORCH_VERSION)
TORCH_cuda := torch===$(TORCH_VERSION)

.PHONY: install demo test check format bench docs lock clean

install: $(STAMP)

# 1. torch, in the build asked for; 2. what building DeepSpeed from source needs;
# 3. everything else, exact versions and hashes; 4. this project, editable.
$(STAMP): requirements.lock pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check '$(TORCH_$(TORCH))'
	grep -E -A99 '^(setuptools|wheel)==' requirements.lock | awk '/^[a-z]/{keep=/^(setuptools|wheel)==/} keep' > $(VENV)/build.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes --no-deps -r $(VENV)/build.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes --no-deps --no-build-isolation -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	rm -f $(VENV)/installed-*
	touch $@

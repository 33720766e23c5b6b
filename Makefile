# `make demo` and `make test` do all set-up: they create .venv once, install into it once, and run.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEMO ?= runs/demo

# The compiler that setup.py uses. The default of make is another name for it, with which everything would compile again.
COMPILER := $(if $(filter default,$(origin CXX)),c++,$(CXX))
# The sanitizers run the tests of the CPU kernels, except those of builds and of memory: these need minutes there and
# cover no other code. Matrix tiles are emulated, so that the sanitizers see every read of a tile.
SANITIZED := sanitize-emulate-amx
SANITIZED_TIERS := baseline avx512 amx
NATIVE_TESTS := $(filter-out %_build.py %_memory.py,$(wildcard tests/kernels/*/test_cpu*.py)) \
	tests/kernels/route_topk/test_route_topk.py tests/kernels/grouped_mm/test_grouped_mm.py
# Without the tests of the whole side_moe, which spend their time in Triton's interpreter; test_cuda_rows.py stays.
CUDA_TESTS := $(filter-out tests/kernels/backends/% %/side_moe/test_cuda.py,$(wildcard tests/kernels/*/test_cuda*.py))
# Tests that run the same again in another order show sanitizers nothing new.
ONCE := not any_order and not order_of_blocks and not catalogue

# Processes of pytest-xdist. A test file runs in one process, because its tests share what its fixtures build. Without
# reordering, the last files are short, so that no process waits long for another.
WORKERS ?= auto
PARALLEL := -n $(WORKERS) --maxprocesses 8 --dist loadfile --no-loadscope-reorder

# The variants that `bench quality` trains on MovieLens.
LEVERS := growth,condition-none,no-ids,history-last,keep-last,keep-best,linear,condition-standardize,paper

.PHONY: demo test test-all docs wheel native sanitize bench bench-quality bench-quick lint clean

$(STAMP): pyproject.toml setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt torch setuptools wheel ninja
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt --no-build-isolation -e ".[dev]"
	@touch $@

# Compiles what has changed under csrc/, which is nothing right after the installation.
native: $(STAMP)
	$(BIN)/python setup.py -q build_ext --inplace

demo: native
	$(BIN)/xsmoe demo --folder $(DEMO)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy examples/*.py tools/*.py

test: native lint
	$(BIN)/python -m pytest $(PARALLEL) -m "not slow"

test-all: native lint docs
	$(BIN)/python -m pytest $(PARALLEL)

# The documentation as a site in build/site. Warnings are errors.
docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict -q

# A source distribution and a CPU wheel in dist/, installed and tried in a fresh environment without a compiler.
wheel: $(STAMP)
	$(BIN)/python tools/build_wheel.py

# Measure the kernels for bench/results/. It needs about an hour on an idle machine.
bench: native
	$(BIN)/python -m bench kernels side_moe --sizes N=2816 --seconds 10 --json bench/results/side_moe-cpu-float32.json
	$(BIN)/python -m bench kernels side_moe --seconds 4 --json bench/results/side_moe-cpu-float32-all-sizes.json
	$(BIN)/python -m bench kernels side_moe --dtype bfloat16 --sizes N=256,2816 E=1,10,32 --seconds 4 \
		--json bench/results/side_moe-cpu-bfloat16.json
	$(BIN)/python -m bench kernels route_topk grouped_mm --seconds 3 --json bench/results/routing-cpu-float32.json
	$(BIN)/python -m bench kernels in_batch_softmax_loss --sizes B=256 C=2640 --seconds 10 \
		--json bench/results/loss-cpu-float32.json
	$(BIN)/python -m bench kernels in_batch_softmax_loss --dtype bfloat16 --sizes B=256 C=2640 --variants eager,ours \
		--seconds 8 --json bench/results/loss-cpu-bfloat16.json
	$(BIN)/python -m bench kernels in_batch_softmax_loss --sizes B=32 C=20000,200000 --variants eager,ours --against eager \
		--seconds 8 --json bench/results/loss-cpu-float32-full-softmax.json
	$(BIN)/python -m bench kernels packed_attention --seconds 5 --json bench/results/attention-cpu-float32.json
	$(BIN)/python -m bench kernels rank_of_target topk_items --variants chunked,tiled,ours --against chunked,tiled \
		--seconds 10 --json bench/results/ranking-cpu-float32.json
	$(BIN)/python -m bench kernels rank_of_target --sizes M=2000 C=100000 d=128 --variants published,ours \
		--against published --seconds 10 --json bench/results/ranking-published-cpu-float32.json
	$(BIN)/python -m bench step mean cls --seconds 24 --json bench/results/step-cpu-float32.json
	$(BIN)/python -m bench step mean cls --dtype bfloat16 --variants published,plain,ours --seconds 20 \
		--json bench/results/step-cpu-bfloat16.json
	$(BIN)/python -m bench step mean --variants ours,ours-ids,ours-conditioned --against ours --seconds 24 \
		--json bench/results/step-ids-cpu-float32.json
	$(BIN)/python -m bench memory side_moe --variants naive,eager,compiled,ours,ours-recompute \
		--json bench/results/memory-side_moe-cpu-float32.json
	$(BIN)/python -m bench memory step --json bench/results/memory-step-cpu-float32.json
	$(BIN)/python -m bench stream --top-k 2 --json bench/results/stream-cpu.json
	$(BIN)/python -m bench.cli.profile mean --device cpu --dtype float32 --out bench/results/step-profile-cpu-float32.txt
	$(BIN)/python -m bench.report.docs_tables --write

# Measure the quality for docs/quality.md. It needs hours. XSMOE_MOVIELENS is the folder of ml-latest-small.
bench-quality: native
	$(BIN)/xsmoe prepare movielens "$(XSMOE_MOVIELENS)" runs/ml-latest-small
	$(BIN)/xsmoe encode runs/ml-latest-small runs/ml-latest-small-minilm --text minilm
	$(BIN)/python -m bench quality --dataset runs/ml-latest-small --store runs/ml-latest-small-minilm --windows 5 --seeds 5 \
		--jobs 2 --variants $(LEVERS) --json bench/results/quality-ml-latest-small.json
	$(BIN)/python -m bench quality --stream returning --folder runs/quality-returning --seeds 10 --jobs 2 --matrix \
		--variants growth,static,mean-gate,copy --json bench/results/quality-returning.json
	$(BIN)/python -m bench quality --stream catalogue --folder runs/quality-catalogue --seeds 5 --jobs 2 \
		--variants growth,mean-gate,copy --json bench/results/quality-catalogue.json
	$(BIN)/python -m bench.report.docs_tables --write

bench-quick: native
	$(BIN)/python -m pytest bench --benchmark-only

# LD_PRELOAD loads the sanitizers' runtimes before Python. libstdc++ is in the list, because they intercept exceptions.
# Leak detection is off, because Python frees little before it exits. pytest must not capture the sanitizers' reports.
sanitize: $(STAMP)
	XSMOE_SANITIZE=1 XSMOE_EMULATE_AMX=1 XSMOE_BUILD_TIERS="$(SANITIZED_TIERS)" \
	$(BIN)/python setup.py -q build_ext --inplace
	XSMOE_SANITIZE=1 XSMOE_EMULATE_CUDA=1 $(BIN)/python setup.py -q build_ext --inplace
	@runtimes="$$(for name in asan ubsan stdc++; do $(COMPILER) -print-file-name=lib$$name.so; done | paste -sd:)"; \
	export ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1; \
	LD_PRELOAD="$$runtimes" XSMOE_CUDA_LIBRARY=$(CURDIR)/build/sanitize-emulate-cuda/libxsmoe_cuda.so \
	$(BIN)/python -m pytest -q --capture=sys -m "not slow" -k "$(ONCE)" $(CUDA_TESTS) >build/sanitize-cuda.log 2>&1 & cuda=$$!; \
	LD_PRELOAD="$$runtimes" XSMOE_NATIVE_LIBRARY=$(CURDIR)/build/$(SANITIZED)/libxsmoe_cpu.so \
	$(BIN)/python -m pytest -q --capture=sys -m "not slow" $(NATIVE_TESTS); native=$$?; \
	echo "waiting for the tests of CUDA kernels"; wait $$cuda; code=$$?; \
	cat build/sanitize-cuda.log; exit $$((native | code))

clean:
	rm -rf $(VENV) build dist xsmoe_kernels/*.so xsmoe_kernels/libxsmoe_cpu.json xsmoe_kernels/_*build_failure.txt *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

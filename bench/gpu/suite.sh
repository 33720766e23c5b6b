#!/usr/bin/env bash
# Build, test, measure and sanitize on a machine with a GPU, in parts of at most eight minutes.
#
#   bench/gpu/suite.sh [--fresh] [build|test|bench|sanitize|all] [FOLDER]
#
# Results are written to FOLDER, by default bench/results. A part that has passed is not run again for the same commit,
# so the same command continues after an interruption; --fresh runs all parts. Logs are in FOLDER/.gpu_suite. The exit
# code is 1 if a part failed, 2 if there is no GPU or the command line is wrong. See docs/benchmarking.md.
set -uo pipefail
caller=$PWD
cd "$(dirname "$0")/../.." || exit 2

PYTHON=${PYTHON:-python3}
PART_SECONDS=${GPU_SUITE_PART_SECONDS:-480}

usage() {
    sed -n '2,8s/^# \{0,1\}//p' bench/gpu/suite.sh >&2
    exit 2
}

fresh=no
asked=()
for argument in "$@"; do
    case $argument in
        --fresh) fresh=yes ;;
        -*) usage ;;
        *) asked+=("$argument") ;;
    esac
done
stage=${asked[0]:-all}
folder=${asked[1]:-$PWD/bench/results}
case $folder in
    /*) ;;
    *) folder=$caller/$folder ;;
esac
[ ${#asked[@]} -le 2 ] || usage
case $stage in
    build | test | bench | sanitize | all) ;;
    *) usage ;;
esac

if ! gpu=$("$PYTHON" -m bench.gpu.name); then
    echo "bench/gpu/suite.sh: torch finds no GPU here, or $PYTHON has no torch (PYTHON names another)" >&2
    exit 2
fi
mkdir -p "$folder/.gpu_suite" || exit 2
folder=$(cd "$folder" && pwd)
state=$folder/.gpu_suite
[ "$fresh" = no ] || rm -f "$state"/*

# The parts depend on the commit, and on the sources if they differ from it or the commit is unknown.
sources() {
    find xsmoe_kernels xsmoe bench tests/kernels tests/stream tests/conftest.py tests/stand_ins.py csrc setup.py \
        pyproject.toml -type f \
        \( -name '*.py' -o -name '*.sh' -o -name '*.cpp' -o -name '*.cu' -o -name '*.h' -o -name '*.toml' \) -print0 |
        sort -z | xargs -0 sha256sum | sha256sum | cut -c1-8
}
commit=${GPU_SUITE_COMMIT:-}
if [ -z "$commit" ]; then
    commit=$(git rev-parse --short=12 HEAD 2>/dev/null) || commit=unknown
    changed=$(git status --porcelain -- xsmoe_kernels xsmoe bench tests csrc setup.py pyproject.toml ':!bench/results' \
        2>/dev/null || echo yes)
    [ -z "$changed" ] || commit=$commit-$(sources)
fi
# The results have the same commit as the markers.
export GPU_SUITE_COMMIT=$commit

failures=0
running=

# Ctrl-C stops the running part. Its marker is already "failed".
interrupted() {
    trap '' INT TERM
    if [ -n "$running" ]; then
        kill -TERM "$running" 2>/dev/null
        wait "$running"
    fi
    echo "bench/gpu/suite.sh: interrupted" >&2
    exit 130
}
trap interrupted INT TERM

# A marker is NAME.passed, NAME.failed or NAME.absent. It contains the commit and a message.
mark() {
    forget "$1"
    echo "$commit $3" >"$state/$1.$2"
}

forget() {
    rm -f "$state/$1".{passed,failed,absent}
}

marked() {
    [ "$(cut -d' ' -f1 "$state/$1.$2" 2>/dev/null)" = "$commit" ]
}

# part NAME COMMAND...: run the command once for this commit; print its last lines if it fails.
part() {
    local name=$1 begin=$SECONDS code
    shift
    if marked "$name" passed; then
        echo "$name: passed before"
        return
    fi
    # If this script is killed while the part runs, the part must not remain passed.
    mark "$name" failed "did not finish"
    rm -f "$state/$name.xml"
    echo "$name: $*"
    timeout -k 10 "$PART_SECONDS" "$@" >"$state/$name.log" 2>&1 &
    running=$!
    wait "$running"
    code=$?
    running=
    if [ $code -eq 0 ]; then
        mark "$name" passed "$((SECONDS - begin)) s"
        echo "$name: passed in $((SECONDS - begin)) s"
    else
        failures=$((failures + 1))
        [ $code -ne 124 ] || code="stopped after $PART_SECONDS s"
        mark "$name" failed "$code"
        tail -n 40 "$state/$name.log"
        echo "$name: FAILED ($code); the whole log is $state/$name.log"
    fi
}

# absent NAME REASON: record why a part cannot run here. This is not a failure.
absent() {
    mark "$1" absent "$2"
    echo "$1: left out: $2"
}

build() {
    local reason
    if command -v "${CXX:-c++}" >/dev/null; then
        part build "$PYTHON" setup.py build_ext --inplace
    else
        absent build "there is no C++ compiler ${CXX:-c++}; neither the CUDA kernels nor those for CPUs can be built"
    fi
    # Triton's kernels work without them.
    forget cuda_kernels
    reason=$("$PYTHON" -m bench.gpu.summary --no-cuda-kernels) && absent cuda_kernels "$reason"
}

# Arguments: the part's name, what pytest's -k selects, and the files or folders.
pytest() {
    local name=$1 selected=$2
    shift 2
    part "$name" "$PYTHON" -m pytest -q -p no:cacheprovider -m "not slow" "$@" \
        ${selected:+-k "$selected"} "--junitxml=$state/$name.xml"
}

test_gpu() {
    local tests=tests/kernels
    pytest test_side_moe "" $tests/side_moe/test_triton.py
    pytest test_routing "" $tests/route_topk/test_gpu.py $tests/route_topk/test_triton.py $tests/grouped_mm/test_triton.py
    pytest test_loss "" $tests/in_batch_softmax_loss/test_triton*.py
    pytest test_ranking "" $tests/rank_of_target/test_triton.py $tests/topk_items/test_triton.py
    pytest test_cuda "" $tests/*/test_cuda.py $tests/side_moe/test_cuda_rows.py $tests/backends/test_cuda_emulation.py
    pytest test_step "on_a_gpu" tests/stream
    pytest test_rest "" $tests/side_moe/test_triton_group.py $tests/packed_attention/test_xformers.py
}

kernels() {
    local name=$1 file=$2
    shift 2
    part "$name" "$PYTHON" -m bench kernels "$@" --device cuda --json "$folder/$file"
}

bench() {
    local baselines="naive,naive-autocast,naive-narrow,compiled,compiled-graph,eager,eager-graph"
    local usual="N=2816 E=10 D=768 R=64 M=2"
    # These decide which backend "auto" should select (docs/cuda_kernels.md).
    local kinds="ours-triton,ours-triton-graph,ours-cuda,ours-cuda-graph"
    # shellcheck disable=SC2086 # sizes are words
    {
        kernels bench_bfloat16 "side_moe-$gpu-bfloat16.json" side_moe --dtype bfloat16 --sizes $usual \
            --variants "$baselines,ours,ours-recompute,ours-graph,$kinds" \
            --against naive,naive-autocast,compiled,compiled-graph,eager-graph
        kernels bench_float16 "side_moe-$gpu-float16.json" side_moe --dtype float16 --sizes $usual \
            --variants naive-autocast,compiled-graph,eager,eager-graph,ours,ours-graph \
            --against naive-autocast,compiled-graph,eager-graph
        kernels bench_float32 "side_moe-$gpu-float32.json" side_moe --sizes $usual \
            --variants "naive,compiled,compiled-graph,eager,eager-graph,ours,ours-graph,$kinds" \
            --against naive,compiled,compiled-graph,eager-graph
        kernels bench_sizes "side_moe-$gpu-bfloat16-sizes.json" side_moe --dtype bfloat16 --seconds 2 \
            --sizes N=256,2816,65536 E=1,10,32 --against naive-autocast,eager-graph \
            --variants naive-autocast,eager,eager-graph,ours,ours-graph,ours-triton-graph,ours-cuda-graph
    }
    kernels bench_routing "routing-$gpu-bfloat16.json" route_topk grouped_mm --dtype bfloat16 --seconds 2
    kernels bench_loss_float32 "loss-$gpu-float32.json" in_batch_softmax_loss --seconds 2
    kernels bench_loss_bfloat16 "loss-$gpu-bfloat16.json" in_batch_softmax_loss --dtype bfloat16 --seconds 2
    kernels bench_attention "attention-$gpu-bfloat16.json" packed_attention --dtype bfloat16 --seconds 2
    local dtype
    for dtype in float32 bfloat16; do
        kernels "bench_ranking_$dtype" "ranking-$gpu-$dtype.json" rank_of_target --dtype "$dtype" --seconds 2 \
            --variants "chunked,tiled,ours,ours-graph,$kinds" --against chunked,tiled
        kernels "bench_topk_$dtype" "topk-$gpu-$dtype.json" topk_items --dtype "$dtype" --seconds 2 \
            --variants chunked,tiled,ours,ours-graph --against chunked,tiled
    done
    # The cost of counting in a whole step.
    part bench_counters "$PYTHON" -m bench step mean --dtype bfloat16 --device cuda --variants ours,ours-uncounted \
        --against ours-uncounted --json "$folder/counters-$gpu-bfloat16.json"
    part bench_step "$PYTHON" -m bench step --dtype bfloat16 --device cuda --json "$folder/step-$gpu-bfloat16.json"
    local name
    for name in side_moe step; do
        part "memory_$name" "$PYTHON" -m bench memory "$name" --dtype bfloat16 --device cuda \
            --json "$folder/memory-$name-$gpu-bfloat16.json" --snapshot "$folder/memory-$name-$gpu-snapshot.pickle" \
            --plot "$folder/memory-$gpu"
    done
    # Windows as the number of experts grows: eagerly, which separates the parts of a step, and as CUDA graphs, which are
    # captured again in every window.
    part stream "$PYTHON" -m bench stream --dtype bfloat16 --device cuda --top-k 2 --epochs 10 \
        --json "$folder/stream-$gpu-bfloat16.json"
    part stream_graph "$PYTHON" -m bench stream --dtype bfloat16 --device cuda --top-k 2 --epochs 10 --graph \
        --json "$folder/stream-graph-$gpu-bfloat16.json"
    part profile "$PYTHON" -m bench.cli.profile --out "$folder/side_moe-profile-$gpu.txt"
    part profile_step "$PYTHON" -m bench.cli.profile mean --out "$folder/step-profile-$gpu.txt"
    # Its inputs may be new.
    forget roofline
    if "$PYTHON" -c "import matplotlib" 2>/dev/null; then
        # A failed part writes no file, or a file with its first cases only.
        local steps=() file
        for file in "side_moe-$gpu-bfloat16" "side_moe-$gpu-bfloat16-sizes" "step-$gpu-bfloat16"; do
            [ ! -s "$folder/$file.json" ] || steps+=("$folder/$file.json")
        done
        if [ ${#steps[@]} -gt 0 ]; then
            part roofline "$PYTHON" -m bench roofline "${steps[@]}" --plot "$folder/roofline-$gpu.png"
        else
            absent roofline "nothing was measured"
        fi
    else
        absent roofline "matplotlib is not installed"
    fi
}

# Print why compute-sanitizer does not work here; print nothing if it works.
sanitizer_fails() {
    local said
    said=$(timeout -k 10 120 "$1" --tool memcheck --report-api-errors no --error-exitcode 9 \
        "$PYTHON" -c "import torch; torch.ones(3, device='cuda').sum().item()" 2>&1 </dev/null) && return
    said=$(grep -i -m 1 error <<<"$said" || tail -n 1 <<<"$said")
    echo "compute-sanitizer does not work here: ${said:-it prints nothing}"
}

sanitize() {
    local tool wrong="compute-sanitizer is not installed" check problem flags
    tool=$(PATH=$PATH:/usr/local/cuda/bin command -v compute-sanitizer) && wrong=$(sanitizer_fails "$tool")
    for check in memcheck racecheck synccheck; do
        forget "$check"
        if [ -n "$wrong" ]; then
            absent "$check" "$wrong"
            continue
        fi
        flags=
        # A driver call of torch that is refused is not an error of a kernel.
        [ "$check" != memcheck ] || flags="--report-api-errors no"
        for problem in "side_moe side_moe N=300 E=3 D=768 R=64 M=2" "side_moe_small side_moe N=300 E=3 D=48 R=8 M=2" \
            "side_moe_many side_moe N=300 E=33 D=64 R=16 M=2 --dtype float32" \
            "route_topk route_topk N=300 E=5 k=2" "route_topk_wide route_topk N=3000 E=300 k=3 --dtype float32" \
            "route_topk_narrow route_topk N=3000 E=40 k=2 --dtype float32" "grouped_mm grouped_mm M=300 E=3 K=48 P=8" \
            "rank_of_target rank_of_target M=70 C=900 d=48" "topk_items topk_items M=70 C=900 d=48 k=10" \
            "rank_of_target_wide rank_of_target M=150 C=900 d=48 --dtype float32" \
            "rank_of_target_odd rank_of_target M=20 C=900 d=37 --dtype float32" \
            "loss in_batch_softmax_loss B=30 C=290 d=40"; do
            # Each tensor gets its own allocation, so that an access beyond it is detected.
            # shellcheck disable=SC2086 # the words of the flags and of the problem
            part "${check}_${problem%% *}" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
                "$tool" --tool "$check" $flags --error-exitcode 9 "$PYTHON" -m bench.gpu.sanitize ${problem#* }
        done
    done
}

case $stage in
    build) build ;;
    test) test_gpu ;;
    bench) bench ;;
    sanitize) sanitize ;;
    all)
        build
        test_gpu
        bench
        sanitize
        ;;
esac

echo
"$PYTHON" -m bench.gpu.summary "$folder" --commit "$commit" | tee "$folder/gpu-suite-$gpu.md" ||
    failures=$((failures + 1))
for failed in "$state"/*.failed; do
    failed=${failed##*/}
    ! marked "${failed%.failed}" failed || failures=$((failures + 1))
done
[ "$failures" -eq 0 ]

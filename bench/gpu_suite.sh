#!/usr/bin/env bash
# Builds, tests, measures and sanitizes on a machine with a GPU, in parts that take eight minutes at most.
#
#   bench/gpu_suite.sh [--fresh] [build|test|bench|sanitize|all] [FOLDER]
#
# Results go to FOLDER, by default bench/results. A part that has passed is not run again for the same commit, so that
# the same command goes on after an interruption; --fresh runs all. Logs are in FOLDER/.gpu_suite. The exit code is 1 if
# a part failed, 2 if there is no GPU or the command line is wrong. docs/benchmarking.md says more.
set -uo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
PART_SECONDS=${GPU_SUITE_PART_SECONDS:-480}

usage() {
    sed -n '2,8s/^# \{0,1\}//p' bench/gpu_suite.sh >&2
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
folder=${asked[1]:-bench/results}
[ ${#asked[@]} -le 2 ] || usage
case $stage in
    build | test | bench | sanitize | all) ;;
    *) usage ;;
esac

if ! gpu=$("$PYTHON" -m bench.gpu_summary --gpu); then
    echo "bench/gpu_suite.sh: torch finds no GPU here" >&2
    exit 2
fi
mkdir -p "$folder/.gpu_suite" || exit 2
folder=$(cd "$folder" && pwd)
state=$folder/.gpu_suite
[ "$fresh" = no ] || rm -f "$state"/*

# What the parts depend on: the commit, and the sources themselves where they differ from it or nobody knows it.
sources() {
    find xsmoe_kernels bench tests/kernels csrc setup.py -type f \
        \( -name '*.py' -o -name '*.sh' -o -name '*.cpp' -o -name '*.cu' -o -name '*.h' -o -name '*.cuh' \) -print0 |
        sort -z | xargs -0 sha256sum | sha256sum | cut -c1-8
}
commit=${GPU_SUITE_COMMIT:-}
if [ -z "$commit" ]; then
    commit=$(git rev-parse --short=12 HEAD 2>/dev/null) || commit=unknown
    changed=$(git status --porcelain -- xsmoe_kernels bench tests csrc setup.py ':!bench/results' 2>/dev/null || echo yes)
    [ -z "$changed" ] || commit=$commit-$(sources)
fi

# part NAME COMMAND...: runs it once for this commit; its last lines are shown if it fails.
part() {
    local name=$1 marker=$state/$1-$commit begin=$SECONDS code
    shift
    if [ -e "$marker" ]; then
        echo "$name: passed before"
        return
    fi
    rm -f "$state/$name.failed" "$state/$name.absent"
    echo "$name: $*"
    timeout -k 10 "$PART_SECONDS" "$@" >"$state/$name.log" 2>&1
    code=$?
    if [ $code -eq 0 ]; then
        rm -f "$state/$name"-*
        echo "$((SECONDS - begin)) s" >"$marker"
        echo "$name: passed in $((SECONDS - begin)) s"
    else
        [ $code -ne 124 ] || code="stopped after $PART_SECONDS s"
        echo "$code" >"$state/$name.failed"
        tail -n 40 "$state/$name.log"
        echo "$name: FAILED ($code); the whole log is $state/$name.log"
    fi
}

# absent NAME REASON: says why a part cannot run here, which is no failure.
absent() {
    rm -f "$state/$1.failed"
    echo "$2" >"$state/$1.absent"
    echo "$1: left out: $2"
}

build() {
    if command -v "${CXX:-c++}" >/dev/null; then
        part build "$PYTHON" setup.py build_ext --inplace
    else
        absent build "there is no C++ compiler ${CXX:-c++}; the kernels for CPUs are not needed here"
    fi
}

pytest() {
    local name=$1 selected=$2
    part "$name" "$PYTHON" -m pytest -q -p no:cacheprovider -m "not slow" tests/kernels \
        -k "$selected" "--junitxml=$state/$name.xml"
}

test_gpu() {
    pytest test_side_moe "test_triton_side_moe"
    pytest test_routing "test_triton_route_topk or test_triton_grouped_mm"
    pytest test_rest "triton and not test_triton_side_moe and not test_triton_route_topk and not test_triton_grouped_mm"
}

kernels() {
    local name=$1 file=$2
    shift 2
    part "$name" "$PYTHON" -m bench kernels "$@" --device cuda --json "$folder/$file"
}

bench() {
    local narrow="naive,naive-autocast,naive-narrow,compiled,compiled-graph,eager,ours,ours-recompute,ours-graph"
    local usual="N=2816 E=10 D=768 R=64 M=2"
    # shellcheck disable=SC2086 # sizes are words
    {
        kernels bench_bfloat16 "side_moe-$gpu-bfloat16.json" side_moe --dtype bfloat16 --sizes $usual \
            --variants "$narrow" --against naive,naive-autocast,compiled,compiled-graph
        kernels bench_float16 "side_moe-$gpu-float16.json" side_moe --dtype float16 --sizes $usual \
            --variants naive-autocast,compiled-graph,eager,ours,ours-graph --against naive-autocast,compiled-graph
        kernels bench_float32 "side_moe-$gpu-float32.json" side_moe --sizes $usual \
            --variants naive,compiled,compiled-graph,eager,ours,ours-graph --against naive,compiled,compiled-graph
        kernels bench_sizes "side_moe-$gpu-bfloat16-sizes.json" side_moe --dtype bfloat16 --seconds 2 \
            --sizes N=256,2816,65536 E=1,10,32 --variants naive-autocast,eager,ours,ours-graph
    }
    kernels bench_routing "routing-$gpu-bfloat16.json" route_topk grouped_mm --dtype bfloat16 --seconds 2
    part profile "$PYTHON" -m bench.gpu_profile --out "$folder/side_moe-profile-$gpu.txt"
    if "$PYTHON" -c "import matplotlib" 2>/dev/null; then
        part roofline "$PYTHON" -m bench.roofline "$folder/roofline-$gpu.png" \
            "$folder/side_moe-$gpu-bfloat16.json" "$folder/side_moe-$gpu-bfloat16-sizes.json"
    else
        absent roofline "matplotlib is not installed"
    fi
}

sanitize() {
    local tool check room
    tool=$(PATH=$PATH:/usr/local/cuda/bin command -v compute-sanitizer)
    for check in memcheck racecheck; do
        if [ -z "$tool" ]; then
            absent "$check" "compute-sanitizer is not here"
            continue
        fi
        for room in "side_moe --sizes N=300 E=3 D=48 R=8 M=2" "route_topk --sizes N=300 E=5" \
            "grouped_mm --sizes M=300 E=3 K=48 P=8"; do
            # Every tensor in an allocation of its own, so that what lies beyond it is seen.
            # shellcheck disable=SC2086 # the room's words
            part "${check}_${room%% *}" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
                "$tool" --tool "$check" --error-exitcode 9 \
                "$PYTHON" -m bench kernels $room --device cuda --dtype bfloat16 --seconds 0.01 --variants ours
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
"$PYTHON" -m bench.gpu_summary "$folder" | tee "$folder/gpu-suite-$gpu.md"
for failed in "$state"/*.failed; do
    [ ! -e "$failed" ] || exit 1
done
exit 0

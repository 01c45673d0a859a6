#!/usr/bin/env bash
# Everything that needs a GPU, in three commands that take twelve minutes together. No network.
#
#   tools/gpu_check.sh OUT [check | op | model ...]
#
# Commands, all three by default, their stages, and the limits of these in seconds. What stands in one line runs side by
# side. Every command begins with the first line; what is installed or built already is not made again.
#            install    40  the packages of $WHEELS (a folder of wheels), if that is set
#            build     110  the operator for the GPU at hand, or a copy of $OPERATOR, built before
#   check    tests     170  the tests that need CUDA, by several processes where pytest-xdist is installed
#            sanitize  170  compute-sanitizer on a few of them
#            amp       170  300 training steps of a small two-stage model in float32, bfloat16 and float16, and its AP
#   op       op        150  the operator's times, and those of deterministic sums
#   model    infer      80  the model's times of detection: eager, prepared, CUDA graphs; one, two and four images
#            train      80  of training steps: TF32 and bfloat16; one, two and four images; activation checkpoints
#            compiled  120  of both, compiled
# amp and model need Detectron2, and are skipped without it. A stage that fails or runs out of time stops no other.
# OUT/results.json has the device, the versions, the date, and of each stage its result, seconds, text and numbers.
#
# Needs nvcc, unless the operator is built, and a Python (PYTHON, default python3) with torch, pytest, setuptools and
# tabulate. BUDGET: seconds for everything, if less than the sum. WORK: a folder for what is built and installed, and
# what is not worth keeping (output/gpu_check). DEVICE=cpu tries the stages without a GPU, as far as they go; QUICK=1
# makes them short.
#
# WHEELS for Detectron2, made with the Python version of that machine, where torchvision, scipy, OpenCV and matplotlib
# are expected:
#   pip wheel --no-deps -c constraints.txt -w FOLDER antlr4-python3-runtime black fvcore hydra-core iopath \
#       mypy_extensions omegaconf platformdirs portalocker pycocotools pydot pytokens termcolor yacs
#   (cd tools; python -c 'import pathlib, sys, install_detectron2 as d
#   folder = pathlib.Path(sys.argv[1]); d.repackage(d.fetch_sdist(folder), folder)' FOLDER)
# OPERATOR, for one architecture and the torch of that machine:
#   FORCE_CUDA=1 TORCH_CUDA_ARCH_LIST=9.0 python setup.py build_ext --build-lib FOLDER
set -euo pipefail
script=$(realpath "$0")
declare -A limits=([install]=40 [build]=110 [tests]=170 [sanitize]=170 [amp]=170 [op]=150
    [infer]=80 [train]=80 [compiled]=120)
# In each command one step after the other, and the stages of a step side by side.
declare -A commands=([check]="tests+sanitize+amp" [op]="op" [model]="infer train compiled")
python=${PYTHON:-python3}
device=${DEVICE:-cuda}
quick=${QUICK:-0}
if [ $# -eq 0 ]; then sed -n '2,/^set/s/^# \{0,1\}//p' "$script" >&2; exit 2; fi
out=$(realpath -m "$1")
[ -z "${WHEELS:-}" ] || WHEELS=$(realpath "$WHEELS")
[ -z "${OPERATOR:-}" ] || OPERATOR=$(realpath "$OPERATOR")
shift
cd "$(dirname "$script")/.."
work=$(realpath -m "${WORK:-output/gpu_check}")
site=$work/site
export PYTHONPATH=$site:$PWD/projects${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
export TORCHINDUCTOR_CACHE_DIR=$work/inductor

# Exit status 77: skipped.
need_detectron2() {
    "$python" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("detectron2") is None)' || exit 77
}

# Whether our kernel, and not the twin, runs on the device.
has_operator() {
    "$python" -c 'import sys
from deformable_detr.layers import _ops
sys.exit(None if _ops.has_kernel(sys.argv[1]) else f"no {sys.argv[1]} kernel: {_ops.unavailable_reason}")' "$device"
}

run_install() {
    [ -n "${WHEELS:-}" ] || exit 77
    [ ! -e "$site/.complete" ] || exit 0
    "$python" -m pip install --no-index --no-deps --no-compile --upgrade --target "$site" "$WHEELS"/*.whl
    touch "$site/.complete"
}

run_build() {
    if [ -n "${OPERATOR:-}" ]; then
        cp "$OPERATOR" projects/deformable_detr/
    elif [ "$device" = cuda ]; then
        TORCH_CUDA_ARCH_LIST=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1)
        export TORCH_CUDA_ARCH_LIST FORCE_CUDA=1 MAX_JOBS=${MAX_JOBS:-$(nproc)}
        "$python" setup.py build_ext --inplace
    else
        "$python" setup.py build_ext --inplace
    fi
    has_operator
}

# Sets pytest, and tests: the files with tests that need CUDA. Those of the operator need torch alone.
find_tests() {
    has_operator
    pytest=("$python" -m pytest -q -rs --tb=short --maxfail=20 -p no:cacheprovider)
    tests=(tests/layers)
    if "$python" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("detectron2") is None)'; then
        mapfile -t -O 1 tests < <(grep -rl --include='test_*.py' 'mark\.cuda' tests | grep -v '^tests/layers/')
    else
        pytest+=(--confcutdir tests/layers)
    fi
}

run_tests() {
    find_tests
    local which=(-m cuda) processes=8
    # The report of the environment needs Detectron2.
    if [ "$device" = cpu ]; then which=(-m "not cuda" -k "not environment_report and not two_devices"); fi
    if [ "$quick" = 1 ]; then which=(-m "not cuda" -k "every_head_dimension and -32-"); fi
    [ "$(nproc)" -ge $processes ] || processes=$(nproc)
    if "$python" -c 'import xdist' 2>/dev/null; then pytest+=(-n $processes); fi
    "${pytest[@]}" "${which[@]}" "${tests[@]}"
}

run_sanitize() {
    command -v compute-sanitizer || exit 77
    find_tests
    # PyTorch's cache of memory would hide what is read or written behind the end of a tensor.
    export PYTORCH_NO_CUDA_MEMORY_CACHING=1
    local failed=0 only_ours=(--kernel-regex kns=deformable_detr) which tools=(memcheck racecheck initcheck)
    which="cuda and (every_head_dimension and (-30- or -32-) or deterministic or one_query_per_pixel and -3]"
    which+=" or many_tiles and bfloat16 and 4 or a_decoder_equals and bfloat16 and (-0.499 or -0.35))"
    declare -A processes
    for tool in "${tools[@]}"; do
        # It has to see who writes what our kernels read.
        if [ $tool = initcheck ]; then only_ours=(); fi
        timeout --kill-after 5 $((limit - 10)) compute-sanitizer --tool $tool --target-processes all \
            "${only_ours[@]}" --error-exitcode 9 "${pytest[@]}" -k "$which" \
            tests/layers/test_ms_deform_attn_gradients.py tests/layers/test_ms_deform_attn_cuda.py > "$work/$tool.txt" 2>&1 &
        processes[$tool]=$!
    done
    for tool in "${tools[@]}"; do
        local status=0
        wait "${processes[$tool]}" || status=$?
        echo "== $tool: status $status"
        tail -n 40 "$work/$tool.txt"
        [ $status = 0 ] || failed=1
    done
    return $failed
}

train_net() { # folder, then KEY VALUE pairs
    local folder=$work/$1
    shift
    rm -rf "$folder"
    "$python" train_net.py --config-file configs/quick_schedules/shapes_two_stage.yaml \
        --train-json "$work/shapes/train.json" --train-images "$work/shapes/train" \
        --val-json "$work/shapes/val.json" --val-images "$work/shapes/val" \
        OUTPUT_DIR "$folder" MODEL.DEVICE "$device" SOLVER.MAX_ITER $((quick ? 2 : 300)) SEED 1 "$@"
}

run_amp() {
    need_detectron2
    [ -e "$work/shapes/val.json" ] || "$python" tools/make_shapes_dataset.py "$work/shapes" --train 200 --val 50
    local failed=0
    declare -A processes options=([float32]="" [bfloat16]="SOLVER.AMP.ENABLED True SOLVER.AMP.PRECISION bfloat16"
        [float16]="SOLVER.AMP.ENABLED True SOLVER.AMP.PRECISION float16")
    for precision in "${!options[@]}"; do
        # shellcheck disable=SC2086
        train_net "amp_$precision" ${options[$precision]} > "$work/amp_$precision.txt" 2>&1 &
        processes[$precision]=$!
    done
    for precision in "${!options[@]}"; do
        local status=0
        wait "${processes[$precision]}" || status=$?
        echo "== $precision: status $status"
        if [ $status = 0 ]; then cat "$work/amp_$precision/metrics.json"; else tail -n 20 "$work/amp_$precision.txt"; fi
        [ $status = 0 ] || failed=1
    done
    return $failed
}

# One benchmark, whose numbers are on disk before the next begins; that one fails stops no other.
measure() { # name of its numbers, then the command line
    local name=$1
    shift
    "$python" -m deformable_detr.benchmark "$@" --devices "$device" --json "$numbers/$name.json" || failed=1
}

run_op() {
    has_operator
    [ "$device" = cpu ] || nvidia-smi || true  # what else runs there, clocks, temperature
    local shapes=(r50_1333 r50_1333_decoder dino_5scale) batches=(1 2 4) dtypes=(float32 bfloat16 float16)
    local alone=(--rounds 5 --peers) failed=0
    if [ "$device" = cuda ]; then alone=(--cuda-graphs "${alone[@]}"); fi
    if [ "$quick" = 1 ]; then shapes=(r50_decoder) batches=(1) dtypes=(float32); fi
    for shape in "${shapes[@]}"; do
        measure "$shape" op --shapes "$shape" --batches "${batches[@]}" --dtypes "${dtypes[@]}" "${alone[@]}"
    done
    measure uniform op --shapes "${shapes[0]}" --distributions uniform --dtypes "${dtypes[@]}" "${alone[@]}"
    measure deterministic op --shapes "${shapes[@]:0:2}" --deterministic "${alone[@]}"
    measure twin op --shapes "${shapes[@]:0:2}" --dtypes "${dtypes[@]:0:2}" --rounds 5 --peers twin
    return $failed
}

# What the model's benchmarks have in common.
set_model_options() {
    need_detectron2
    has_operator
    options=(--sizes 800x1333 --warmup 3 --rounds 15 --peers) batches=(1 2 4) failed=0
    if [ "$quick" = 1 ]; then options=(--sizes 64x96 --warmup 1 --rounds 1 --peers) batches=(1); fi
}

run_infer() {
    set_model_options
    local precisions=(tf32 bfloat16 float16)
    measure infer model "${options[@]}" --batches "${batches[@]}" --precision "${precisions[@]}" --modes eager prepared
    # Without graphs. On a CPU there are none.
    if [ "$device" = cuda ]; then
        measure one_by_one model "${options[@]}" --precision "${precisions[@]}" --modes prepared --no-cuda-graphs
    fi
    return $failed
}

run_train() {
    set_model_options
    local kinds=(default)
    if [ "$device" = cuda ]; then kinds+=(graphs); fi
    measure train train "${options[@]}" --batches "${batches[@]}" --precision tf32 bfloat16 --options "${kinds[@]}"
    measure checkpoint train "${options[@]}" --batches 2 --precision bfloat16 --options checkpoint
    return $failed
}

run_compiled() {
    set_model_options
    measure train train "${options[@]}" --batches "${batches[@]}" --precision bfloat16 --options compiled
    measure infer model "${options[@]}" --batches 1 --precision bfloat16 --modes compiled
    return $failed
}

# Adds one stage to results.json; several may do so at a time. Imports no torch, which takes seconds.
record() { # stage status seconds
    "$python" - "$out" "$work" "$device" "$@" <<'PYTHON'
import datetime, fcntl, importlib.metadata, json, os, platform, subprocess, sys
from pathlib import Path

out, work, device, stage, status, seconds = Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:]
path = out / "results.json"
with open(work / "lock", "w") as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    results = json.loads(path.read_text()) if path.exists() else {"stages": {}}
    names = ("torch", "torchvision", "triton", "detectron2", "numpy", "pytest", "transformers", "mmcv")
    installed = {d.name.lower(): d.version for d in reversed(list(importlib.metadata.distributions())) if d.name}
    results["date"] = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    results["device"] = platform.processor() or "cpu"
    if device == "cuda":
        query = "nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader"
        results["device"] = subprocess.getoutput(query)
    results["processors"] = os.cpu_count()
    results["versions"] = {"python": platform.python_version()}
    results["versions"].update({name: installed[name] for name in names if name in installed})
    numbers = {file.stem: json.loads(file.read_text()) for file in sorted((work / "numbers" / stage).glob("*.json"))}
    text = (work / f"{stage}.txt").read_text(errors="replace").splitlines()
    results["stages"][stage] = {"result": status, "seconds": int(seconds), "numbers": numbers, "text": text[-300:]}
    path.with_suffix(".new").write_text(json.dumps(results, indent=1) + "\n")
    path.with_suffix(".new").replace(path)
PYTHON
}

if [ "${1:-}" = --run ]; then
    limit=$3 numbers=$work/numbers/$2
    "run_$2"
    exit
fi

# Runs a stage within its limit and what is left of the budget; shows and records what became of it.
run_stage() { # stage
    local stage=$1 start=$SECONDS status=0 limit=${limits[$1]} result
    limit=$((end - SECONDS < limit ? end - SECONDS : limit))
    [ $limit -gt 0 ] || limit=1
    rm -rf "$work/numbers/$stage"
    mkdir -p "$work/numbers/$stage"
    timeout --kill-after 5 $limit bash "$script" "$out" --run "$stage" $limit > "$work/$stage.txt" 2>&1 || status=$?
    case $status in
        0) result=passed ;;
        77) result=skipped ;;
        124 | 137) result="ended after $limit s" ;;
        *) result="failed with status $status" ;;
    esac
    echo "$stage: $result in $((SECONDS - start)) s ($work/$stage.txt)"
    [ "$result" = passed ] || [ "$result" = skipped ] || tail -n 20 "$work/$stage.txt" || true
    record "$stage" "$result" $((SECONDS - start)) || echo "$stage: not recorded"
    [ "$result" = passed ] || [ "$result" = skipped ]
}

[ $# -gt 0 ] || set -- check op model
steps=(install+build)
for command in "$@"; do
    [ -n "${commands[$command]:-}" ] || { echo "unknown command $command; there are: check op model" >&2; exit 2; }
    # shellcheck disable=SC2206
    steps+=(${commands[$command]})
done
end=$((SECONDS + ${BUDGET:-3600}))
mkdir -p "$out" "$work"
failed=0
for step in "${steps[@]}"; do
    processes=()
    for stage in ${step//+/ }; do
        run_stage "$stage" &
        processes+=($!)
    done
    for process in "${processes[@]}"; do wait "$process" || failed=1; done
done
exit $failed

#!/usr/bin/env bash
# Everything that needs a GPU, in stages. No network.
#
#   tools/gpu_check.sh OUT [stage...]
#
# Stages, all of them by default, and their limits in seconds:
#   install    40  the packages of $WHEELS (a folder of wheels), if that is set
#   build     180  the operator, with CUDA
#   tests     180  its tests on CUDA
#   sanitize  160  compute-sanitizer on a few of them
#   benchmark 340  the operator's times; in OUT/benchmark_*.json, with deterministic sums in OUT/deterministic.json
#   amp       120  20 training steps of the two-stage model in float32, bfloat16 and float16
#   train     220  a short training of it with evaluation
# The last two need Detectron2 and are skipped without it. A stage that fails or runs out of time does not stop the
# next, and time that one leaves over goes to those after it. On a machine that is lent for ten minutes a command:
#   tools/gpu_check.sh OUT install build tests sanitize
#   tools/gpu_check.sh OUT install build benchmark
#   tools/gpu_check.sh OUT install build amp train
# Each stage writes OUT/<stage>.txt; OUT/results.json has the device, the versions and what became of each stage.
#
# Needs nvcc and a Python (PYTHON, default python3) with torch, pytest, setuptools and tabulate. BUDGET: seconds for all
# stages together, if less than the sum of their limits. WORK: a folder for what is not worth keeping
# (output/gpu_check). DEVICE=cpu tries the stages without a GPU, as far as they go; ITERATIONS and ROUNDS make them
# shorter.
#
# WHEELS for Detectron2, made with the Python version of that machine, where torchvision, scipy, OpenCV and matplotlib
# are expected:
#   pip wheel --no-deps -c constraints.txt -w FOLDER antlr4-python3-runtime black fvcore hydra-core iopath \
#       mypy_extensions omegaconf platformdirs portalocker pycocotools pydot pytokens termcolor yacs
#   (cd tools; python -c 'import pathlib, sys, install_detectron2 as d
#   folder = pathlib.Path(sys.argv[1]); d.repackage(d.fetch_sdist(folder), folder)' FOLDER)
set -euo pipefail
script=$(realpath "$0")
declare -A limits=([install]=40 [build]=180 [tests]=180 [sanitize]=160 [benchmark]=340 [amp]=120 [train]=220)
all_stages=(install build tests sanitize benchmark amp train)
python=${PYTHON:-python3}
device=${DEVICE:-cuda}
if [ $# -eq 0 ]; then sed -n '2,/^set/s/^# \{0,1\}//p' "$script" >&2; exit 2; fi
out=$(realpath -m "$1")
[ -z "${WHEELS:-}" ] || WHEELS=$(realpath "$WHEELS")
shift
cd "$(dirname "$script")/.."
work=$(realpath -m "${WORK:-output/gpu_check}")
site=$work/site
export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1

# The operator needs torch alone. In a package without our __init__ a Detectron2 that does not work there is no matter.
stage_operator() {
    stage=$(mktemp -d)
    trap 'rm -rf "$stage"' EXIT
    mkdir "$stage/deformable_detr"
    touch "$stage/deformable_detr/__init__.py"
    ln -s "$PWD"/projects/deformable_detr/{layers,benchmark,_C*.so} "$stage/deformable_detr/"
    ln -s "$PWD/csrc" "$stage/csrc"
    mkdir "$stage/tests"
    cp -r tests/layers "$stage/tests/layers"
    printf '[pytest]\nmarkers = cuda: needs a CUDA device\n' > "$stage/pytest.ini"
    export PYTHONPATH=$stage:$PYTHONPATH
    pytest=("$python" -m pytest -q -rs --tb=short --maxfail=20 -c "$stage/pytest.ini" --import-mode=importlib
        -p no:cacheprovider)
    # Without the kernel the twin would pass the tests.
    "$python" -c 'import sys
from deformable_detr.layers import _ops
sys.exit(None if _ops.has_kernel(sys.argv[1]) else f"no {sys.argv[1]} kernel: {_ops.unavailable_reason}")' "$device"
}

# Exit status 77: skipped.
need_detectron2() {
    "$python" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("detectron2") is None)' || exit 77
    export PYTHONPATH=$PWD/projects:$PYTHONPATH
    [ -e "$work/shapes/val.json" ] || "$python" tools/make_shapes_dataset.py "$work/shapes" --train 200 --val 50
    data=(--train-json "$work/shapes/train.json" --train-images "$work/shapes/train"
        --val-json "$work/shapes/val.json" --val-images "$work/shapes/val")
}

train() { # folder, then KEY VALUE pairs
    local folder=$work/$1
    shift
    rm -rf "$folder"
    "$python" train_net.py --config-file configs/quick_schedules/shapes_two_stage.yaml "${data[@]}" \
        OUTPUT_DIR "$folder" MODEL.DEVICE "$device" "$@" && cat "$folder/metrics.json"
}

run_install() {
    [ -n "${WHEELS:-}" ] || exit 77
    "$python" -m pip install --no-index --no-deps --no-compile --upgrade --target "$site" "$WHEELS"/*.whl
}

run_build() {
    if [ "$device" = cuda ]; then export FORCE_CUDA=1; fi
    "$python" setup.py build_ext --inplace
}

run_tests() {
    stage_operator
    local kind="cuda"
    if [ "$device" = cpu ]; then kind="not cuda and not two_devices"; fi
    # The report of the environment needs Detectron2.
    "${pytest[@]}" -k "$kind and not environment_report" "$stage"/tests/layers/test_ms_deform_attn*.py
}

run_sanitize() {
    command -v compute-sanitizer || exit 77
    stage_operator
    # PyTorch's cache of memory would hide what is read or written behind the end of a tensor.
    export PYTORCH_NO_CUDA_MEMORY_CACHING=1
    local failed=0 only_ours=(--kernel-regex kns=deformable_detr)
    for tool in memcheck racecheck initcheck; do
        echo "== $tool"
        # It has to see who writes what our kernels read.
        if [ $tool = initcheck ]; then only_ours=(); fi
        timeout --kill-after 5 $((limit / 3 - 10)) compute-sanitizer --tool $tool --target-processes all \
            "${only_ours[@]}" --error-exitcode 9 "${pytest[@]}" \
            -k "cuda and (every_head_dimension and (-30- or -32-) or deterministic or one_query_per_pixel and -3])" \
            "$stage"/tests/layers/test_ms_deform_attn_gradients.py || { echo "== $tool: status $?"; failed=1; }
    done
    return $failed
}

run_benchmark() {
    stage_operator
    [ "$device" = cpu ] || nvidia-smi || true  # what else runs there, clocks, temperature
    local measure=("$python" -c 'from deformable_detr.benchmark.op import add_arguments, run
import argparse, os, torch
torch.use_deterministic_algorithms(os.environ.get("DETERMINISTIC") == "1", warn_only=True)
parser = argparse.ArgumentParser()
add_arguments(parser)
run(parser.parse_args())' --devices "$device" --rounds "${ROUNDS:-10}" --dtypes float32 bfloat16)
    local shapes=(r50_encoder r50_decoder dino_5scale) batches=(1 2 4)
    if [ "$device" = cpu ]; then shapes=(r50_decoder) batches=(1); fi
    # One after the other, so that what is measured is on disk if the time runs out.
    for shape in "${shapes[@]}"; do
        "${measure[@]}" --shapes "$shape" --distributions grid uniform --batches "${batches[@]}" \
            --json "$out/benchmark_$shape.json"
    done
    # The twin and others have no deterministic backward pass on CUDA: they warn, and their times here mean nothing.
    DETERMINISTIC=1 "${measure[@]}" --shapes "${shapes[@]:0:2}" --json "$out/deterministic.json"
}

run_amp() {
    need_detectron2
    local short=(SOLVER.MAX_ITER "${ITERATIONS:-20}" TEST.EVAL_PERIOD 0 SEED 1) failed=0
    train amp_float32 "${short[@]}" || failed=1
    for precision in bfloat16 float16; do
        train "amp_$precision" "${short[@]}" SOLVER.AMP.ENABLED True SOLVER.AMP.PRECISION "$precision" || failed=1
    done
    return $failed
}

run_train() {
    need_detectron2
    train train SOLVER.MAX_ITER "${ITERATIONS:-1000}" SOLVER.AMP.ENABLED True SOLVER.AMP.PRECISION bfloat16 SEED 1
}

# Adds one stage to results.json. Imports no torch, which takes seconds.
record() { # stage status seconds
    "$python" - "$out/results.json" "$device" "$@" <<'PYTHON'
import datetime, importlib.metadata, json, platform, subprocess, sys
from pathlib import Path

path, device, stage, status, seconds = Path(sys.argv[1]), *sys.argv[2:]
results = json.loads(path.read_text()) if path.exists() else {"stages": {}}
names = ("torch", "torchvision", "detectron2", "numpy", "pytest", "transformers", "mmcv")
installed = {d.name.lower(): d.version for d in reversed(list(importlib.metadata.distributions())) if d.name}
results["date"] = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
results["device"] = platform.processor() or "cpu"
if device == "cuda":
    query = "nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader"
    results["device"] = subprocess.getoutput(query)
results["versions"] = {"python": platform.python_version()}
results["versions"].update({name: installed[name] for name in names if name in installed})
results["stages"][stage] = {"result": status, "seconds": int(seconds)}
path.write_text(json.dumps(results, indent=1) + "\n")
PYTHON
}

if [ "${1:-}" = --run ]; then
    limit=$3
    "run_$2"
    exit
fi
[ $# -gt 0 ] || set -- "${all_stages[@]}"
sum=0
for stage in "$@"; do
    [ -n "${limits[$stage]:-}" ] || { echo "unknown stage $stage; there are: ${all_stages[*]}" >&2; exit 2; }
    sum=$((sum + limits[$stage]))
done
later=$sum end=$((SECONDS + ${BUDGET:-$sum}))
mkdir -p "$out" "$work"
failed=0
for stage in "$@"; do
    start=$SECONDS status=0 left=$((end - SECONDS))
    later=$((later - limits[$stage]))
    # Its own limit if there is so much time, and what those after it do not need.
    limit=$((left < limits[$stage] ? left : limits[$stage]))
    limit=$((left - later > limit ? left - later : limit))
    [ $limit -gt 0 ] || limit=1
    timeout --kill-after 5 $limit bash "$script" "$out" --run "$stage" $limit > "$out/$stage.txt" 2>&1 || status=$?
    case $status in
        0) result=passed ;;
        77) result=skipped ;;
        124 | 137) result="ended after $limit s" failed=1 ;;
        *) result="failed with status $status" failed=1 ;;
    esac
    echo "$stage: $result in $((SECONDS - start)) s ($out/$stage.txt)"
    [ "$result" = passed ] || [ "$result" = skipped ] || tail -n 20 "$out/$stage.txt" || true
    record "$stage" "$result" $((SECONDS - start)) || echo "$stage: not recorded"
done
exit $failed

#!/usr/bin/env bash
# Everything that needs a GPU, in stages that each end within ten minutes. No network.
#
#   tools/gpu_check.sh OUT [stage...]
#
# Stages, all of them by default:
#   install    the packages of $WHEELS (a folder of wheels), if that is set
#   build      the operator, with CUDA
#   tests      its tests on CUDA
#   sanitize   compute-sanitizer on a few of them
#   benchmark  the operator's times; in OUT/benchmark.json, and with deterministic sums in OUT/deterministic.json
#   amp        20 training steps of the two-stage model in float32, bfloat16 and float16
#   train      a short training of it with evaluation
# The last two need Detectron2 and are skipped without it. Each stage writes OUT/<stage>.txt; OUT/results.json has the
# device, the versions and what became of each stage.
#
# Needs nvcc and a Python (PYTHON, default python3) with torch, pytest, setuptools and tabulate. LIMIT: seconds for a
# stage (570). DEVICE=cpu tries the stages without a GPU, as far as they go; ITERATIONS and ROUNDS make them shorter.
set -euo pipefail
script=$(realpath "$0")
stages="install build tests sanitize benchmark amp train"
python=${PYTHON:-python3}
device=${DEVICE:-cuda}
if [ $# -eq 0 ]; then sed -n '2,/^set/s/^# \{0,1\}//p' "$script" >&2; exit 2; fi
out=$(realpath -m "$1")
shift
cd "$(dirname "$script")/.."

# The operator needs torch alone: a package without the __init__ that imports Detectron2 lets it run everywhere.
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
    export PYTHONPATH=$stage
    pytest=("$python" -m pytest -q -c "$stage/pytest.ini" --import-mode=importlib -p no:cacheprovider)
}

# Exit status 77: skipped.
need_detectron2() {
    "$python" -c 'import detectron2' || exit 77
    export PYTHONPATH=$PWD/projects
    [ -e "$out/shapes/val.json" ] || "$python" tools/make_shapes_dataset.py "$out/shapes" --train 200 --val 50
    data=(--train-json "$out/shapes/train.json" --train-images "$out/shapes/train"
        --val-json "$out/shapes/val.json" --val-images "$out/shapes/val")
}

train() { # folder, then KEY VALUE pairs
    local folder=$out/$1
    shift
    rm -rf "$folder"
    "$python" train_net.py --config-file configs/quick_schedules/shapes_two_stage.yaml "${data[@]}" \
        OUTPUT_DIR "$folder" MODEL.DEVICE "$device" "$@"
}

run_install() {
    [ -n "${WHEELS:-}" ] || exit 77
    "$python" -m pip install --no-index --find-links "$WHEELS" "$WHEELS"/*.whl
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
    local failed=0
    for tool in memcheck racecheck initcheck; do
        echo "== $tool"
        compute-sanitizer --tool "$tool" --target-processes all --error-exitcode 9 "${pytest[@]}" \
            -k "cuda and (every_head_dimension or one_query_per_pixel or deterministic)" \
            "$stage"/tests/layers/test_ms_deform_attn_gradients.py || failed=1
    done
    return $failed
}

run_benchmark() {
    stage_operator
    local measure=("$python" -c 'from deformable_detr.benchmark.op import add_arguments, run
import argparse, os, torch
torch.use_deterministic_algorithms(os.environ.get("DETERMINISTIC") == "1", warn_only=True)
parser = argparse.ArgumentParser()
add_arguments(parser)
run(parser.parse_args())' --devices "$device" --rounds "${ROUNDS:-20}")
    local shapes=(r50_encoder r50_decoder dino_5scale) batches=(1 2 4)
    if [ "$device" = cpu ]; then shapes=(r50_decoder) batches=(1); fi
    "${measure[@]}" --shapes "${shapes[@]}" --dtypes float32 bfloat16 --distributions grid uniform \
        --batches "${batches[@]}" --json "$out/benchmark.json"
    # The twin and others have no deterministic backward pass on CUDA: they warn, and their times here mean nothing.
    DETERMINISTIC=1 "${measure[@]}" --shapes "${shapes[@]:0:2}" --dtypes float32 bfloat16 \
        --json "$out/deterministic.json"
}

run_amp() {
    need_detectron2
    local short=(SOLVER.MAX_ITER "${ITERATIONS:-20}" TEST.EVAL_PERIOD 0 SEED 1)
    train amp_float32 "${short[@]}"
    for precision in bfloat16 float16; do
        train "amp_$precision" "${short[@]}" SOLVER.AMP.ENABLED True SOLVER.AMP.PRECISION "$precision"
    done
}

run_train() {
    need_detectron2
    train train SOLVER.MAX_ITER "${ITERATIONS:-1000}" SOLVER.AMP.ENABLED True SOLVER.AMP.PRECISION bfloat16 SEED 1
}

# Adds one stage to results.json.
record() { # stage status seconds
    "$python" - "$out/results.json" "$@" <<'PYTHON'
import datetime, importlib.metadata, json, platform, sys
from pathlib import Path

import torch

path, stage, status, seconds = Path(sys.argv[1]), *sys.argv[2:]
results = json.loads(path.read_text()) if path.exists() else {"stages": {}}
names = ("torch", "torchvision", "detectron2", "numpy", "pytest", "transformers", "mmcv")
installed = {d.name.lower(): d.version for d in importlib.metadata.distributions() if d.name}
results["date"] = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
results["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu"
results["versions"] = {"python": platform.python_version(), "cuda": torch.version.cuda}
results["versions"].update({name: installed[name] for name in names if name in installed})
results["stages"][stage] = {"result": status, "seconds": int(seconds)}
path.write_text(json.dumps(results, indent=1) + "\n")
PYTHON
}

if [ "${1:-}" = --run ]; then
    "run_$2"
    exit
fi
[ $# -gt 0 ] || set -- $stages
for stage in "$@"; do
    case " $stages " in *" $stage "*) ;; *) echo "unknown stage $stage; there are: $stages" >&2; exit 2 ;; esac
done
mkdir -p "$out"
if [ "$device" = cuda ]; then nvidia-smi > "$out/nvidia-smi.txt"; fi
failed=0
for stage in "$@"; do
    start=$SECONDS status=0
    timeout --kill-after 10 "${LIMIT:-570}" bash "$script" "$out" --run "$stage" > "$out/$stage.txt" 2>&1 || status=$?
    case $status in
        0) result=passed ;;
        77) result=skipped ;;
        124 | 137) result="ended after ${LIMIT:-570} s" failed=1 ;;
        *) result="failed with status $status" failed=1 ;;
    esac
    echo "$stage: $result in $((SECONDS - start)) s ($out/$stage.txt)"
    [ "$result" = passed ] || [ "$result" = skipped ] || tail -n 20 "$out/$stage.txt"
    record "$stage" "$result" $((SECONDS - start))
done
exit $failed

#!/usr/bin/env bash
# Everything about the operator that needs a GPU: build, tests, compute-sanitizer, benchmark. No network.
# Usage: tools/gpu_check.sh [folder for the results]
# Needs nvcc and a Python (PYTHON, default python3) with torch, pytest and tabulate; Detectron2 may be missing.
set -euo pipefail
cd "$(dirname "$0")/.."
out=$(realpath -m "${1:-output/gpu_check}")
python=${PYTHON:-python3}
mkdir -p "$out"
nvidia-smi > "$out/nvidia-smi.txt"

FORCE_CUDA=1 "$python" setup.py build_ext --inplace > "$out/build.txt" 2>&1 || { tail -n 40 "$out/build.txt"; exit 1; }

# The operator needs torch alone: a package without the __init__ that imports Detectron2 lets it run everywhere.
stage=$(mktemp -d)
trap 'rm -rf "$stage"' EXIT
mkdir "$stage/deformable_detr"
touch "$stage/deformable_detr/__init__.py"
ln -s "$PWD"/projects/deformable_detr/{layers,benchmark,_C*.so} "$stage/deformable_detr/"
cp -r tests/layers "$stage/tests"
export PYTHONPATH=$stage
printf '[pytest]\nmarkers = cuda: needs a CUDA device\n' > "$stage/pytest.ini"
pytest=("$python" -m pytest -q -c "$stage/pytest.ini" --import-mode=importlib -p no:cacheprovider)

failed=0
"${pytest[@]}" -k cuda "$stage"/tests/test_ms_deform_attn*.py > "$out/tests.txt" 2>&1 || failed=1
tail -n 30 "$out/tests.txt"

for tool in memcheck racecheck initcheck; do
    compute-sanitizer --tool "$tool" --target-processes all --error-exitcode 9 "${pytest[@]}" \
        -k "cuda and (every_head_dimension or one_query_per_pixel or deterministic)" \
        "$stage"/tests/test_ms_deform_attn_gradients.py > "$out/$tool.txt" 2>&1 || { echo "$tool failed"; failed=1; }
    tail -n 2 "$out/$tool.txt"
done

"$python" -m deformable_detr.benchmark op --devices cuda --shapes r50_encoder r50_decoder dino_5scale \
    --dtypes float32 bfloat16 --distributions grid uniform --batches 1 2 4 --rounds 20 \
    --json "$out/benchmark.json" | tee "$out/benchmark.txt"
exit $failed

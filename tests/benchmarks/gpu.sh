#!/usr/bin/env bash
# Everything that only a GPU can answer, in one command that needs torch and no Ray:
#
#     tests/benchmarks/gpu.sh --kit KIT --photos PHOTOS --out OUT [--smoke] [PART ...]
#
# KIT is a folder of `python -m tests.benchmarks.kit`, PHOTOS one with train, val and test. The parts, in order:
#   tests      what no CPU can test: waits of the host, compiled forms, noise of host and device
#   parity     the network beside the authors' outputs in float32, TF32 and bf16
#   steps      a training step of the published network, measure by measure, against the plain form
#   curves     losses over 200 steps, form by form
#   inference  latency and throughput against the plain form
#   ablation   objectives at equal seconds, with controls
#   train      a starter model, for as long as SECONDS_TO_TRAIN says (default 240)
#   compiled   the steps again with a compiled form, which may take longer than a machine is lent
# A part writes OUT/PART.txt and figures as OUT/*.json; one that has ended well is not run again.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
ALL=(tests parity steps curves inference ablation train compiled)
parts=() kit="" photos="" out="" smoke=""
while (($#)); do
    case "$1" in
    --kit) kit=$2 && shift ;;
    --photos) photos=$2 && shift ;;
    --out) out=$2 && shift ;;
    --smoke) smoke=yes ;;
    --help) sed -n '2,/^set/p' "$0" | grep '^#' | cut -c3- && exit ;;
    *) [[ " ${ALL[*]} " == *" $1 "* ]] || { echo "error: no part $1, there are: ${ALL[*]}" >&2 && exit 2; }
        parts+=("$1") ;;
    esac
    shift
done
[[ $kit && $photos && $out ]] || { echo "error: --kit, --photos and --out are needed, see --help" >&2 && exit 2; }
((${#parts[@]})) || parts=("${ALL[@]}")
mkdir -p "$out"
export PYTHONUNBUFFERED=1
measure() { python3 -m "tests.benchmarks.$1" "${@:2}"; }
sized() { if [[ $smoke ]]; then echo "$2"; else echo "$1"; fi; } # for the GPU, or to see that it runs

run_part() {
    case "$1" in
    tests) gpu_tests ;;
    parity) measure parity --json "$out/parity.json" $(sized "" "--sizes tiny") ;;
    steps) measure train_step --kit "$kit" --json "$out/steps.json" \
        $(sized "--preset published --batch 8 --rounds 15" "--batch 1 --rounds 1 --warm-up 1") ;;
    compiled) measure train_step --kit "$kit" --json "$out/compiled.json" \
        $(sized "--preset published --batch 8 --rounds 15 --compiled" "--batch 1 --rounds 1 --warm-up 1") ;;
    curves) measure train_step --kit "$kit" --json "$out/curves.json" \
        $(sized "--batch 16 --rounds 200" "--batch 1 --rounds 2 --warm-up 1") ;;
    inference) measure inference --json "$out/inference.json" \
        $(sized "--preset published" "--sizes 32 --rounds 1 --threads 1") ;;
    ablation) measure ablation --kit "$kit" --photos "$photos" --results "$out/ablation.json" \
        $(sized "--network even --seconds ${ABLATION_SECONDS:-5}" "--network tiny --seconds 0 --steps 2 --seeds 1 --pairs 8
            --eval-photos 1 --eval-size 192 --draws 1 --processes 1 --set train.global_batch_size=2 train.micro_batch_size=2") ;;
    train) measure gpu_train --kit "$kit" --photos "$photos" --into "$out" \
        $(sized "--seconds ${SECONDS_TO_TRAIN:-240}" --smoke) ;;
    esac
}

gpu_tests() {
    [[ ! $smoke ]] || { python3 -m pytest --collect-only -q -m gpu tests/unit/ctmsr/test_gpu.py && return; }
    python3 -c "
import sys
from pathlib import Path
from safetensors.torch import save_file
from tests.benchmarks.kit import install
install(Path(sys.argv[1]))
from ctmsr.metrics.perceptual import lpips_tensors
save_file({name: value.contiguous() for name, value in lpips_tensors('vgg').items()}, '$out/lpips.safetensors')
" "$kit"
    CTMSR_LPIPS="$out/lpips.safetensors" python3 -m pytest -q -p no:cacheprovider --durations=6 -m gpu tests/unit/ctmsr/test_gpu.py
    rm "$out/lpips.safetensors"
}

failed=()
for part in "${parts[@]}"; do
    [[ ! -e $out/$part.done ]] || { echo "== $part: done before" && continue; }
    echo "== $part" && began=$(date +%s)
    if (run_part "$part") 2>&1 | tee "$out/$part.txt"; then touch "$out/$part.done"; else failed+=("$part"); fi
    echo "== $part: $(($(date +%s) - began)) s"
done
((!${#failed[@]})) || { echo "failed: ${failed[*]}" >&2 && exit 1; }

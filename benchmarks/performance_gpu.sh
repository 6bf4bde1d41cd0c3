#!/usr/bin/env bash
# XL/2 on one GPU: img/s, share of the measured matrix peak, beside compiled diffusers, into benchmarks/results/.
#
#   bash benchmarks/performance_gpu.sh          about half an hour; BATCHES="32 8 2" for an H100
#   bash benchmarks/performance_gpu.sh small    the same list on a CPU: two blocks, no 1024 px, into a folder of its own
set -euo pipefail
cd "$(dirname "$0")/.."

if [[ ${1:-} == small ]]; then
    export JAX_PLATFORMS=cpu OMP_WAIT_POLICY=PASSIVE
    out=$(mktemp -d) platform=cpu attention=xla dtype=float32 sizes=(256 512) batches=(1 1)
    options_batch=2
    model=(--config.model.size=custom --config.model.depth=2 --config.model.dtype=float32)
    few=(--rounds=1 --calls=1) steps=(--steps=2) depth=(--depth=2) options=(--depth=3 --rounds=1)
    sampling=(--sizes 256 --steps=2 --rounds=1 --depth=2)
else
    if ! python -c 'import jax, torch; jax.devices("gpu"); assert torch.cuda.is_available()' 2>/dev/null; then
        echo "needs one NVIDIA GPU (H200 or H100), jax[cuda12], and PyTorch with CUDA and diffusers in this Python" >&2
        exit 2
    fi
    export XLA_PYTHON_CLIENT_PREALLOCATE=false
    sizes=(256 512 1024) out=benchmarks/results platform=gpu attention=cudnn dtype=bfloat16 options_batch=16
    read -r -a batches <<<"${BATCHES:-64 16 4}"
    model=() few=(--rounds=10 --calls=5) steps=() depth=() options=(--size=XL/2)
    sampling=(--sizes 256 512 1024)
fi
# Profiles are for XProf and too large to keep beside the results.
profiles=$(mktemp -d)
echo "profiles: $profiles"
mesh=(--config.mesh.data=1 --config.mesh.fsdp=1 --config.mesh.sequence=1 --config.mesh.tensor=1)

for i in "${!sizes[@]}"; do
    size=${sizes[$i]}
    both=(--config="configs/stage3.py:$size" --batch="${batches[$i]}" --config.model.attention=$attention
        "${model[@]}" "${few[@]}")
    for remat in none save_attention; do
        python -m pixart_jax.benchmark train "${both[@]}" "${mesh[@]}" --config.model.remat=$remat \
            --config.model.scan_layers=False --profile="$profiles/train_${size}_$remat" \
            --out="$out/gpu_train_${size}_$remat.json"
    done
    python -m pixart_jax.benchmark sample "${both[@]}" "${steps[@]}" --profile="$profiles/sample_$size" \
        --out="$out/gpu_sample_$size.json"
    # Both sides keep what they have allocated: half the batch each.
    half=$(((batches[i] + 1) / 2))
    python benchmarks/compare/training.py --case=xl2 --size="$size" --batch=$half --platform=$platform \
        --modes compiled "${few[@]}" "${depth[@]}" --out="$out/training_$platform.json"
done
python benchmarks/compare/sampling.py --platform=$platform "${sampling[@]}" --out="$out/sampling_$platform.json"
python benchmarks/options.py --batch=$options_batch --dtype=$dtype --attention=$attention "${options[@]}" \
    --out="$out/options_gpu.json"

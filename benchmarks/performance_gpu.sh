#!/usr/bin/env bash
# XL/2 on one GPU: img/s, share of the measured matrix peak, beside compiled diffusers, into benchmarks/results/.
# Needs: one H200 (or H100, with half the batches: BATCHES="32 8 2"), jax[cuda12], and for the comparisons
# PyTorch with CUDA and diffusers; about half an hour.
set -euo pipefail
cd "$(dirname "$0")/.."
export XLA_PYTHON_CLIENT_PREALLOCATE=false
read -r -a batches <<<"${BATCHES:-64 16 4}"
sizes=(256 512 1024)

for i in 0 1 2; do
    size=${sizes[$i]} batch=${batches[$i]}
    for remat in none save_attention; do
        python -m pixart_jax.benchmark train --config="configs/stage3.py:$size" --batch="$batch" \
            --config.model.attention=cudnn --config.model.remat=$remat --config.model.scan_layers=False \
            --config.mesh.data=1 --config.mesh.fsdp=1 --config.mesh.sequence=1 --config.mesh.tensor=1 \
            --out="benchmarks/results/gpu_train_${size}_$remat.json"
    done
    python -m pixart_jax.benchmark sample --config="configs/stage3.py:$size" --batch="$batch" \
        --config.model.attention=cudnn --out="benchmarks/results/gpu_sample_$size.json"
    python benchmarks/compare/training.py --case=xl2 --size="$size" --batch="$batch" --platform=gpu \
        --modes compiled --rounds=10 --calls=5
done
python benchmarks/options.py --size=XL/2 --batch=16 --dtype=bfloat16 --attention=cudnn \
    --out=benchmarks/results/options_gpu.json

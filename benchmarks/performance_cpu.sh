#!/usr/bin/env bash
# Measures the CPU figures of docs/performance.md, except the loader's, and writes them to benchmarks/results/.
# Needs an otherwise idle machine with two cores and 16 GiB, the extras 'test' and 'tpu' (libtpu as a
# compiler), g++ for torch.compile, and the features of `make demo`. Takes about half an hour.
set -euo pipefail
cd "$(dirname "$0")/.."
# PyTorch's threads must not spin while JAX computes, or the ratios are wrong.
# Freed memory stays with the process; otherwise the gigabytes of temporary memory of each step cause a fault per page.
export GLIBC_TUNABLES=glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=68719476736:glibc.malloc.arena_max=1
export JAX_PLATFORMS=cpu OMP_WAIT_POLICY=PASSIVE GOMP_SPINCOUNT=0

python benchmarks/compare/training.py --case=digits --rounds=21 --calls=2
python benchmarks/compare/training.py --case=forward --rounds=7
python benchmarks/compare/training.py --case=narrow --rounds=9
python benchmarks/options.py
python benchmarks/profile_cpu.py
env -u GLIBC_TUNABLES python benchmarks/profile_cpu.py --out=benchmarks/results/profile_cpu_malloc.json
python benchmarks/startup.py --config=configs/stage2.py --batch=8
python -m pixart_jax.benchmark train --config=configs/digits.py:stage2 --data=demo/features/stage2/train \
    --rounds=20 --calls=10 --out=benchmarks/results/digits_step.json
python benchmarks/compiled_flops.py --config=configs/stage3.py:512

#!/usr/bin/env bash
# Training and sampling of XL/2 on one GPU, in named parts of at most 8 minutes, into benchmarks/results/gpu/.
#
#   bash benchmarks/performance_gpu.sh --list                  the parts, the most valuable first
#   bash benchmarks/performance_gpu.sh                         all of them
#   bash benchmarks/performance_gpu.sh train-256 profile       these; what is measured already is skipped
#   bash benchmarks/performance_gpu.sh small                   the same list with a tiny network on a CPU
#
# PYTHON names another interpreter; --help has the other options.
set -euo pipefail
cd "$(dirname "$0")/.."
exec "${PYTHON:-python3}" benchmarks/gpu/run.py "$@"

#!/usr/bin/env bash
# Benchmarks training and sampling of XL/2 on one GPU, in named parts of at most 8 minutes each; results go to
# benchmarks/results/gpu/.
#
#   bash benchmarks/performance_gpu.sh --list                  lists the parts, the most important first
#   bash benchmarks/performance_gpu.sh                         runs all of them
#   bash benchmarks/performance_gpu.sh train-256 profile       runs these; cases that have a result are skipped
#   bash benchmarks/performance_gpu.sh small                   runs the same list with a tiny network on a CPU
#
# PYTHON names another interpreter; --help has the other options.
set -euo pipefail
cd "$(dirname "$0")/.."
exec "${PYTHON:-python3}" benchmarks/gpu/run.py "$@"

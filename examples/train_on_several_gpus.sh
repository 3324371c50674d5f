#!/usr/bin/env bash
# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
# Pretrain on all GPUs of a machine; clusters are found on the text of all of them.
#
#     bash examples/train_on_several_gpus.sh configuration/recipes/own_text.yaml --train_file my_texts
#     ACCELERATE=fsdp2_gpu bash examples/train_on_several_gpus.sh my.yaml   # or zero2_gpu: larger models
#     bash examples/train_on_several_gpus.sh --smoke                        # two processes on a CPU, a few steps
#
# It ends with the table and the picture of examples/run_clm.py, which it runs; the number of processes changes losses
# by rounding alone (docs/distributed.md).
set -euo pipefail

here="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
config="${ACCELERATE:-ddp_gpu}"
arguments=("$@")
processes="${PROCESSES:-}" # default: one a GPU
if [[ "${1:-}" == "--smoke" ]]; then
    config=ddp_cpu
    processes=2
    arguments=("$here/configuration/recipes/quickstart.yaml" --smoke --use_cpu --output_dir runs/two_processes
        --train_file "$here/examples/data/train.jsonl.gz"
        --validation_file "$here/examples/data/validation.jsonl.gz" "${@:2}")
fi
exec "${PYTHON:-python}" -m accelerate.commands.launch --config_file "$here/configuration/accelerate/$config.yaml" \
    --num_processes "${processes:-$(nvidia-smi --list-gpus | wc -l)}" "$here/examples/run_clm.py" "${arguments[@]}"

#!/bin/sh
# Stage I and Stage II of one size, on the GPUs of this machine:
#   recipes/train.sh 7B fsdp2 ROWS-WITH-THOUGHT-VIDEOS.jsonl ROWS.jsonl
# Killed and started again, it goes on where it stopped. Other machines, or fewer GPUs: see `accelerate launch --help`.
set -eu
if [ $# -ne 4 ]; then
    echo "usage: $0 3B|7B ddp|fsdp2|zero2 ROWS-WITH-THOUGHT-VIDEOS.jsonl ROWS.jsonl   (GPUS=8)" >&2
    exit 2
fi
for file in "$3" "$4"; do [ -f "$file" ] || { echo "$0: no such file: $file" >&2; exit 2; }; done
recipes=$(dirname "$0")
model=Qwen/Qwen2.5-VL-$1-Instruct runs=runs/$(echo "$1" | tr B b) launch=$2 data=$3
for stage in stage1 stage2; do
    accelerate launch --config_file "$recipes/accelerate/$launch.yaml" --num_processes "${GPUS:-8}" \
        --module storm_vlm train "$recipes/$stage.yaml" "model=$model" "data=$data" "output_dir=$runs/$stage"
    model=$runs/stage1 data=$4
done

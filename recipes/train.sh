#!/bin/sh
# Stage I and Stage II of one size, on the GPUs of this machine:
#   recipes/train.sh qwen2_5_vl_7b fsdp2 ROWS-WITH-THOUGHT-VIDEOS.jsonl ROWS.jsonl
# Killed and started again, it goes on where it stopped. Other machines, or fewer GPUs: see `accelerate launch --help`.
set -eu
if [ $# -ne 4 ]; then
    echo "usage: $0 SIZE ddp|fsdp2|zero2 ROWS-WITH-THOUGHT-VIDEOS.jsonl ROWS.jsonl   (GPUS=8)" >&2
    exit 2
fi
for file in "$3" "$4"; do [ -f "$file" ] || { echo "$0: no such file: $file" >&2; exit 2; }; done
recipes=$(dirname "$0")
size=$1 launch=$2 thoughts=$3 rows=$4
for stage in stage1 stage2; do
    data=$thoughts
    [ $stage = stage2 ] && data=$rows
    accelerate launch --config_file "$recipes/accelerate/$launch.yaml" --num_processes "${GPUS:-8}" \
        --module storm_vlm train "$recipes/$size/$stage.yaml" "data=$data"
done

#!/usr/bin/env bash
# Everything that the docs call "not measured" on a GPU, on one H100 or H200, in less than 10 minutes:
#   dev/gpu_check.sh OUT                                  (writes OUT/gpu_check.json, and a log for each part)
#   SHAPE=micro DEVICE=cpu LIMITS=5 dev/gpu_check.sh OUT  (a rehearsal on a CPU, with 5 times the time)
#   PARTS=vllm dev/gpu_check.sh OUT                       (the plugin under CUDA graphs; needs vLLM; minutes more)
# Every part has its own limit in seconds; one that fails, or lacks a package, does not end the others.
set -u
out=${1:?usage: $0 OUT}
parts=${PARTS:-train latency graphs world fsdp2 flash qlora}
shape=${SHAPE:-7b} device=${DEVICE:-cuda} limits=${LIMITS:-1} python=${PYTHON:-python}
cd "$(dirname "$0")/.." && mkdir -p "$out" && out=$(cd "$out" && pwd)
rm -f "$out"/*.json "$out"/*.log "$out/parts"
export PYTHONPATH="src${PYTHONPATH:+:$PYTHONPATH}" TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

part() { # NAME LIMIT COMMAND...
    local name=$1 limit=$(($2 * limits)) began=$SECONDS code=0
    [[ " $parts " == *" $name "* ]] || return 0
    shift 2
    timeout --kill-after=10 "$limit" "$@" >"$out/$name.log" 2>&1 || code=$?
    echo "$name $code $((SECONDS - began))" >>"$out/parts"
    echo "$name: $([ $code = 0 ] && echo done || echo "failed ($code), see $out/$name.log"), $((SECONDS - began)) s"
}

storm=("$python" -m storm_vlm) checkpoints=src/storm_vlm/lab/checkpoints
if [ "$device" = cpu ]; then
    batches=(--batch 1) prefix=300 rounds=1 half=() cpu=(--cpu) trained=(training.use_cpu=true)
    lengths=(--thought 8 --cot-tokens 8 --grounded-tokens 8 --tool-rounds 1 --tool-tokens 100)
else
    batches=(--batch 1 --batch 4) prefix=4000 rounds=3 half=(dtype=bfloat16) cpu=() trained=()
    lengths=(--thought 64)
fi

# 1. Steps of Stage I and II against SFT: seconds, ratios, and the peak of memory beside the plan's.
part train 140 "${storm[@]}" bench train --shape "$shape" --prefix "$prefix" "${batches[@]}" --rounds "$rounds" \
    --checkpointing --device "$device" --results "$out/train.json"
# 2. Seconds an item of every way to reason.
part infer 130 "${storm[@]}" bench infer --shape "$shape" --device "$device" --rows 1 --rounds "$rounds" --batch 1 \
    "${lengths[@]}" --results "$out/latency.json"
# 3. A compiled decoding step: same tokens as without, and how long a token takes. CUDA graphs are in `reduce-overhead`.
part graphs 100 "$python" dev/compiled_decoding.py "$shape" "$device" "$out/graphs.json"

# 4-6. Short runs of Stage I on the micro world: FSDP2 on one device, flash attention, a model of four bits.
part world 30 "${storm[@]}" world "$out/world" --count 64
run=(model=$checkpoints/backbone data="$out/world/reasoning-train-0.jsonl" training.max_steps=12 "${trained[@]}")
part fsdp2 80 "$python" -m accelerate.commands.launch "${cpu[@]}" --config_file recipes/accelerate/fsdp2.yaml \
    --num_processes 1 --module storm_vlm train stage1 "${run[@]}" output_dir="$out/fsdp2"
part flash 50 "${storm[@]}" train stage1 "${run[@]}" "${half[@]}" attn_implementation=flash_attention_2 \
    output_dir="$out/flash"
part qlora 50 "${storm[@]}" train stage1 "${run[@]}" quantization.load_in_4bit=true lora.r=8 output_dir="$out/qlora" \
    muon=null

# 7. vLLM's own graphs, attention and asynchronous scheduling around the latent slots.
part vllm 400 env PYTHONPATH="$PYTHONPATH:tests" "$python" dev/vllm_on_gpu.py "$out/vllm.json"

"$python" - "$out" "$shape" "$device" <<'PY'
import json
import sys
from pathlib import Path

from storm_vlm.lab.bench.training_step import machine

out, shape, device = Path(sys.argv[1]), *sys.argv[2:]
parts = {}
for line in (out / "parts").read_text().splitlines():
    name, code, seconds = line.split()
    parts[name] = {"exit_code": int(code), "seconds": int(seconds)}
    if code != "0":
        log = (out / f"{name}.log").read_text(errors="replace").strip().splitlines()
        parts[name]["last_line"] = log[-1] if log else ""
    for found in (out / f"{name}.json", out / name / "log_history.json"):
        if found.exists():
            parts[name]["result"] = json.loads(found.read_text())
record = {**machine(device), "shape": shape, "parts": parts}
(out / "gpu_check.json").write_text(json.dumps(record, indent=1) + "\n")
PY
echo "wrote $out/gpu_check.json after $SECONDS s"

"""Does a compiled decoding step write the tokens of an eager one, and how long does a token take?

python dev/compiled_decoding.py SHAPE DEVICE RESULTS.json
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import CompileConfig

from storm_vlm.lab.bench.training_step import (
    Shape,
    machine,
    random_batch,
    random_model,
    shape_config,
)

TOKENS = 64
WAYS: dict[str, dict[str, Any]] = {
    "eager": {},
    "static cache": {"cache_implementation": "static", "disable_compile": True},
    "compiled": {"cache_implementation": "static"},
}


def main(shape: Shape, device: str, results: str) -> None:
    on_gpu = device.startswith("cuda")
    torch.manual_seed(0)
    dtype = torch.bfloat16 if on_gpu else torch.float32
    model = random_model(shape_config(shape), 8, device, dtype).eval()
    model.set_attn_implementation("sdpa")
    batch = random_batch(model.config, 1, 4000 if on_gpu else 300, device)
    del batch["labels"]
    batch["pixel_values_videos"] = batch["pixel_values_videos"].to(dtype)
    options = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "latent_mode": "force"}
    # CUDA graphs need a GPU; elsewhere the step is traced, and run as it is
    how = CompileConfig(mode="reduce-overhead") if on_gpu else CompileConfig(backend="aot_eager")
    written, seconds = {}, {}
    for way, settings in WAYS.items():
        if way == "compiled":
            settings = {**settings, "compile_config": how}
            model._compile_all_devices = not on_gpu
        for number in range(3):  # the first warms up, the second records the graph
            began = time.perf_counter()
            with torch.inference_mode():
                ids = model.generate(**batch, **options, **settings)
            if on_gpu:
                torch.cuda.synchronize()
            if number:
                seconds[way] = time.perf_counter() - began
        written[way] = ids[:, batch["input_ids"].shape[1] :].cpu()
    same = {
        way: int((ids == written["eager"]).all(0).cumprod(0).sum()) for way, ids in written.items()
    }
    record = {
        **machine(device),
        "shape": shape,
        "tokens": TOKENS,
        "seconds": seconds,
        "tokens_as_eager": same,  # from the first on; the arithmetic of kernels differs in bf16
    }
    Path(results).write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])  # type: ignore[arg-type]

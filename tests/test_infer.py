"""The latency bench measures what it says, on the shipped model and on random weights."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText

from storm_vlm.inference.pipeline import StormPipeline
from storm_vlm.inference.reply import Reply
from storm_vlm.lab.bench.infer import (
    Lengths,
    bench_infer,
    fixed_reasoners,
    infer_tables,
    measure,
    random_pipeline,
)
from storm_vlm.lab.bench.passes import floor, stock_twin, ways
from storm_vlm.lab.bench.training_step import shape_config
from storm_vlm.lab.checkpoints import shipped

LENGTHS = Lengths(answer=2, cot=6, grounded_cot=8, tool_rounds=1, tool_tokens=90, thoughts=(6,))


class Slow:
    """A reasoner of known cost; the first call is slower, as first calls are."""

    def __init__(self, clock: list[str], name: str) -> None:
        self.clock, self.name = clock, name

    def answer(self, rows):
        self.clock.append(self.name)
        return [Reply("x") for _ in rows]


def test_reasoners_take_turns_and_the_first_round_warms_up() -> None:
    clock: list[str] = []
    reasoners = {name: Slow(clock, name) for name in ("latent", "direct")}
    spent, replies = measure(reasoners, [None] * 3, 2, 2)  # type: ignore[arg-type, list-item]
    assert clock == ["latent", "latent", "direct", "direct"] * 3
    assert {name: len(times) for name, times in spent.items()} == {"latent": 2, "direct": 2}
    assert all(len(said) == 6 for said in replies.values())


def test_the_record_has_ratios_of_one_run_and_keeps_other_shapes(tmp_path: Path) -> None:
    results = tmp_path / "new" / "latency.json"
    found = bench_infer("micro", "cpu", 1, 2, 1, LENGTHS, results)
    kept = json.loads(results.read_text())
    assert kept["micro cpu"] == found and kept["7b cuda"] == "not measured"
    assert kept["paper"]["latent"] == 0.47
    tokens = {name: line["tokens"] for name, line in found["reasoners"].items()}
    assert tokens == {"latent": 2, "direct": 2, "cot": 6, "grounded_cot": 8, "tools": 92}
    for name, line in found["reasoners"].items():
        one = line["ratio_to_latent"]
        assert 0 < one["low"] <= one["median"] <= one["high"]
        assert line["seconds"]["total"] <= line["s_per_item"]["high"] * 1.01
        assert line["slots"] == (8 if name == "latent" else 0)
    assert found["reasoners"]["direct"]["ratio_to_direct"] == dict.fromkeys(
        ("median", "low", "high"), 1.0
    )
    assert len(infer_tables(found)) == 3
    results.write_text(json.dumps({"7b cuda": {"reasoners": {}}}))
    found = bench_infer("micro", "cpu", 1, 1, 1, LENGTHS, results, (2,))
    assert json.loads(results.read_text())["7b cuda"] == {"reasoners": {}}

    batch = found["batches"]["2"]
    names = {"read", "preprocess", "latent", "stock", "direct", "naive", "cot_6", "tools"}
    assert set(batch["ways"]) == names and infer_tables(found)[2].row_count == len(names)
    for name, seconds in batch["floor_s"].items():
        assert 0 < seconds < batch["ways"][name]["s_per_item"]["median"]
    assert sum(batch["phases"].values()) == pytest.approx(1)


@torch.inference_mode()
def test_what_is_compared_writes_the_same(reasoning_rows) -> None:
    """Without a cache the same tokens as with one; the stock twin those of the checkpoint in its own class."""
    load: Any = AutoModelForImageTextToText.from_pretrained
    pipeline = StormPipeline.from_pretrained(str(shipped("storm")))
    opened, plain = (
        dict(pipeline.collator.collate_prompts(reasoning_rows[:3], mode))
        for mode in ("force", "off")
    )
    compared = ways(pipeline, opened, plain, 1, (5,))
    length = opened["input_ids"].shape[1]
    written = compared["latent"]().sequences[:, length:]
    assert torch.equal(compared["naive"](), written[:, 8 + 1 :])
    assert compared["stock"]().sequences[:, length:].shape == written.shape
    twin, stock = stock_twin(pipeline.model), load(shipped("storm")).eval()
    assert type(twin) is type(stock)
    assert torch.equal(twin(**plain).logits, stock(**plain).logits)


def test_the_floor_counts_products() -> None:
    left, right = torch.randn(4, 8), torch.randn(8, 16)
    rate = {"flops_per_s": 1.0, "bytes_per_s": 1e9}
    assert floor(lambda: left @ right, rate) == 2 * 4 * 8 * 16
    rate = {"flops_per_s": 1e12, "bytes_per_s": 1.0}
    assert floor(lambda: left @ right, rate) == left.nbytes + right.nbytes


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_floor_counts_attention_and_whole_layers(mode: Any) -> None:
    heads, net = torch.randn(1, 2, 3, 4), torch.nn.Linear(4, 5)
    rate = {"flops_per_s": 1.0, "bytes_per_s": 1e9}
    with mode():
        attend = torch.nn.functional.scaled_dot_product_attention
        assert floor(lambda: attend(heads, heads, heads), rate) == 2 * 2 * 2 * 3 * 3 * 4
        assert floor(lambda: net(heads), rate) == 2 * 2 * 3 * 4 * 5


def test_random_weights_take_the_same_path(reasoning_rows) -> None:
    config = shape_config("micro")
    pipeline = random_pipeline(config, 3, "cpu", torch.float32, 4, 32 * 32)
    found = {
        name: reasoner.answer(reasoning_rows[:1])[0]
        for name, reasoner in fixed_reasoners(pipeline, LENGTHS, 1.25).items()
    }
    assert {name: reply.tokens for name, reply in found.items()} == {
        "latent": 2,
        "direct": 2,
        "cot": 6,
        "grounded_cot": 8,
        "tools": 92,
    }
    assert found["latent"].slots_used == 3 and found["tools"].rounds == 2
    assert found["direct"].visual_tokens == 2 * 4  # 4 frames are 2 grids of 2 x 2


def test_a_look_is_as_long_as_it_says(reasoning_rows) -> None:
    pipeline = random_pipeline(shape_config("micro"), 3, "cpu", torch.float32, 4, 32 * 32)
    with pytest.raises(ValueError, match="tokens"):
        fixed_reasoners(pipeline, Lengths(tool_tokens=5), 1.25)

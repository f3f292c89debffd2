"""The latency bench measures what it says, on the shipped model and on random weights."""

import json
from pathlib import Path

import pytest
import torch

from storm_vlm.inference.reply import Reply
from storm_vlm.lab.bench.latency import (
    Lengths,
    bench_latency,
    fixed_reasoners,
    latency_tables,
    measure,
    random_pipeline,
)
from storm_vlm.lab.bench.training_step import shape_config

LENGTHS = Lengths(answer=2, cot=6, grounded_cot=8, tool_rounds=1, tool_tokens=90)


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
    found = bench_latency("micro", "cpu", 1, 2, 1, LENGTHS, results)
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
    assert len(latency_tables(found)) == 2
    results.write_text(json.dumps({"7b cuda": {"reasoners": {}}}))
    bench_latency("micro", "cpu", 1, 1, 1, LENGTHS, results)
    assert json.loads(results.read_text())["7b cuda"] == {"reasoners": {}}


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

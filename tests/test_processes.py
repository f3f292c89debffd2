"""Models that go to other processes: `torch.save`, spawn, a Ray actor."""

import io
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import pytest
import torch
from tiny_model import left_pad, prompts, tiny_model


def answer(model: Any, batch: dict[str, torch.Tensor]) -> list[list[int]]:
    """What the model writes, in whatever process this runs."""
    return model.generate(**batch).tolist()


def test_saved_whole_and_sent_to_a_spawned_process() -> None:
    model, batch = tiny_model(), left_pad(prompts())
    expected, file = answer(model, batch), io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert answer(torch.load(file, weights_only=False), batch) == expected
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        assert pool.submit(answer, model, batch).result(timeout=300) == expected


def test_a_ray_actor_holds_a_model() -> None:
    ray = pytest.importorskip("ray")
    model, batch = tiny_model(), left_pad(prompts())

    class Holder:
        def __init__(self, held: Any) -> None:
            self.held = held

        def answer(self, batch: dict[str, torch.Tensor]) -> list[list[int]]:
            return self.held.generate(**batch).tolist()

    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
    try:
        holder = ray.remote(Holder).remote(model)
        assert ray.get(holder.answer.remote(batch), timeout=300) == answer(model, batch)
    finally:
        ray.shutdown()

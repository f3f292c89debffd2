import itertools
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tiny_model import VIDEO, left_pad, prompt, prompts, tiny_model, tiny_stock_model

from storm_vlm.model.positions import TrainedPositions

MERGE, TOKENS_PER_SECOND = 2, 2


def reference(blocks: list[tuple[str, Any]]) -> list[tuple[int, ...]]:
    """The training rule (as vLLM has it) in plain Python: (time, height, width) per token."""
    out: list[tuple[int, ...]] = []
    for kind, block in blocks:
        start = max(max(p) for p in out) + 1 if out else 0
        if kind == "text":
            out += [(start + i,) * 3 for i in range(block)]
            continue
        (time, height, width), seconds = block
        axes = range(time), range(height // MERGE), range(width // MERGE)
        out += [
            (start + int(t * seconds * TOKENS_PER_SECOND), start + h, start + w)
            for t, h, w in itertools.product(*axes)
        ]
    return out


def types_of(blocks: list[tuple[str, Any]]) -> list[int]:
    out: list[int] = []
    for kind, block in blocks:
        if kind == "text":
            out += [0] * block
        else:
            time, height, width = block[0]
            kind_id = {"image": 1, "video": 2}[kind]
            out += [kind_id] * (time * height * width // MERGE**2)
    return out


def rule() -> TrainedPositions:
    vision = {"spatial_merge_size": MERGE, "tokens_per_second": TOKENS_PER_SECOND}
    positions = TrainedPositions()
    positions.config = SimpleNamespace(vision_config=SimpleNamespace(**vision))
    return positions


def ours(rows: list[list[tuple[str, Any]]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Left-padded batch of rows through the code under test: positions, deltas, mask."""
    types = [types_of(row) for row in rows]
    length = max(map(len, types))
    mask = torch.tensor([[0] * (length - len(t)) + [1] * len(t) for t in types])
    blocks = [block for row in rows for block in row]
    positions, deltas = rule().get_rope_index(
        mask,  # whatever the ids
        torch.tensor([[0] * (length - len(t)) + t for t in types]),
        torch.tensor([block[0] for kind, block in blocks if kind == "image"]),
        torch.tensor([block[0] for kind, block in blocks if kind == "video"]),
        [block[1] for kind, block in blocks if kind == "video"],
        mask,
    )
    return positions, deltas, mask


@pytest.mark.parametrize("seconds", [0.0625, 0.25, 0.3, 0.5, 0.625, 0.7, 1.0, 3.75, 11.25])
def test_video_at_many_frame_rates(seconds: float) -> None:
    row = [("text", 4), ("video", ((16, 24, 42), seconds)), ("text", 7)]
    positions, deltas, _ = ours([row])
    expected = reference(row)
    assert positions[:, 0].T.tolist() == [list(p) for p in expected]
    # generate goes on from the last position, cached decoding from length + delta: the same
    assert positions.max() + 1 == len(expected) + deltas[0, 0] == positions[0, 0, -1] + 1


@pytest.mark.parametrize("rate", [10, 12, 15, 24, 25, 30, 30000 / 1001, 60])
def test_the_borders_between_steps_are_those_of_float32(rate: float) -> None:
    """Every ``step``-th frame of a file: the exact product is an integer in many a grid."""
    for step in range(1, 61):
        seconds = torch.tensor([2 / (rate / step)]).item()  # as the processor hands it over
        positions, _, _ = ours([[("video", ((48, 2, 2), seconds))]])
        # Qwen's published rule, literally: an integer range times a Python float, times 2
        assert positions[0, 0].tolist() == (torch.arange(48) * seconds * 2).long().tolist()
        products = np.arange(48, dtype=np.float32) * np.float32(seconds) * np.float32(2)
        assert positions[0, 0].tolist() == np.floor(products).astype(int).tolist()


def test_a_border_where_float64_differs() -> None:
    """3 frames a second, every fifth: the fourth grid begins after exactly 10 s, at step 20."""
    seconds = torch.tensor([2 / (3 / 5)]).item()
    positions, _, _ = ours([[("video", ((4, 2, 2), seconds))]])
    assert positions[0, 0, 3] == 20 and int(3 * seconds * 2) == 19


def test_mixed_images_and_videos_with_left_padding() -> None:
    rows = [
        [
            ("text", 3),
            ("image", ((1, 4, 8), 0)),
            ("text", 1),
            ("video", ((4, 4, 4), 0.75)),
            ("text", 5),
        ],
        [("text", 2)],
        [("video", ((2, 8, 4), 2.0)), ("video", ((6, 4, 4), 1.5)), ("text", 2)],
    ]
    positions, deltas, mask = ours(rows)
    for i, row in enumerate(rows):
        keep = mask[i].bool()
        assert positions[:, i, keep].T.tolist() == [list(p) for p in reference(row)]
        assert (positions[:, i, ~keep] == 0).all()
        assert deltas[i, 0] == positions[:, i].max() + 1 - keep.sum()


def test_without_a_clock_a_grid_lasts_a_second() -> None:
    row = prompt(3, 4, (8, 4, 4), 1.0)
    model, names = tiny_model().model, ("input_ids", "mm_token_type_ids", "video_grid_thw")
    positions, _ = model.get_rope_index(**{name: row[name] for name in names})
    expected = reference([("text", 4), ("video", ((8, 4, 4), 1.0)), ("text", 6)])
    assert positions[:, 0].T.tolist() == [list(p) for p in expected]


def test_grids_that_do_not_fit_the_tokens_are_named() -> None:
    with pytest.raises(ValueError, match="video_grid_thw"):
        rule().get_rope_index(
            torch.zeros(1, 4, dtype=torch.long),
            torch.tensor([[0, 2, 2, 2]]),
            video_grid_thw=torch.tensor([[1, 4, 4]]),
        )


def test_enabled_model_uses_the_rule_in_forward_and_in_generate() -> None:
    model, seen = tiny_model(), []
    model.model.language_model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["position_ids"][-3:]), with_kwargs=True
    )
    rows = [prompt(3, 4, (8, 4, 4), 3.75), prompt(4, 6, (2, 4, 4), 0.5)]
    batch = left_pad(rows)
    with torch.no_grad():
        model(**batch)
    model.generate(**batch, max_new_tokens=3)
    for i, (grid, seconds, text) in enumerate([((8, 4, 4), 3.75, 4), ((2, 4, 4), 0.5, 6)]):
        expected = torch.tensor(
            reference([("text", 4), ("video", (grid, seconds)), ("text", text + 2)])
        ).T
        for positions in seen[:2]:
            assert torch.equal(positions[:, i, -expected.shape[1] :], expected)
        following = torch.cat([p[:, i] for p in seen[2:]], 1)  # two decoding steps
        assert following.tolist() == [[int(expected.max()) + 1, int(expected.max()) + 2]] * 3


def test_the_rule_differs_from_the_stock_one_where_it_must() -> None:
    row = prompt(3, 4, (8, 4, 4), 3.75)
    wanted = {
        n: row[n]
        for n in ("input_ids", "mm_token_type_ids", "video_grid_thw", "second_per_grid_ts")
    }
    stock, _ = tiny_stock_model().model.get_rope_index(**wanted)
    trained, _ = tiny_model().model.get_rope_index(**wanted)
    last_video = int((row["input_ids"][0] == VIDEO).nonzero()[-1])
    assert trained[0, 0, last_video + 1] == trained[:, 0, : last_video + 1].max() + 1
    assert stock[0, 0, last_video + 1] < trained[0, 0, last_video + 1]


def test_text_only_prompts_count_from_zero() -> None:
    ids = prompts()[0]["input_ids"][:, :3]
    positions, deltas = tiny_model().model.get_rope_index(ids)
    assert positions.tolist() == [[[0, 1, 2]]] * 3 and deltas.tolist() == [[0]]
    assert positions.dtype == deltas.dtype == torch.long

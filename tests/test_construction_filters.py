"""Each filter tells a bad video from a good one, and from those that other filters are for."""

from pathlib import Path

import numpy as np
import pytest

from storm_vlm.construction import filters
from storm_vlm.construction.build import Sieve
from storm_vlm.construction.config import BuildConfig, FilterConfig
from storm_vlm.construction.steps import Draft
from storm_vlm.data.frame_hash import distances
from storm_vlm.data.row import Row, ThoughtVideo
from storm_vlm.data.video import read_video

DEFAULT = FilterConfig.model_validate({})


@pytest.fixture(scope="module")
def good(reasoning_rows: list[Row]) -> np.ndarray:
    return read_video(reasoning_rows[0].video, 6).frames


def bad_ones(good: np.ndarray) -> dict[str, np.ndarray]:
    dimmed = good.copy()
    dimmed[1::2] //= 3
    grey = np.full_like(good, 90)
    grey[:, :10] += np.arange(len(good), dtype=np.uint8)[:, None, None, None] * 40
    return {"blank": grey // 8 + 100, "frozen": np.repeat(good[:1], 6, axis=0), "flicker": dimmed}


def passes(name: str, frames: np.ndarray) -> bool:
    score = getattr(filters, name)(frames)
    limit = getattr(DEFAULT, name)
    return score >= limit if name in filters.LOW_IS_BAD else score <= limit


@pytest.mark.parametrize("name", ["blank", "frozen", "flicker"])
def test_a_filter_finds_its_own(name: str, good: np.ndarray) -> None:
    assert passes(name, good)
    assert {bad: passes(name, frames) for bad, frames in bad_ones(good).items()}[name] is False
    others = {"blank", "frozen", "flicker"} - {name, "blank"}  # an empty video hardly moves, too
    assert all(passes(name, bad_ones(good)[other]) for other in others)


def test_mismatch_sees_another_first_frame(good: np.ndarray, reasoning_rows: list[Row]) -> None:
    other = read_video(reasoning_rows[1].video, 6).frames[0]
    larger = good[0].repeat(2, axis=0).repeat(2, axis=1)  # a generator has a resolution of its own
    assert filters.mismatch(good, good[0]) == 0 and filters.mismatch(good, larger) < 0.01
    assert filters.mismatch(good, 255 - good[0]) > DEFAULT.mismatch  # type: ignore[operator]
    assert filters.mismatch(good, other) > 5 * filters.mismatch(good, larger)


def test_duplicates_survive_encoding_and_others_are_far(
    good: np.ndarray, reasoning_rows: list[Row]
) -> None:
    noise = np.random.default_rng(0).integers(-3, 4, good.shape)
    noisy = np.clip(good.astype(int) + noise, 0, 255).astype(np.uint8)
    prints = [filters.fingerprint(read_video(row.video, 6).frames) for row in reasoning_rows[1:]]
    mine = filters.fingerprint(good)
    limit = DEFAULT.duplicate or 0
    earlier = filters.Duplicates(limit)
    assert earlier.nearest(mine, "a") == 1
    for print_ in prints:
        earlier.add(print_, "b")
    assert earlier.nearest(mine, "a") > 2 * limit
    earlier.add(mine, "b")
    assert (
        earlier.nearest(mine, "a") == 0 < earlier.nearest(filters.fingerprint(noisy), "a") < limit
    )


@pytest.mark.parametrize("limit", [0.05, 0.2])
def test_no_duplicate_is_overlooked_and_few_others_are_looked_at(
    limit: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against comparing all with all: prints of which every fourth has a near copy."""
    random = np.random.default_rng(0)
    prints: list[bytes] = []
    for number in range(800):
        bits = random.random(2560) < 0.3
        if number % 4 == 3:
            bits = np.unpackbits(np.frombuffer(prints[random.integers(number)], np.uint8)) > 0
            flipped = random.choice(2560, int(0.9 * limit * bits.sum()), replace=False)
            bits[flipped] ^= True
        prints.append(np.packbits(bits).tobytes())
    table = np.stack([np.frombuffer(p, np.uint8) for p in prints])
    exact = distances(table, table)
    earlier, compared = filters.Duplicates(limit), []
    monkeypatch.setattr(
        filters, "distances", lambda a, b: compared.append(len(b)) or distances(a, b)
    )
    for number, print_ in enumerate(prints):
        nearest = exact[number, :number].min(initial=1)
        found = earlier.nearest(print_.hex(), number)
        assert found == nearest or (found >= nearest >= limit)
        earlier.add(print_.hex(), number)
    assert sum(compared) < 0.05 * len(prints) ** 2 / 2


def test_the_same_print_of_one_clip_is_kept_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """As of many questions about it: looking for duplicates must not take longer with each."""
    earlier, mine, compared = filters.Duplicates(0.05), "0f" * 320, []
    for _ in range(3):
        earlier.add(mine, "a")
    earlier.add("00" * 320, "a")  # without structure: like none
    monkeypatch.setattr(
        filters, "distances", lambda a, b: compared.append(len(b)) or distances(a, b)
    )
    assert earlier.nearest(mine, "b") == 0 and compared == [1]
    assert earlier.nearest("00" * 320, "b") == 1 == earlier.nearest(mine, "a")


def test_rejects_keep_reason_score_and_threshold(reasoning_rows: list[Row]) -> None:
    scores = {"blank": 0.5, "frozen": 0.001, "flicker": 0.9}
    row = reasoning_rows[0]
    dark, light = ("00" * 320, "ff" * 320)
    drafts = [
        Draft(row=row, scores=scores, fingerprint=dark),
        Draft(row=row, scores={"blank": 0.5}, fingerprint=light),
        Draft(row=row, scores={"blank": 0.5}, fingerprint=light),  # about the same clip
        Draft(row=row.model_copy(update={"start": 0.1}), scores={"blank": 0.5}, fingerprint=light),
        Draft(row=row, rejected="plan_refused", detail="why"),
    ]
    sieve = Sieve(DEFAULT)
    judged = [sieve.judge(draft) for draft in drafts]
    kept = [row for row, why in judged if why is None]
    assert [(why["reason"], why["score"], why["threshold"]) for _, why in judged if why] == [
        ("frozen", 0.001, 0.06),
        ("duplicate", 0.0, 0.05),
        ("plan_refused", None, None),
    ]
    assert isinstance(kept[0].thought_video, ThoughtVideo) and len(kept) == 2
    assert kept[0].thought_video.provenance["scores"] == {"blank": 0.5, "duplicate": 1.0}
    off = FilterConfig.model_validate(dict.fromkeys(FilterConfig.model_fields))
    sieve = Sieve(off)
    assert sum(sieve.judge(draft)[1] is None for draft in drafts) == 4


def test_thresholds_do_not_decide_what_is_stored() -> None:
    def decides(**changes: object) -> bool:
        plain, changed = (BuildConfig.model_validate(c) for c in ({}, changes))
        return plain.determining() != changed.determining()

    assert not decides(filters={"blank": 0.5}, workers=3, teacher={"timeout": 5, "base_url": "u"})
    assert (
        decides(seed=1)
        and decides(teacher={"model": "m"})
        and decides(generator_config={"steps": 4})
    )
    assert not decides(teacher={"temperature": 1.0})  # there is no teacher
    assert decides(steps=["keyframes"]) and decides(show_answer=False)


def test_off_topic_by_a_clip_model(good: np.ndarray, tmp_path: Path) -> None:
    """A random CLIP knows no topics, but the score is the cosine of its own embeddings."""
    import torch
    from tiny import tiny_processor
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

    torch.manual_seed(0)
    tokenizer = tiny_processor().tokenizer
    tokenizer.model_max_length = 32
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    tower |= {"num_attention_heads": 2}
    text = {**tower, "vocab_size": len(tokenizer), "max_position_embeddings": 32, "eos_token_id": 2}
    vision = {**tower, "image_size": 32, "patch_size": 16}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).eval()
    images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32)
    processor = CLIPProcessor(images, tokenizer)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    score = filters.off_topic(str(tmp_path))
    still = np.repeat(good[:1], 4, axis=0)
    inputs = processor(
        text=["a ball"], images=[still[0]], padding="max_length", return_tensors="pt"
    )
    with torch.inference_mode():
        output = model(**inputs)
    cosine = float((output.image_embeds @ output.text_embeds.T)[0, 0])
    assert score(still, "a ball") == pytest.approx(1 - cosine, abs=1e-5)
    assert score(still, "a ball") != pytest.approx(score(still, "a very different thing"), abs=1e-5)

"""Analysis: interventions against slow recomputation, probes against what they must find, the page."""

import json
import random
import re
from pathlib import Path

import pytest
import torch
from command_line import run_storm

from storm_vlm import StormPipeline
from storm_vlm.analysis.analyze import _decoder, analyze, read_analysis
from storm_vlm.analysis.embeddings import nearness
from storm_vlm.analysis.readouts import (
    SIDE,
    decoding_quality,
    logit_lens,
    psnr,
    similarity_maps,
    thought_frames,
    train_decoder,
)
from storm_vlm.analysis.reliance import (
    KINDS,
    _donors,
    _inputs,
    _says,
    _tampered,
    fed_answers,
    latent_reliance,
    rolled_out,
    slot_accuracy,
    slot_variants,
)
from storm_vlm.analysis.retrieval import first_ranks, retrieval, slot_ranks
from storm_vlm.analysis.states import States, extract
from storm_vlm.data.row import Row, read_rows, write_rows
from storm_vlm.lab.checkpoints import shipped
from storm_vlm.lab.world.clips import build_world, sample_several
from storm_vlm.lab.world.simulator import REASONING
from storm_vlm.model.interventions import answers_when_fed, noised, reordered
from storm_vlm.model.rollout import rollout
from storm_vlm.training.config import Method
from storm_vlm.training.targets import alignment_targets

K = 8
PLAIN = Method(latent_budget=K, target_normalization="none")


@pytest.fixture(scope="module")
def storm() -> StormPipeline:
    return StormPipeline.from_pretrained(str(shipped("storm")))


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve rows, three questions about each of four clips."""
    folder = tmp_path_factory.mktemp("several")
    return build_world(folder, "reasoning", "test", 4, questions=3)


@pytest.fixture(scope="module")
def rows(several: Path) -> list[Row]:
    return read_rows(several)


@pytest.fixture(scope="module")
def states(storm, rows, tmp_path_factory) -> States:
    return extract(storm, rows, tmp_path_factory.mktemp("states"), "storm", 5)


def test_a_scene_is_asked_several_questions_of_its_own(rows) -> None:
    for first in range(0, 12, 3):
        scene = rows[first : first + 3]
        assert len({row.video for row in scene}) == 1
        assert len({row.meta["family"] for row in scene}) == 3
        thoughts = [row.thought_video for row in scene]
        assert len({thought.path for thought in thoughts if thought}) == 3
    assert len({row.video for row in rows}) == 4
    with pytest.raises(ValueError, match="at most 5 questions"):
        list(sample_several(random.Random(0), REASONING, 1, (3, 5), 6))


# ------------------------------------------------------------------------------------------ interventions
def test_what_changes_nothing_changes_nothing_to_the_last_digit(storm, rows, states) -> None:
    own = states.latents[:4]
    slots = {
        "own": own,
        "swapped with itself": own[torch.arange(4)],
        "no noise": noised(own, 0.0, torch.Generator().manual_seed(0)),
        "identity": reordered(own, torch.arange(K)),
        "all slots": slot_variants(K)["all slots"](own),
        "longer": torch.cat([own, states.further[:4]], 1)[:, :K],
    }
    logits = answers_when_fed(storm.model, _inputs(storm, rows[:4]), slots)
    for kind, found in logits.items():
        assert torch.equal(found, logits["own"]), kind


@torch.no_grad()
def test_every_kind_equals_a_slow_recompute(storm, rows, states) -> None:
    """One pass over prompt, slots and the answer that was found, without any cache, writes that answer again."""
    given = {f"swap_{s}_answer": [3, 4, 5, 0] for s in ("same", "other")}
    slots = _tampered(states.latents, {k: [*v, *range(4, 12)] for k, v in given.items()}, 0)
    slots = {kind: found[:4] for kind, found in slots.items()}
    own, budget = states.latents[:4], (4, K, 128)
    assert not slots["zero"].any() and slots["removed"].shape == (4, 0, 128)
    torch.testing.assert_close(slots["mean"], states.latents.mean(0).expand(budget))
    assert torch.equal(slots["swap_other_answer"], states.latents[[3, 4, 5, 0]])
    torch.testing.assert_close(slots["shuffle"].sort(1).values, own.sort(1).values)
    slots |= {name: pick(states.latents[:4]) for name, pick in slot_variants(K).items()}
    logits = answers_when_fed(storm.model, _inputs(storm, rows[:4]), slots)
    for kind, found in logits.items():
        if kind == "removed":
            continue  # below
        inputs = {**_inputs(storm, rows[:4]), "labels": found.argmax(-1)}
        slow = rollout(storm.model, inputs, slots[kind].shape[1], slots[kind]).logits
        torch.testing.assert_close(found, slow, atol=2e-4, rtol=0, msg=kind)


@torch.no_grad()
def test_removed_slots_equal_the_stock_forward(storm, rows) -> None:
    inputs = _inputs(storm, rows[:1])
    found = answers_when_fed(storm.model, inputs, {"removed": torch.zeros(1, 0, 128)})["removed"]
    end = torch.tensor([[storm.model.config.latent_end_token_id]])
    ids = torch.cat([inputs["input_ids"], end, found.argmax(-1)[:, :-1]], 1)
    longer = {
        **inputs,
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": torch.nn.functional.pad(
            inputs["mm_token_type_ids"], (0, ids.shape[1] - inputs["input_ids"].shape[1])
        ),
    }
    slow = storm.model(**longer).logits[:, -found.shape[1] :]
    torch.testing.assert_close(found, slow, atol=2e-4, rtol=0)


def test_answers_are_those_that_generate_writes(storm, rows, states) -> None:
    other = states.latents[torch.arange(12).roll(3)]
    fed = fed_answers(storm, rows, {"own": states.latents, "other": other}, 5)
    end = storm.model.config.latent_end_token_id
    for kind, override in (("own", None), ("other", other)):
        written = storm.answer_batch(rows, latent_override=override, suppress_tokens=[end])
        assert fed[kind] == [answer.text for answer in written], kind
    assert fed["own"] != fed["other"]


def test_extracted_latents_are_those_that_generate_feeds(storm, rows, states) -> None:
    end = storm.model.config.latent_end_token_id
    inputs = _inputs(storm, rows)
    output = storm.model.generate(
        **inputs,
        do_sample=False,
        max_new_tokens=K + 3,
        suppress_tokens=[end],
        output_latent_states=True,
        return_dict_in_generate=True,
    )
    torch.testing.assert_close(states.latents, output.latent_states, atol=1e-4, rtol=0)
    shorter = rolled_out(storm, rows, 5, 3)
    torch.testing.assert_close(shorter, states.latents[:, :3], atol=1e-4, rtol=0)


def test_noise_is_as_long_as_told_and_orders_are_followed() -> None:
    states = torch.randn(2, 3, 16)
    moved = noised(states, 1.0, torch.Generator().manual_seed(0))
    torch.testing.assert_close(moved.norm(dim=-1), states.norm(dim=-1))
    assert (moved - states).norm(dim=-1).min() > 0.1
    turned = reordered(states, torch.tensor([[2, 1, 0], [0, 2, 1]]))
    assert torch.equal(turned[0], states[0, [2, 1, 0]])
    assert torch.equal(turned[1], states[1, [0, 2, 1]])


def test_donors_are_other_clips_with_the_answer_asked_for(rows) -> None:
    for same in (True, False):
        donors = _donors(rows, same, random.Random(0))
        assert any(donor is not None for donor in donors)
        for row, donor in zip(rows, donors, strict=True):
            if donor is not None:
                assert rows[donor].video != row.video
                assert (rows[donor].answer == row.answer) == same


def test_a_donors_answer_is_a_letter_where_there_are_options(rows) -> None:
    free, other = rows[0].model_copy(update={"answer": "up"}), rows[3]
    assert _says("Up.", other, free) and not _says("down", other, free)
    asked = other.model_copy(update={"options": ("a dog", "a cat"), "answer": "a dog"})
    donor = other.model_copy(update={"options": ("a bus", "a car"), "answer": "a car"})
    assert _says("B", asked, donor) and not _says("A", asked, donor)


def test_the_reliance_table_says_what_is_known_of_the_shipped_model(storm, rows, states) -> None:
    found = latent_reliance(storm, rows, states.latents, 12)
    assert found == latent_reliance(storm, rows, states.latents, 12)  # seeded
    assert set(found.interventions) == set(KINDS)
    own, swap, removed = (
        found.interventions[kind] for kind in ("own", "swap_other_answer", "removed")
    )
    assert own.accuracy and own.changed and swap.accuracy and swap.follows and swap.follows_own
    assert own.accuracy.mean > 0.5 > swap.accuracy.mean and own.changed.mean == 0
    assert swap.follows.mean > swap.follows_own.mean
    assert swap.difference and found.reliance.low == -swap.difference.high > 0
    assert found.sensitivity.clip.mean > 0.5 > found.sensitivity.question.slots[0]
    slots = slot_accuracy(storm, rows, states.latents, states.further, 12)
    assert slots.variants["all slots"] == slots.sweep[8] == own.accuracy
    assert slots.sweep[0] == removed.accuracy


def test_reliance_without_a_second_clip_is_refused(storm, rows) -> None:
    with pytest.raises(ValueError, match="another clip"):
        latent_reliance(storm, rows[:3], torch.zeros(3, K, 128))


# ------------------------------------------------------------------------------------------ probes
def test_states_are_reused_only_for_the_same_inputs(storm, rows, tmp_path) -> None:
    made = extract(storm, rows[:3], tmp_path, "storm", 2)
    (file,) = tmp_path.glob("states/*/*")
    written = file.stat().st_mtime_ns
    again = extract(storm, rows[:3], tmp_path, "storm", 2)
    assert file.stat().st_mtime_ns == written
    assert torch.equal(made.latents, again.latents) and torch.equal(made.text, again.text)
    assert all(map(torch.equal, made.frames + made.keyframes, again.frames + again.keyframes))
    fewer = extract(storm, rows[:2], tmp_path, "storm", 2)
    assert len(fewer.latents) == 2 and file.stat().st_mtime_ns == written
    (file,) = set(tmp_path.glob("states/*/*")) - {file}
    file.write_bytes(b"damaged")
    assert torch.equal(extract(storm, rows[:2], tmp_path, "storm", 2).latents, fewer.latents)
    about = json.loads((tmp_path / "states.json").read_text())
    assert about["rows"] == 2 and about["shapes"]["latents"] == [2, K, 128]


@torch.no_grad()
def test_text_and_visual_states_are_the_stock_models(storm, rows, states) -> None:
    """Against one plain forward of a row by itself: no batch, no padding, no cache."""
    inputs = _inputs(storm, rows[1:2])
    ids = inputs["input_ids"][0]
    question = storm.processor.tokenizer(rows[1].question)["input_ids"]
    at = next(i for i in range(len(ids)) if ids[i : i + len(question)].tolist() == question)
    hidden = storm.model.model(**inputs).last_hidden_state[0]
    text = hidden[at : at + len(question)].mean(0)
    torch.testing.assert_close(states.text[1], text, atol=1e-4, rtol=0)
    torch.testing.assert_close(states.latents[1, 0], hidden[-1], atol=1e-4, rtol=0)
    pixels, grid = inputs["pixel_values_videos"], inputs["video_grid_thw"]
    tokens = storm.model.model.get_video_features(pixels, grid).pooler_output[0]
    frames = tokens.view(3, 16, -1).mean(1)
    torch.testing.assert_close(states.frames[1], frames, atol=1e-4, rtol=0)
    (target,) = alignment_targets(storm.model, storm.processor, rows[1:2], PLAIN)
    torch.testing.assert_close(states.targets[1], target, atol=1e-4, rtol=0)


def test_retrieval_ranks_by_hand() -> None:
    points = torch.tensor([[1.0, 0.1], [0.9, 0.3], [-1.0, 0.2], [0.1, -1.0]])
    videos = ["a", "b", "a", "b"]
    # by cosine less the mean: 0 and 1 point one way, 2 and 3 others
    centred = torch.nn.functional.normalize(points - points.mean(0), dim=-1)
    alike = centred @ centred.T
    expected = []
    for i in range(4):
        order = sorted((j for j in range(4) if j != i), key=lambda j, i=i: -float(alike[i, j]))
        expected.append(1 + next(n for n, j in enumerate(order) if videos[j] == videos[i]))
    assert first_ranks(points, points, videos, range(4)).tolist() == expected
    constant = first_ranks(torch.ones(4, 2), torch.ones(4, 2), videos, range(4))
    assert constant.tolist() == [3] * 4  # the two others first: it knows nothing


def test_latents_of_one_clip_find_each_other(states, rows) -> None:
    found = retrieval(states, rows)
    assert found is not None and found.queries == 12
    kinds = found.representations
    assert kinds["latent"]["mrr"].mean > kinds["random"]["mrr"].mean + 0.2
    assert retrieval(states, [row.model_copy(update={"video": row.id}) for row in rows]) is None
    ranks = slot_ranks(states.latents, [row.video for row in rows], range(12))
    same = slot_ranks(states.latents.flip(1), [row.video for row in rows], range(12))
    for name in ("mean of all slots", "side by side"):
        assert torch.equal(ranks[name], same[name])
    assert torch.equal(ranks["slot 1 alone"], same["slot 8 alone"])


def test_latents_lie_nearer_to_their_own_thought_video(states, rows) -> None:
    assert states.whitened_space
    found = nearness(states, rows)["thought_video"]
    assert found is not None and found.nearer.mean > 0.8
    turned = nearness(states, [*rows[3:], *rows[:3]])["thought_video"]
    assert turned is not None and turned.own.mean == pytest.approx(found.own.mean, abs=0.05)


# ------------------------------------------------------------------------------------------ watch
def test_the_decoder_draws_what_it_was_shown(states, rows) -> None:
    frames = thought_frames(rows, K)
    assert frames.shape == (12, K, 3, SIDE, SIDE)
    decoder = train_decoder(states.latents, frames, epochs=200)
    quality = decoding_quality(decoder, states.latents, frames, frames[:, 0], rows)
    assert quality.own.mean > quality.another_clip.mean + 5
    assert quality.last_shown == quality.first_thought_held
    again = train_decoder(states.latents, frames, epochs=200)
    assert torch.equal(decoder(states.latents), again(states.latents))
    assert float(psnr(torch.zeros(1, 4), torch.full((1, 4), 0.1))) == pytest.approx(20)


def test_maps_and_lens(storm, rows, states, reasoning_rows) -> None:
    maps = similarity_maps(storm, rows[0], states.latents[0], states)
    assert maps.shape == (K, 3, 4, 4)
    inputs, (mean, matrix) = _inputs(storm, rows[:1]), states.whitening
    pixels, grid = inputs["pixel_values_videos"], inputs["video_grid_thw"]
    tokens = storm.model.model.get_video_features(pixels, grid).pooler_output[0].detach()
    by_hand = (tokens[16 + 3 * 4 + 2] - mean) @ matrix @ states.latents[0, 2]
    torch.testing.assert_close(maps[2, 1, 3, 2], by_hand / states.latents[0, 2].norm())
    # Slot 1 holds what was last seen, so it points at the ball more often than not (by chance: 1 in 16).
    found = 0
    for row, latents in zip(reasoning_rows, rolled_out(storm, reasoning_rows), strict=True):
        column, line = re.findall(r"ball is at (.)(.)", row.plan or "")[0]
        peak = int(similarity_maps(storm, row, latents, states)[0, -1].argmax())
        found += peak == 4 * (int(line) - 1) + "abcd".index(column)
    assert found > len(reasoning_rows) / 2
    lens = logit_lens(storm, states.latents[0])
    assert len(lens) == K and all(1 >= a[1] >= b[1] >= c[1] >= 0 for a, b, c in lens)


def test_the_decoder_is_not_tried_on_what_it_was_trained_on(storm, states, rows) -> None:
    decoder, held_out = _decoder(storm, rows, states, None, 12)
    assert decoder is not None and held_out == [0, 1, 2, 6, 7, 8]
    none = [row.model_copy(update={"thought_video": None}) for row in rows]
    assert _decoder(storm, none, states, None, 12) == (None, [])


# ------------------------------------------------------------------------------------------ command
def test_the_command_writes_a_page_that_asks_for_nothing(several, reasoning_file, tmp_path) -> None:
    out, record = tmp_path / "out", tmp_path / "reliance.json"
    arguments = ["analyze", str(shipped("storm")), str(several), "--limit", "6", "--out", str(out)]
    arguments += ["--retrieval-rows", str(several), "--decoder-rows", str(reasoning_file)]
    result = run_storm(*arguments, "--results", record)
    assert result.exit_code == 0, result.output
    assert "latents move" in result.output and "no slots at all" in result.output
    page = (out / "report.html").read_text()
    assert not re.search(r"""(?:src|href)=["'](?!data:)""", page)
    found = {
        part: json.loads((out / f"{part}.json").read_text())
        for part in ("reliance", "slots", "embeddings", "retrieval", "watch")
    }
    assert all(part["n"] == 6 and part["commit"] for part in found.values())
    assert found["retrieval"]["retrieval"]["queries"] == 12
    assert found["watch"]["watch"]["decoding"]["own"]["n"] == 6
    assert json.loads(record.read_text())["reliance"] == found["reliance"]["reliance"]["reliance"]


def test_rows_without_thought_videos_get_the_rest_of_the_page(several, rows, tmp_path) -> None:
    nothing = {"thought_video": None, "keyframes": (), "meta": {}}
    choices = {"options": ("up", "down"), "answer": "up"}
    plain = [
        row.model_copy(update={**nothing, **choices, "answer": ("up", "down")[i % 2]})
        for i, row in enumerate(rows[:7:3])
    ]
    write_rows(tmp_path / "plain.jsonl", plain)
    found = analyze(str(shipped("storm")), tmp_path / "plain.jsonl", tmp_path / "out")
    assert found.retrieval is None and found.watch.decoding is None
    assert read_analysis(tmp_path / "out") == found
    assert found.embeddings.nearness == {"keyframes": None, "thought_video": None}
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("Not measured") == 2 and "Not drawn" in page
    with pytest.raises(ValueError, match="latent slots"):
        analyze(str(shipped("backbone")), tmp_path / "plain.jsonl", tmp_path / "out")

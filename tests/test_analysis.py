"""The validity suite: replacements against slow recomputation, probes against what they must find, the page."""

import gzip
import html
import json
import random
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from command_line import run_storm

from storm_vlm import StormPipeline
from storm_vlm.analysis.embeddings import nearness
from storm_vlm.analysis.probes import _folds, correlation, probe
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
    Donors,
    Tampered,
    _donors,
    _inputs,
    _says,
    fed_answers,
    latent_reliance,
    reliance_of,
    replacements,
    rolled_out,
    slot_accuracy,
    slot_kinds,
    slot_variants,
    tamper,
)
from storm_vlm.analysis.retrieval import first_ranks, retrieval, slot_ranks
from storm_vlm.analysis.states import Batches, States, extract, kept_batches
from storm_vlm.analysis.validate import _decoder, read_analysis, validate
from storm_vlm.data.answer import is_correct
from storm_vlm.data.row import Row, read_rows, write_rows
from storm_vlm.evaluation.records import Movement, Sensitivity
from storm_vlm.evaluation.verdict import verdict
from storm_vlm.lab.checkpoints import shipped
from storm_vlm.lab.world.clips import build_world
from storm_vlm.lab.world.mirrors import sample_several
from storm_vlm.lab.world.simulator import REASONING
from storm_vlm.model.interventions import answers_when_fed, noised, recorded_layers, reordered
from storm_vlm.model.latent import whiten_targets
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
    return extract(storm, rows, Batches(5))


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
    donor: list[int | None] = [3, 4, 5, 0, *range(4, 12)]
    given = Donors(same=donor, other=donor)
    fed = replacements(storm, states.latents, given, states.visual(states.targets))
    assert fed.keys() == KINDS.keys()
    slots = {kind: found[:4] for kind, found in fed.items() if found is not None}
    assert set(fed) - set(slots) == {"no_markers"}
    own, budget = states.latents[:4], (4, K, 128)
    assert not slots["zero"].any() and slots["removed"].shape == (4, 0, 128)
    torch.testing.assert_close(slots["mean"], states.latents.mean(0).expand(budget))
    assert torch.equal(slots["swap_other_answer"], states.latents[[3, 4, 5, 0]])
    torch.testing.assert_close(slots["shuffle"].sort(1).values, own.sort(1).values)
    assert torch.equal(slots["first_repeat"][:, 5], own[:, 0])
    torch.testing.assert_close(slots["random"].norm(dim=-1), own.norm(dim=-1))
    for slot in range(K):  # of that slot, whatever the row
        for drawn in slots["matched_random"][:, slot]:
            assert (drawn == states.latents[:, slot]).all(-1).any()
    pad = storm.model.get_input_embeddings().weight[storm.model.config.latent_pad_token_id]
    torch.testing.assert_close(slots["pause"], pad.expand(budget))
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
    fed = fed_answers(storm, rows, {"own": states.latents, "other": other, "plain": None})
    end = storm.model.config.latent_end_token_id
    for kind, override in (("own", None), ("other", other)):
        written = storm.answer_batch(rows, latent_override=override, suppress_tokens=[end])
        assert fed[kind] == [answer.text for answer in written], kind
    plain = StormPipeline(storm.model, storm.processor, latent_mode="off")
    assert fed["plain"] == [answer.text for answer in plain.answer_batch(rows)]
    assert fed["own"] != fed["other"] != fed["plain"]


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
    shorter = rolled_out(storm, rows, Batches(5), 3)
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
    assert set(found.interventions) == set(KINDS) - {"oracle"}
    own, swap, removed = (
        found.interventions[kind] for kind in ("own", "swap_other_answer", "removed")
    )
    assert own.accuracy and own.changed and swap.accuracy and swap.follows and swap.follows_own
    assert own.accuracy.mean > 0.5 > swap.accuracy.mean and own.changed.mean == 0
    assert swap.follows.mean > swap.follows_own.mean
    assert swap.difference and found.reliance.low == -swap.difference.high > 0
    assert found.sensitivity.clip.mean > 0.5 > found.sensitivity.question.slots[0]
    assert swap.follows_more and swap.follows_more.low > 0
    kinds = slot_kinds(states.latents, states.latents, states.further)
    slots = slot_accuracy(rows, fed_answers(storm, rows, kinds))
    assert slots.variants["all slots"] == slots.sweep[8] == own.accuracy
    assert slots.sweep[0] == removed.accuracy


def test_reliance_without_a_second_clip_is_refused(storm, rows) -> None:
    with pytest.raises(ValueError, match="another clip"):
        latent_reliance(storm, rows[:3], torch.zeros(3, K, 128))


def test_slots_that_a_row_has_not_are_replaced_by_nothing(storm, rows, states) -> None:
    own = states.latents.clone()
    own[::2, 3:] = float("nan")
    donor: list[int | None] = [*range(1, 12), 0]
    fed = replacements(storm, own, Donors(same=donor, other=donor), states.visual(states.targets))
    fed |= slot_kinds(own, states.latents, states.further)
    counts = {
        kind: (~f.isnan().any(-1)).sum(1).tolist() for kind, f in fed.items() if f is not None
    }
    swapped = {"swap_same_answer": [K, 3] * 6, "swap_other_answer": [K, 3] * 6, "removed": [0] * 12}
    for kind in KINDS.keys() - {"no_markers"}:
        assert counts[kind] == swapped.get(kind, [3, K] * 6), kind
    assert counts["all slots"] == counts["reversed"] == counts["mean in every slot"] == [3, K] * 6
    assert counts["without 2"] == [2, K - 1] * 6 and counts["slot 7 alone"] == [0, 1] * 6
    assert counts["k6"] == [6] * 12


# ------------------------------------------------------------------------------------------ probes
def test_a_row_of_fewer_slots_has_as_many_targets_as_in_training(storm, rows) -> None:
    few = [rows[0].model_copy(update={"slots": 3}), *rows[1:3]]
    states = extract(storm, few, Batches(3))
    method = Method(latent_budget=K, target_normalization="none")
    trained = alignment_targets(storm.model, storm.processor, few, method)
    assert states.target_counts.tolist() == [3, K, K]
    for row, target in enumerate(trained):
        assert target is not None
        torch.testing.assert_close(states.targets[row, : len(target)], target)
    assert torch.equal(states.targets[0, 2:], states.targets[0, 2:3].expand(K - 2, -1))
    white = alignment_targets(storm.model, storm.processor, few, Method(latent_budget=K))
    assert white[0] is not None
    found = whiten_targets(states.targets[0, :3], *states.whitening)
    torch.testing.assert_close(found, white[0], atol=1e-3, rtol=0)


def test_states_are_reused_only_for_the_same_inputs(storm, rows, tmp_path) -> None:
    name = str(shipped("storm"))
    batches = kept_batches(storm, tmp_path, name, 2)
    made = extract(storm, rows[:3], batches)
    files = set(tmp_path.glob("states/*/*"))
    written = {file.stat().st_mtime_ns for file in files}
    assert len(files) == 2
    again = extract(storm, rows[:3], batches)
    assert {file.stat().st_mtime_ns for file in files} == written
    assert torch.equal(made.latents, again.latents) and torch.equal(made.text, again.text)
    assert all(map(torch.equal, made.frames + made.keyframes, again.frames + again.keyframes))
    more = extract(storm, rows[:4], batches)
    (file,) = set(tmp_path.glob("states/*/*")) - files
    file.write_bytes(b"damaged")
    assert torch.equal(extract(storm, rows[:4], batches).latents, more.latents)
    other = kept_batches(storm, tmp_path, str(shipped("backbone")), 2)
    extract(storm, rows[:2], other)  # another checkpoint's states are its own
    assert len(set(tmp_path.glob("states/*/*")) - files) == 2


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
    nothing = states.latents[:0]
    decoder, held_out = _decoder(rows, states, [], nothing, given=False)
    assert decoder is not None and held_out == [0, 1, 2, 6, 7, 8]
    none = [row.model_copy(update={"thought_video": None}) for row in rows]
    assert _decoder(none, states, [], nothing, given=False) == (None, [])


# ------------------------------------------------------------------------------------------ verdict
RECORD = Path(__file__).resolve().parent.parent / "docs/results/outcomes"


@pytest.mark.parametrize(
    ("arm", "matters"),
    [("full", True), ("stage1_only", True), ("shuffled", False), ("stage2_only", False)],
)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_verdict_tells_the_recorded_arms_apart(arm: str, matters: bool, seed: int) -> None:
    """Trained models' answers to 400 questions; two of the arms were built to fail."""
    run = json.loads(gzip.decompress((RECORD / f"{arm}-{seed}.json.gz").read_bytes()))
    asked = [SimpleNamespace(video=outcome["id"]) for outcome in run["test"]]
    still = Movement(1.0, 0.9, 1.1, 400, (1.0,) * K)
    tampered, moved = Tampered(**run["tampered"]), Sensitivity(still, still)
    found = verdict(reliance_of(asked, tampered, K, moved))  # type: ignore[arg-type]
    assert found.matter == matters, found.text
    assert found.text.startswith(
        "The latents matter" if matters else "No evidence that the latents"
    )


def test_slots_that_hold_nothing_are_no_evidence(rows) -> None:
    """A model of pause slots; and one without a Stage, whose answers are what they are."""
    paused = StormPipeline.from_pretrained(str(shipped("storm")))
    paused.model.config.latent_pause = True
    found = latent_reliance(paused, rows, None, 12)
    assert found.reliance.mean == 0 == found.sensitivity.clip.mean
    ends = paused.answer_batch(rows)
    tampered, fed = tamper(paused, rows)
    assert not any(tampered.changed["swap_other_answer"]) and (fed == fed[:1]).all()
    assert tampered.right["own"] == [
        bool(is_correct(a.text, r)) for a, r in zip(ends, rows, strict=True)
    ]
    assert "No evidence that the latents matter: ignored latents" in verdict(found).text


def test_latents_that_steer_but_do_not_help_are_told_from_those_that_do(rows) -> None:
    count = 120  # of fewer than 100 clips the verdict says so first
    asked = [SimpleNamespace(video=str(i)) for i in range(count)]
    own = [i < 80 for i in range(count)]
    swapped = [i < 20 for i in range(count)]
    still = Movement(1.0, 0.9, 1.1, count, (1.0,))

    def told(**right: list[bool]) -> str:
        kinds = {"own": own, "swap_other_answer": swapped, **right}
        changed = {
            kind: [a != b for a, b in zip(own, hits, strict=True)] for kind, hits in kinds.items()
        }
        followed = Tampered(kinds, changed, [not hit for hit in swapped], [False] * count)  # type: ignore[arg-type]
        return verdict(reliance_of(asked, followed, 1, Sensitivity(still, still))).text  # type: ignore[arg-type]

    assert told() == told(removed=swapped) and told().startswith("The latents matter")
    assert "marker effect" in told(removed=own) and "no evidence that they are better" in told(
        removed=own
    )
    assert told(matched_random=own).startswith("No evidence that the latents matter: any state")
    assert told(first_repeat=own).startswith(
        "The latents matter"
    ) and "collapse over slots" in told(first_repeat=own)
    assert "the oracle is no better" in told(oracle=own)
    assert "the oracle" not in told(oracle=[True] * count)


# ------------------------------------------------------------------------------------------ probes
def made_up(latents: torch.Tensor, rows: list[Row]) -> States:
    count = len(rows)
    layers = torch.cat([latents, torch.randn(count, 2, latents.shape[-1])], 1)[:, None]
    nothing = torch.zeros(count, 1, 4)
    return States(
        latents=latents,
        layers=layers,
        probed_layers=(0,),
        further=latents,
        text=nothing[:, 0],
        frames=[*nothing],
        keyframes=[*nothing],
        targets=latents,
        target_counts=torch.full((count,), K),
    )


def test_a_probe_finds_the_answer_where_it_is_and_only_there(rows) -> None:
    torch.manual_seed(0)
    asked = [
        rows[0].model_copy(update={"video": str(i // 2), "answer": ("up", "down", "left")[i % 3]})
        for i in range(120)
    ]
    latents = torch.randn(120, 3, 32)
    latents[torch.arange(120), 1, torch.arange(120) % 3] += 6  # slot 2 holds it
    right = [i % 4 > 0 for i in range(120)]
    found = probe(made_up(latents, asked), asked, right)
    assert found and found.accuracy["slot 2"][0] > 0.9
    for place in ("slot 1", "slot 3", "question", "last token"):
        assert found.accuracy[place][0] < 0.5, place
    assert found.over_text.low > 0 < found.over_shuffled.low and found.shuffled.mean < 0.5
    folds = _folds([row.video for row in asked]).view(-1, 2)
    assert (folds[:, 0] == folds[:, 1]).all() and set(folds.flatten().tolist()) == set(range(5))
    assert probe(made_up(latents[:12], asked[:12]), asked[:12], right[:12]) is None


def test_correlation_is_pearsons() -> None:
    drawn = np.random.default_rng(0)
    values, right = drawn.normal(size=80), drawn.random(80) < 0.5
    found = correlation(values + right, right, [str(i) for i in range(80)])
    assert found and found.mean == pytest.approx(np.corrcoef(values + right, right)[0, 1])
    assert found.low < found.mean < found.high
    assert correlation(values, [True] * 80, ["a"] * 80) is None


@torch.no_grad()
def test_recorded_layers_are_those_of_one_plain_forward(storm, rows, states) -> None:
    """Slots, the question and the last token, at the first layer and the last, of a row by itself."""
    inputs = {**_inputs(storm, rows[1:2])}
    length = inputs["input_ids"].shape[1]
    with recorded_layers(storm.model, [0, 3], lambda hidden: hidden) as recorded:
        rollout(storm.model, inputs, K, states.latents[1:2])
    for layer, (whole,) in zip((0, -1), recorded, strict=True):
        slots = whole[0, length : length + K]
        torch.testing.assert_close(states.layers[1, layer, :K], slots, atol=1e-3, rtol=0)
        torch.testing.assert_close(
            states.layers[1, layer, -1], whole[0, length - 2], atol=1e-3, rtol=0
        )
    assert states.probed_layers == (0, 1, 2, 3)


# ------------------------------------------------------------------------------------------ command
def test_the_command_writes_a_page_that_asks_for_nothing(several, reasoning_file, tmp_path) -> None:
    out = tmp_path / "out"
    arguments = ["validate", str(shipped("storm")), str(several), "--limit", "6", "--out", str(out)]
    arguments += ["--retrieval-rows", str(several), "--decoder-rows", str(reasoning_file)]
    result = run_storm(*arguments)
    assert result.exit_code == 0, result.output
    assert "latents move" in result.output and "markers only" in result.output
    page = (out / "report.html").read_text()
    assert not re.search(r"""(?:src|href)=["'](?!data:)""", page)
    found = json.loads((out / "validity.json").read_text())
    assert found["about"]["n"] == 6 and found["about"]["commit"]
    assert found["retrieval"]["queries"] == 12 and found["watch"]["decoding"]["own"]["n"] == 6
    assert found["verdict"]["text"] in html.unescape(page) and "Only 2 clips" in result.output
    kept = json.loads((out / "reliance.json").read_text())
    assert kept["interventions"] == found["reliance"]["interventions"]
    told = run_storm("report", out)  # the folder is a run
    assert "Latent reliance" in told.output and "latents matter" in told.output
    answers = (out / "answers-0.jsonl").read_bytes()
    (out / "answers-0.jsonl").write_bytes(answers[: len(answers) // 2])  # a kill
    again = run_storm(*arguments, "--json")
    assert (out / "answers-0.jsonl").read_bytes() == answers
    assert json.loads(again.stdout)["verdict"] == found["verdict"]


def test_rows_without_thought_videos_get_the_rest_of_the_page(several, rows, tmp_path) -> None:
    nothing = {"thought_video": None, "keyframes": (), "meta": {}}
    choices = {"options": ("up", "down"), "answer": "up"}
    plain = [
        row.model_copy(update={**nothing, **choices, "answer": ("up", "down")[i % 2]})
        for i, row in enumerate(rows[:7:3])
    ]
    write_rows(tmp_path / "plain.jsonl", plain)
    found = validate(str(shipped("storm")), tmp_path / "plain.jsonl", tmp_path / "out")
    assert found and found.retrieval is None and found.watch.decoding is None
    assert read_analysis(tmp_path / "out") == found
    assert found.embeddings.nearness == {"keyframes": None, "thought_video": None}
    page = (tmp_path / "out" / "report.html").read_text()
    assert (
        found.probes is None
        and "Not probed" in page
        and page.count("Not measured") == 2
        and "Not drawn" in page
    )
    with pytest.raises(ValueError, match="latent slots"):
        validate(str(shipped("backbone")), tmp_path / "plain.jsonl", tmp_path / "out")

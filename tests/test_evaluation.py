"""Evaluation: scores, controls and interventions."""

import pytest
import torch

from storm_vlm import StormPipeline
from storm_vlm.data.prompt import option_letter
from storm_vlm.data.video import VideoError
from storm_vlm.evaluation.controls import CONTROLS, without_evidence
from storm_vlm.evaluation.evaluate import evaluate_interventions
from storm_vlm.evaluation.exam import Exam, evaluate
from storm_vlm.evaluation.frames import Frames
from storm_vlm.evaluation.reasoners import Latent
from storm_vlm.evaluation.records import Record, Reply
from storm_vlm.evaluation.statistics import accuracy
from storm_vlm.world.checkpoints import shipped


@pytest.fixture(scope="module")
def storm() -> StormPipeline:
    return StormPipeline.from_pretrained(str(shipped("storm")))


FRAMES = Frames(6)


def outcomes(records: list[Record]) -> list[tuple]:
    return [(r.id, r.correct, r.reply and (r.reply.text, r.reply.slots_used)) for r in records]


def test_results_do_not_depend_on_the_batch_size(storm, reasoning_rows) -> None:
    five, one = (evaluate(Latent(storm), reasoning_rows, FRAMES, size) for size in (5, 1))
    assert outcomes(five) == outcomes(one)


def test_teacher_forced_score_is_the_greedy_score(storm, reasoning_rows) -> None:
    """With the end suppressed, greedy decoding fills every slot, as the fixed-length rollout does."""
    end = storm.model.config.latent_end_token_id
    greedy = evaluate(Latent(storm, suppress_tokens=[end]), reasoning_rows, FRAMES)
    assert all(record.reply and record.reply.slots_used == 8 for record in greedy)
    right = evaluate_interventions(storm, reasoning_rows, 32)
    assert sum(right["none"]) == sum(record.correct for record in greedy)
    assert all(len(hits) == len(reasoning_rows) for hits in right.values())


def test_controls_take_the_evidence_away(storm, reasoning_rows) -> None:
    row = reasoning_rows[0]
    clip = FRAMES.read(row)
    assert clip is not None
    shown = {c: without_evidence(row, c, FRAMES, row.id).video for c in CONTROLS[:4]}
    assert shown["text_only"] is None
    assert (shown["reversed_frames"].frames == clip.frames[::-1]).all()
    assert (shown["one_frame"].frames == clip.frames[-1]).all()
    shuffled = shown["shuffled_frames"].frames
    assert (shuffled != clip.frames).any()
    assert sorted(f.tobytes() for f in shuffled) == sorted(f.tobytes() for f in clip.frames)
    again = without_evidence(row, "shuffled_frames", FRAMES, row.id).video
    assert (again.frames == shuffled).all()  # drawn by the row's id
    plain = outcomes(evaluate(Latent(storm), reasoning_rows, FRAMES))
    for control in CONTROLS[:4]:
        records = evaluate(Latent(storm), reasoning_rows, FRAMES, 8, control)
        assert [r.id for r in records] == [row.id for row in reasoning_rows]
        assert outcomes(records) != plain, control
    # Blind, the model says the same whatever the clip shows.
    other = row.model_copy(update={"video": reasoning_rows[1].video})
    blind = evaluate(Latent(storm), [row, other], FRAMES, 2, "text_only")
    assert blind[0].reply and blind[1].reply and blind[0].reply.text == blind[1].reply.text


def test_permuted_options_are_scored_as_they_were_shown(reasoning_rows) -> None:
    options = ("one", "two", "three", "four")
    rows = [
        row.model_copy(update={"options": options, "answer": "three"}) for row in reasoning_rows
    ]
    exam = Exam(rows, FRAMES, control="permuted_options")
    seen = set()
    for row in rows:
        shown = exam.shown(row)
        assert exam.asked(shown).options == shown.options and sorted(shown.options) == sorted(
            options
        )
        right = shown.options.index("three")
        seen.add(right)
        for index in range(4):
            record = exam.record(shown, Reply(option_letter(index)), None)
            assert record.correct == (index == right) and record.options == shown.options
    assert len(seen) > 1


class Spoken:
    """A benchmark with a prompt and a rule of its own."""

    name = "spoken"
    groups = ("family", "absent")

    def read(self, folder):
        raise NotImplementedError

    def official_prompt(self, row):
        return f"Say it: {row.question}"

    def official_score(self, text, row):
        return 1.0 if text else None


def test_a_benchmark_asks_in_its_own_words_and_scores_by_its_own_rule(reasoning_rows) -> None:
    row = reasoning_rows[0].model_copy(update={"start": 0.25})
    exam = Exam([row], FRAMES, Spoken(), prompt="official")
    asked = exam.asked(row)
    assert asked.question == f"Say it: {row.question}" and asked.start == 0.25
    record = exam.record(row, Reply("who knows"), None)
    assert (record.correct, record.parsed, record.official) == (False, True, 1.0)
    assert record.groups == {"family": row.meta["family"]}
    unanswered = exam.record(row, None, "gone")
    assert (unanswered.correct, unanswered.official, unanswered.error) == (False, None, "gone")


def test_a_missing_clip_stops_an_evaluation_in_memory(storm, reasoning_rows) -> None:
    gone = reasoning_rows[0].model_copy(update={"video": "/nowhere.mp4"})
    with pytest.raises(VideoError, match="nowhere"):
        evaluate(Latent(storm), [gone], FRAMES)


def test_unparsed_answers_stay_in_the_denominator() -> None:
    assert accuracy([True, None, False, True]) == 0.5


def test_evaluation_leaves_the_model_as_it_was(storm, reasoning_rows) -> None:
    before = {n: p.clone() for n, p in storm.model.state_dict().items()}
    evaluate_interventions(storm, reasoning_rows, 4)
    assert all(torch.equal(p, before[n]) for n, p in storm.model.state_dict().items())

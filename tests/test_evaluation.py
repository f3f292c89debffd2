"""Evaluation: scores, controls and interventions."""

import pytest
import torch

from storm_vlm import StormPipeline
from storm_vlm.evaluation.evaluate import (
    CONTROLS,
    accuracy,
    evaluate,
    evaluate_interventions,
)
from storm_vlm.world.checkpoints import shipped


@pytest.fixture(scope="module")
def storm() -> StormPipeline:
    return StormPipeline.from_pretrained(str(shipped("storm")))


def test_results_do_not_depend_on_the_batch_size(storm, reasoning_rows) -> None:
    assert evaluate(storm, reasoning_rows, 5) == evaluate(storm, reasoning_rows, 1)


def test_teacher_forced_score_is_the_greedy_score(storm, reasoning_rows) -> None:
    """With the end suppressed, greedy decoding fills every slot, as the fixed-length rollout does."""
    end = storm.model.config.latent_end_token_id
    greedy = evaluate(storm, reasoning_rows, suppress_tokens=[end])
    assert all(result.slots_used == 8 for result in greedy)
    right = evaluate_interventions(storm, reasoning_rows, 32)
    assert sum(right["none"]) == sum(bool(result.correct) for result in greedy)
    assert all(len(hits) == len(reasoning_rows) for hits in right.values())


def test_controls_take_the_evidence_away(storm, reasoning_rows) -> None:
    for control in CONTROLS:
        results = evaluate(storm, reasoning_rows, 8, control)
        assert [r.id for r in results] == [row.id for row in reasoning_rows]
    # Blind, the model says the same whatever the clip shows.
    other = reasoning_rows[0].model_copy(update={"video": reasoning_rows[1].video})
    blind = evaluate(storm, [reasoning_rows[0], other], 2, "text_only")
    assert blind[0].prediction == blind[1].prediction
    assert evaluate(storm, reasoning_rows, 8, "text_only") != evaluate(storm, reasoning_rows, 8)


def test_unparsed_answers_stay_in_the_denominator() -> None:
    assert accuracy([True, None, False, True]) == 0.5


def test_evaluation_leaves_the_model_as_it_was(storm, reasoning_rows) -> None:
    before = {n: p.clone() for n, p in storm.model.state_dict().items()}
    evaluate_interventions(storm, reasoning_rows, 4)
    assert all(torch.equal(p, before[n]) for n, p in storm.model.state_dict().items())

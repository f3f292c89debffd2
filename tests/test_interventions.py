"""What analysis asks with, against generate and against the rollout of training."""

import pytest
import torch
from test_rollout import exact_model, training_batch
from tiny_model import BUDGET, EOS, TOKENS, left_pad, prompts

from storm_vlm.model.interventions import (
    answers_when_fed,
    latent_states,
    noised,
    own_slots,
    reordered,
)
from storm_vlm.model.rollout import rollout


def generated(model, batch, **options):
    return model.generate(
        **batch,
        max_new_tokens=BUDGET + 6,
        output_latent_states=True,
        output_logits=True,
        return_dict_in_generate=True,
        **options,
    )


@torch.no_grad()
def test_states_are_those_of_generate_and_go_on_beyond_the_budget() -> None:
    model, batch = exact_model(), left_pad(prompts())
    states, prompt = latent_states(model, batch, BUDGET + 3)
    assert states.shape == (3, BUDGET + 3, 64) and prompt.shape[:2] == batch["input_ids"].shape
    assert torch.equal(prompt[:, -1], states[:, 0])
    torch.testing.assert_close(
        states[:, :BUDGET], generated(model, batch).latent_states, atol=1e-5, rtol=0
    )
    longer = rollout(model, batch, BUDGET + 3).states
    torch.testing.assert_close(states, longer, atol=1e-9, rtol=0)


@torch.no_grad()
def test_answers_after_each_kind_of_slots_are_those_of_generate() -> None:
    model, batch = exact_model(), left_pad(prompts())
    noise = torch.randn(3, BUDGET, 64, generator=torch.Generator().manual_seed(0)).double()
    own, _ = latent_states(model, batch, BUDGET)
    found = answers_when_fed(model, batch, {"own": own, "noise": noise, "again": own}, 5)
    for kind, override in (("own", own), ("noise", noise), ("again", own)):
        expected = generated(model, batch, latent_override=override)
        logits = torch.stack(expected.logits, 1)[:, BUDGET + 1 :]
        assert found[kind].shape[1] == 5  # no row of these writes an end
        torch.testing.assert_close(found[kind], logits.to(own), atol=1e-5, rtol=0)
    assert answers_when_fed(model, batch, {"none": own[:, :0]}, 5)["none"].shape == (3, 5, 300)


@torch.no_grad()
def test_a_row_that_ends_its_segment_early_is_asked_with_the_slots_that_generate_gave_it() -> None:
    model, batch = exact_model(), left_pad(prompts())
    states, _ = latent_states(model, batch, BUDGET)
    assert torch.equal(
        own_slots(model, states), states
    )  # no row of these ends before the last slot
    # The row that comes to this state chooses the end instead of feeding it.
    model.lm_head.weight[TOKENS.end] = 3 * (states[1, 2] - states.mean((0, 1)))
    states, _ = latent_states(model, batch, BUDGET)
    expected = generated(model, batch)
    counts = expected.latent_counts.tolist()
    assert counts[1] < BUDGET and len(set(counts)) > 1
    own = own_slots(model, states)
    assert own.isfinite().all(-1).sum(1).tolist() == counts
    found = answers_when_fed(model, batch, {"own": own, "turned": own.flip(1)}, 5)
    for i, (row, count) in enumerate(zip(prompts(), counts, strict=True)):
        logits = expected.logits[count + 1][
            i
        ]  # behind it, the end is chosen again, where generate bars it
        torch.testing.assert_close(found["own"][i, 0], logits.to(own), atol=1e-5, rtol=0)
        turned = answers_when_fed(model, row, {"turned": states[i : i + 1, :count].flip(1)}, 5)
        torch.testing.assert_close(found["turned"][i : i + 1], turned["turned"], atol=1e-5, rtol=0)


@torch.no_grad()
def test_writing_ends_where_every_row_has_ended() -> None:
    model, batch = exact_model(), training_batch()
    own, _ = latent_states(model, batch, BUDGET)
    logits = answers_when_fed(model, batch, {"own": own}, 5)["own"]
    model.generation_config.eos_token_id = [EOS, *logits[:, 1].argmax(-1).tolist()]
    assert answers_when_fed(model, batch, {"own": own}, 5)["own"].shape[1] <= 2
    model.generation_config.eos_token_id = None
    assert answers_when_fed(model, batch, {"own": own}, 7)["own"].shape[1] == 7


def test_noise_has_its_scale_and_keeps_the_length() -> None:
    states = torch.randn(2000, 256)
    small, large = (noised(states, s, torch.Generator().manual_seed(0)) for s in (0.1, 1.0))
    for moved, cosine in ((small, 1.01**-0.5), (large, 2**-0.5)):
        torch.testing.assert_close(moved.norm(dim=-1), states.norm(dim=-1))
        found = torch.nn.functional.cosine_similarity(moved, states).mean()
        assert float(found) == pytest.approx(cosine, abs=0.01)
    again = noised(states, 0.1, torch.Generator().manual_seed(0))
    assert torch.equal(again, small)
    assert noised(torch.zeros(2, 3), 1.0, torch.Generator()).isfinite().all()


def test_reordering_slots() -> None:
    states = torch.arange(6.0).view(1, 3, 2).repeat(2, 1, 1)
    states[1] += 10
    assert torch.equal(
        reordered(states, torch.tensor([2, 0]))[:, :, 0] % 10, torch.tensor([[4.0, 0.0]] * 2)
    )
    each = reordered(states, torch.tensor([[0, 1, 2], [1, 1, 0]]))
    assert each[..., 0].tolist() == [[0, 2, 4], [12, 12, 10]]

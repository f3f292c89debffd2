"""Answers that do not attend to the video: in training, decoding and the validity suite, against one plain pass."""

from pathlib import Path
from typing import Any

import pytest
import torch
from test_rollout import CLOSE, exact_model, gradients, naive, relative, training_batch
from tiny import tiny_run
from tiny_model import BUDGET, TOKENS, VIDEO, left_pad, prompts, tiny_model
from torch import Tensor

from storm_vlm.data.row import write_rows
from storm_vlm.inference.pipeline import StormPipeline
from storm_vlm.model.interventions import answers_when_fed, latent_states
from storm_vlm.model.latent import answer_loss
from storm_vlm.model.modeling import StormForConditionalGeneration
from storm_vlm.model.rollout import rollout
from storm_vlm.model.tokens import SETTINGS, LatentError
from storm_vlm.training.config import Method
from storm_vlm.training.train import train
from storm_vlm.training.trainer import bottleneck_share, storm_rollout

ROWS = torch.tensor([True, False, True])


def plain_pass(model: Any, row: dict[str, Tensor], answer: list[int], slots: Tensor) -> Tensor:
    """Logits (A, V) of one row, all in one pass: a mask of its own for every query, no cache, no padding."""
    length = row["input_ids"].shape[1]
    added = [TOKENS.pad] * len(slots) + [TOKENS.end, *answer[:-1]]
    ids = torch.cat([row["input_ids"], torch.tensor([added])], 1)
    embeds = model.get_input_embeddings()(ids)
    embeds = torch.cat([embeds[:, :length], slots[None], embeds[:, length + len(slots) :]], 1)
    positions, _ = model.model.get_rope_index(
        row["input_ids"],
        mm_token_type_ids=row["mm_token_type_ids"],
        video_grid_thw=row["video_grid_thw"],
        second_per_grid_ts=row["second_per_grid_ts"],
    )
    seen = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
    seen[length + len(slots) :] &= ids[0] != VIDEO
    hidden = model.model(
        input_ids=ids,
        inputs_embeds=embeds,
        position_ids=torch.cat([positions, positions[..., -1:] + 1 + torch.arange(len(added))], -1),
        attention_mask=seen[None, None],
        pixel_values_videos=row["pixel_values_videos"].to(embeds),
        video_grid_thw=row["video_grid_thw"],
        use_cache=False,
    ).last_hidden_state[0]
    return model.lm_head(hidden[length + len(slots) :])


def test_a_rollout_equals_one_plain_pass_with_such_a_mask_gradients_too() -> None:
    model, batch = exact_model(), training_batch()
    labels, output = batch["labels"], rollout(model, batch, BUDGET, bottleneck=ROWS)
    logits = []
    for i, row in enumerate(prompts()):
        want = naive(model, row, labels[i], BUDGET)
        answer = labels[i][labels[i] != -100].tolist()
        if ROWS[i]:
            narrow = plain_pass(model, row, answer, want.states)
            assert (narrow - want.logits).abs().max() > 1e-2  # the video is missed
            want.logits = narrow
        torch.testing.assert_close(output.logits[i, : len(answer)], want.logits, **CLOSE)
        torch.testing.assert_close(output.states[i], want.states, **CLOSE)
        torch.testing.assert_close(output.end_logits[i], want.end_logits, **CLOSE)  # type: ignore[index]
        logits.append(torch.nn.functional.pad(want.logits, (0, 0, 0, 4 - len(answer))))
        alone = {**row, "labels": labels[i : i + 1]}
        single = rollout(model, alone, BUDGET, bottleneck=ROWS[i : i + 1])
        torch.testing.assert_close(
            output.logits[i, : len(answer)], single.logits[0, : len(answer)], **CLOSE
        )
    slow = gradients(model, answer_loss(torch.stack(logits), labels))
    output = rollout(model, batch, BUDGET, bottleneck=ROWS)
    assert relative(gradients(model, answer_loss(output.logits, labels)), slow) < 1e-6


@torch.no_grad()
def test_given_slots_are_the_same_in_one_pass_and_slot_by_slot() -> None:
    model, batch = exact_model(), training_batch()
    given = torch.randn(3, BUDGET, 64, generator=torch.Generator().manual_seed(0)).double()
    once = rollout(model, batch, BUDGET, given, bottleneck=ROWS)
    each = rollout(model, batch, BUDGET, given, torch.ones(3, dtype=torch.bool), bottleneck=ROWS)
    for name in ("logits", "states", "start_logits", "end_logits"):
        torch.testing.assert_close(getattr(once, name), getattr(each, name), **CLOSE)
    nobody = rollout(model, batch, BUDGET, given, bottleneck=~ROWS & ROWS)
    plain = rollout(model, batch, BUDGET, given)
    torch.testing.assert_close(nobody.logits, plain.logits, **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("beams", [1, 2])
def test_what_generate_writes_is_what_training_saw(beams: int) -> None:
    model, batch = exact_model(), left_pad(prompts())
    kept = {"return_dict_in_generate": True, "output_logits": beams == 1, "num_beams": beams}
    options: dict[str, Any] = {"max_new_tokens": BUDGET + 6, **kept}
    open_video = model.generate(**batch, **options).sequences
    model.config.latent_bottleneck = VIDEO
    output = model.generate(**batch, **options, output_scores=True)
    for row, written in zip(
        prompts(), output.sequences, strict=True
    ):  # nothing is padded, so there is no mask
        alone = model.generate(**row, **options).sequences[0]
        assert alone.tolist() == written[-len(alone) :].tolist()
    new = output.sequences[:, batch["input_ids"].shape[1] + BUDGET + 1 :]
    assert new.tolist() != open_video[:, batch["input_ids"].shape[1] + BUDGET + 1 :].tolist()
    trained = rollout(model, {**batch, "labels": new}, BUDGET, bottleneck=torch.ones(3).bool())
    if beams == 1:
        decoded = torch.stack(output.logits, 1)[:, BUDGET + 1 :]
        torch.testing.assert_close(decoded.to(trained.logits), trained.logits, atol=1e-5, rtol=0)
        own, _ = latent_states(model, batch, BUDGET)
        fed = answers_when_fed(model, batch, {"own": own, "none": own[:, :0], "plain": None}, 5)
        torch.testing.assert_close(fed["own"], trained.logits, atol=1e-5, rtol=0)
        off = {
            **batch,
            **{n: batch[n][:, :-1] for n in ("input_ids", "attention_mask", "mm_token_type_ids")},
        }
        stock = model.generate(**off, latent_mode="off", max_new_tokens=5)
        assert fed["plain"].argmax(-1).tolist() == stock[:, off["input_ids"].shape[1] :].tolist()
    else:
        chosen = trained.logits.log_softmax(-1).gather(-1, new[..., None])[..., 0]
        lengths = torch.full((3,), float(BUDGET + 1 + new.shape[1]))
        torch.testing.assert_close(
            output.sequences_scores * lengths, chosen.sum(1).float(), atol=1e-2, rtol=0
        )


def test_what_training_writes_is_loaded_again(
    reasoning_rows: list, backbone: str, tmp_path: Path
) -> None:
    """Every setting of the latents, full weights and adapters: stage after stage, and in the pipeline."""
    write_rows(data := tmp_path / "rows.jsonl", reasoning_rows[:2])
    method = Method(alignment_weight=0.0, bottleneck="answer")
    first = tiny_run(tmp_path / "a", backbone, data, method, 1)
    train(first)
    second = tiny_run(tmp_path / "b", first.output_dir, data, method, 1)
    for folder in (
        first.output_dir,
        train(second),
        train(second.model_copy(update={"lora": {"r": 2}, "output_dir": str(tmp_path / "c")})),
    ):
        config = StormPipeline.from_pretrained(str(folder)).model.config
        assert config.latent_bottleneck == config.video_token_id, folder
    model = tiny_model()
    model.config.latent_pause, model.config.latent_bottleneck, model.config.num_frames = (
        True,
        VIDEO,
        4,
    )
    model.save_pretrained(tmp_path / "d")
    loaded = StormForConditionalGeneration.from_pretrained(str(tmp_path / "d")).config
    wanted = [getattr(model.config, name) for name in SETTINGS]
    assert [getattr(loaded, name) for name in SETTINGS] == wanted and None not in wanted


def test_what_cannot_hide_the_video_is_refused() -> None:
    model, row = exact_model(), prompts()[0]
    model.config.latent_bottleneck = VIDEO
    embeds = model.get_input_embeddings()(row["input_ids"])
    for odd in ({"cache_implementation": "static"}, {"inputs_embeds": embeds}):
        with pytest.raises(LatentError, match="bottleneck"):
            model.generate(**{**row, **odd}, max_new_tokens=BUDGET + 2)
    with pytest.raises(ValueError, match="bottleneck needs slots"):
        Method(latent_budget=0, bottleneck="answer")


def test_the_schedule_goes_from_none_to_all() -> None:
    assert [bottleneck_share(p) for p in (0, 0.2, 0.7, 1)] == [0, 0, 1, 1]
    assert bottleneck_share(0.4) == pytest.approx(0.5)
    model, batch = exact_model(), training_batch()
    plain, late, answer = (
        storm_rollout(model, batch, Method(latent_budget=BUDGET, bottleneck=kind), progress)  # type: ignore[arg-type]
        for kind, progress in (("scheduled", 0.0), ("scheduled", 1.0), ("answer", 0.0))
    )
    open_video = storm_rollout(model, batch, Method(latent_budget=BUDGET))
    torch.testing.assert_close(plain.logits, open_video.logits, **CLOSE)
    torch.testing.assert_close(late.logits, answer.logits, **CLOSE)
    assert (late.logits - plain.logits).abs().max() > 1e-2

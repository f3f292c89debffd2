from functools import partial
from typing import Any

import pytest
import torch
import transformers
from tiny_model import (
    BUDGET,
    EOS,
    TOKENS,
    left_pad,
    prompts,
    recompute,
    tiny_model,
    tiny_stock_model,
)
from torch import Tensor
from transformers import CompileConfig, LogitsProcessor, LogitsProcessorList
from transformers.generation.streamers import BaseStreamer

from storm_vlm.model.rollout import rollout

NEW = 10  # tokens


def exact_model() -> Any:
    return tiny_model().double()


class EndAfter(LogitsProcessor):
    """Scripted wish: the rows of a batch want ``<|latent_end|>`` after so many slots."""

    def __init__(self, *slots: int):
        self.slots = torch.tensor(slots)

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        wants = (ids == TOKENS.pad).sum(1) == self.slots
        scores = scores.clone()
        scores[:, TOKENS.end] += 1000.0 * wants
        return scores


class Always(LogitsProcessor):
    """Adds to the scores of some tokens."""

    def __init__(self, tokens: list[int], bonus: float):
        self.tokens, self.bonus = tokens, bonus

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        scores = scores.clone()
        scores[:, self.tokens] += self.bonus
        return scores


class Start(LogitsProcessor):
    """Opens the segment after one free token, or after three where that token is odd.

    A late beam writes its most likely token at a score of +50, then of -50: it overtakes the beams
    that are in their segment already and falls back behind them, so they change places there.
    """

    def __init__(self, length: int):
        self.length = length

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        free = ids.shape[1] - self.length
        if free not in (1, 2, 3):
            return scores
        late = ids[:, self.length] % 2 == 1
        choice = scores[:, : TOKENS.start].argmax(-1) if free < 3 else torch.full_like(ids[:, 0], 0)
        choice = torch.where(late & (free < 3), choice, TOKENS.start)
        only = torch.full_like(scores, float("-inf"))
        only[torch.arange(len(ids)), choice] = {1: 50.0, 2: -50.0, 3: 0.0}[free] * late
        due = late if free > 1 else torch.ones_like(late)
        return torch.where(due[:, None], only, scores)


def generate(model: Any, batch: dict[str, Tensor], *wishes: LogitsProcessor, **options: Any) -> Any:
    options = {"max_new_tokens": NEW, "output_latent_states": True, **options}
    return model.generate(
        **batch,
        **options,
        logits_processor=LogitsProcessorList(wishes),
        return_dict_in_generate=True,
        output_logits=True,
    )


@torch.no_grad()
def naive(
    model: Any,
    row: dict[str, Tensor],
    replay: list[int] | None = None,
    slots: int = BUDGET,
    override: Tensor | None = None,
) -> tuple[list[int], Tensor, Tensor]:
    """Greedy decoding of one row by full recompute, with exactly ``slots`` slots if it opens any.

    ``replay`` decides on the tokens instead. Returns tokens, logits (T, V), own states (K, D).
    """
    ids: list[int] = []
    logits, states, fed = [], [], {}
    last = int(row["input_ids"][0, -1])
    for step in range(NEW if replay is None else len(replay)):
        hidden = recompute(model, row, ids, fed)[-1]
        logits.append(model.lm_head(hidden))
        scores = logits[-1].clone()
        scores[[*TOKENS]] = float("-inf")
        token = int(scores.argmax())
        if last in (TOKENS.start, TOKENS.pad):
            token = TOKENS.pad if len(states) < slots else TOKENS.end
        if replay is not None:
            token = replay[step]
        if token == TOKENS.pad:
            states.append(hidden)
            fed[len(ids)] = hidden if override is None else override[len(states) - 1]
        ids.append(token)
        last = token
        if token == EOS:
            break
    return ids, torch.stack(logits), torch.stack(states) if states else hidden[None][:0]


def assert_same(
    model: Any, rows: list[dict[str, Tensor]], output: Any, slots: tuple[int, ...], **how: Any
) -> None:
    """Every row of a generate output equals its recompute: tokens, logits, states."""
    length = output.sequences.shape[1] - len(output.logits)
    for i, row in enumerate(rows):
        ids, logits, states = naive(model, row, slots=slots[i], **how)
        assert output.sequences[i, length:].tolist()[: len(ids)] == ids
        got = torch.stack([step[i] for step in output.logits])[: len(ids)]
        torch.testing.assert_close(got, logits.to(got), atol=1e-5, rtol=0)
        if "latent_states" in output:
            count = int(output.latent_counts[i])
            assert count == len(states) == slots[i]
            recorded = output.latent_states[i]
            torch.testing.assert_close(recorded[:count], states, atol=1e-5, rtol=0)
            assert (recorded[count:] == 0).all()


def without_eos(ids: list[int]) -> list[int]:
    return ids[: ids.index(EOS) + 1] if EOS in ids else ids


# ---------------------------------------------------------------- equivalences


@pytest.mark.parametrize("mode", ["auto", "force"])
def test_single_rows_and_a_left_padded_batch_equal_the_recompute(mode: str) -> None:
    model, rows = exact_model(), prompts()
    for row in rows:
        assert_same(model, [row], generate(model, row, latent_mode=mode), (BUDGET,))
    output = generate(model, left_pad(rows), latent_mode=mode)
    assert_same(model, rows, output, (BUDGET,) * 3)
    assert output.latent_counts.tolist() == [BUDGET] * 3 and output.forced_end.all()


def test_rows_of_a_batch_end_their_segments_on_their_own() -> None:
    model, rows, counts = exact_model(), prompts(), (2, BUDGET, 0)
    output = generate(model, left_pad(rows), EndAfter(2, 99, 0))
    assert_same(model, rows, output, counts)
    assert output.forced_end.tolist() == [False, True, False]


def test_an_end_wanted_when_the_budget_is_used_up_is_not_forced() -> None:
    model, row = exact_model(), prompts()[0]
    output = generate(model, row)
    assert output.forced_end.tolist() == [True]
    # make the model itself want the end exactly after slot K: align its head with that state
    ids, _, _ = naive(model, row)
    state = recompute(model, row, ids[:BUDGET], dict(enumerate(output.latent_states[0])))[-1]
    with torch.no_grad():
        model.lm_head.weight[TOKENS.end] = 100 * state
    again = generate(model, row, Always([TOKENS.end], -1e9))  # nor does a processor's wish count
    assert again.latent_counts.tolist() == [BUDGET] and again.forced_end.tolist() == [False]


def test_feeding_states_back_matters() -> None:
    model, row = exact_model(), prompts()[0]
    own = generate(model, row)
    pads = model.get_input_embeddings().weight[TOKENS.pad].expand(1, BUDGET, -1)
    raw = generate(model, row, latent_override=pads)
    first, later = own.logits[0] - raw.logits[0], own.logits[2] - raw.logits[2]
    assert first.abs().max() == 0 and later.abs().max() > 1e-2


def test_training_rollout_equals_generate() -> None:
    model, batch = exact_model(), left_pad(prompts())
    output = generate(model, batch)
    length = batch["input_ids"].shape[1]
    labels = output.sequences[:, length + BUDGET + 1 :]
    with torch.no_grad():
        trained = rollout(model, {**batch, "labels": labels}, BUDGET)
    torch.testing.assert_close(trained.states, output.latent_states, atol=1e-5, rtol=0)
    logits = torch.stack(output.logits, 1)[:, BUDGET + 1 :]
    torch.testing.assert_close(trained.logits, logits.to(trained.logits), atol=1e-5, rtol=0)
    end = output.logits[BUDGET]
    torch.testing.assert_close(trained.end_logits, end.double(), atol=1e-5, rtol=0)


def test_auto_mode_opens_at_most_one_segment_when_the_model_wants_to() -> None:
    model, rows = exact_model(), prompts(force=False)
    batch = left_pad(rows)
    length = batch["input_ids"].shape[1]
    quiet = generate(model, batch)
    assert not (quiet.sequences[:, length:] == TOKENS.pad).any()
    wish = Always([TOKENS.start], 1e4)  # wants to start all the time
    output = generate(model, batch, wish, max_new_tokens=2 * NEW)
    new = output.sequences[:, length:]
    assert (new[:, 0] == TOKENS.start).all() and ((new == TOKENS.start).sum(1) == 1).all()
    for i, row in enumerate(rows):
        replay = without_eos(new[i].tolist())
        _, logits, states = naive(model, row, replay)
        got = torch.stack([step[i] for step in output.logits])[: len(replay)]
        torch.testing.assert_close(got, logits.to(got), atol=1e-5, rtol=0)
        torch.testing.assert_close(output.latent_states[i], states, atol=1e-5, rtol=0)


def test_override_feeds_other_states_and_still_reports_the_models_own() -> None:
    model, rows = exact_model(), prompts()
    other = torch.randn(3, BUDGET, 64, generator=torch.Generator().manual_seed(0)).double()
    output = generate(model, left_pad(rows), latent_override=other)
    for i, row in enumerate(rows):
        ids, logits, states = naive(model, row, override=other[i])
        assert output.sequences[i, -NEW:].tolist()[: len(ids)] == ids
        got = torch.stack([step[i] for step in output.logits])[: len(ids)]
        torch.testing.assert_close(got, logits.to(got), atol=1e-5, rtol=0)
        torch.testing.assert_close(output.latent_states[i], states, atol=1e-5, rtol=0)


@pytest.mark.parametrize("how", [{"do_sample": True, "temperature": 2.0}, {"num_beams": 2}])
def test_override_belongs_to_its_prompt_whatever_the_number_of_sequences(how: Any) -> None:
    model, rows = exact_model(), prompts()
    other = torch.randn(3, BUDGET, 64, generator=torch.Generator().manual_seed(0)).double()
    torch.manual_seed(0)
    beams = "num_beams" in how
    options = {"num_return_sequences": 2, "output_latent_states": not beams, **how}
    if beams:  # logits are of beams that change places: their score is compared
        options |= {"output_scores": True, "length_penalty": 0.0}
    batch = left_pad(rows)
    output = generate(model, batch, latent_override=other, **options)
    for i in range(6):
        replay = without_eos(output.sequences[i, batch["input_ids"].shape[1] :].tolist())
        _, logits, _ = naive(model, rows[i // 2], replay, override=other[i // 2])
        if beams:
            chosen = logits.log_softmax(-1)[torch.arange(len(replay)), replay]
            expected = float(chosen[BUDGET + 1 :].sum())
            assert float(output.sequences_scores[i]) == pytest.approx(expected, abs=1e-4)
        else:
            got = torch.stack([step[i] for step in output.logits])[: len(replay)]
            torch.testing.assert_close(got, logits.to(got), atol=1e-5, rtol=0)


def test_pause_slots_feed_the_pads_own_embedding() -> None:
    model, row = exact_model(), prompts()[0]
    pads = model.get_input_embeddings().weight[TOKENS.pad].expand(1, BUDGET, -1)
    expected = generate(model, row, latent_override=pads)
    model.config.latent_pause = True
    output = generate(model, row)
    assert torch.equal(output.sequences, expected.sequences)
    torch.testing.assert_close(output.latent_states, expected.latent_states, atol=1e-9, rtol=0)


# ---------------------------------------------------------------- bounds


def test_a_segment_that_the_length_cut_was_not_ended_by_the_budget() -> None:
    for length, counts in ((BUDGET - 1, BUDGET - 1), (BUDGET, BUDGET)):
        output = generate(tiny_model(), left_pad(prompts()), max_new_tokens=length)
        assert output.latent_counts.tolist() == [counts] * 3
        assert not output.forced_end.any()


@pytest.mark.parametrize("mode", ["auto", "force"])
def test_a_prompt_that_opened_the_segment_opens_no_second_one(mode: str) -> None:
    batch, wish = left_pad(prompts()), Always([TOKENS.start], 1e4)
    output = generate(tiny_model(), batch, wish, latent_mode=mode, max_new_tokens=2 * NEW)
    new = output.sequences[:, batch["input_ids"].shape[1] :]
    assert not (new == TOKENS.start).any() and output.latent_counts.tolist() == [BUDGET] * 3


def test_an_old_start_in_the_prompt_neither_opens_a_segment_nor_bars_one() -> None:
    model, row = exact_model(), prompts(force=False)[0]
    row["input_ids"][0, 1] = TOKENS.start
    quiet = generate(model, row)
    assert quiet.latent_counts.tolist() == [0]
    output = generate(model, row, Always([TOKENS.start], 1e4))
    new = output.sequences[0, row["input_ids"].shape[1] :].tolist()
    assert new[: BUDGET + 2] == [TOKENS.start, *[TOKENS.pad] * BUDGET, TOKENS.end]
    _, _, states = naive(model, row, without_eos(new))
    torch.testing.assert_close(output.latent_states[0], states, atol=1e-5, rtol=0)


@pytest.mark.parametrize("budget", [0, 1, 4, 8, 16])
@pytest.mark.parametrize("sampling", [False, True])
def test_never_more_than_k_slots_and_always_closed(budget: int, sampling: bool) -> None:
    model, batch = tiny_model(), left_pad(prompts())
    torch.manual_seed(0)
    output = generate(
        model,
        batch,
        Always([TOKENS.end], -1e9),  # a model that never wants to end
        latent_budget=budget,
        do_sample=sampling,
        max_new_tokens=budget + 4,
    )
    new = output.sequences[:, batch["input_ids"].shape[1] :]
    assert (new[:, :budget] == TOKENS.pad).all() and (new[:, budget] == TOKENS.end).all()
    assert not torch.isin(new[:, budget + 1 :], torch.tensor(TOKENS)).any()
    assert output.latent_states.shape[1] == budget and output.forced_end.all()


@pytest.mark.parametrize("start", [0, BUDGET - 1, BUDGET])
def test_an_end_that_the_model_wants_is_not_forced(start: int) -> None:
    """Also where it wants it when all slots are used."""
    model, batch = tiny_model(), left_pad(prompts())
    head = model.get_output_embeddings()
    steps = iter(range(1000))

    def wish(_: Any, __: Any, logits: torch.Tensor) -> torch.Tensor:
        wanted = 1e4 if next(steps) >= start else -1e4
        return logits.index_add(
            -1, torch.tensor([TOKENS.end]), torch.full_like(logits[..., :1], wanted)
        )

    hook = head.register_forward_hook(wish)
    output = generate(model, batch, max_new_tokens=BUDGET + 4)
    hook.remove()
    assert output.latent_counts.tolist() == [start] * len(output.sequences)
    assert not output.forced_end.any()


@pytest.mark.parametrize(
    "how",
    [{}, {"top_p": 0.5}, {"top_k": 1}, {"min_p": 0.5}],
    ids=lambda how: "".join(how) or "greedy",
)
@pytest.mark.parametrize("mode", ["auto", "off"])
def test_tokens_of_the_segment_never_leak_into_text(how: dict[str, Any], mode: str) -> None:
    """Nor are they all that top-p and its like leave of a model that wants nothing else."""
    model, batch = tiny_model(), left_pad(prompts(force=False))
    wish = Always([TOKENS.pad, TOKENS.end], 1e4)
    output = generate(model, batch, wish, latent_mode=mode, do_sample=bool(how), **how)
    new = output.sequences[:, batch["input_ids"].shape[1] :]
    assert not torch.isin(new, torch.tensor([TOKENS.pad, TOKENS.end])).any()


@pytest.mark.parametrize("off", [{"latent_budget": 0}, {"latent_mode": "off"}])
def test_off_is_the_stock_model_bit_for_bit(off: dict[str, Any]) -> None:
    stock, model, batch = tiny_stock_model(), tiny_model(), left_pad(prompts(force=False))
    positions, _ = model.model.get_rope_index(
        **{n: v for n, v in batch.items() if n != "pixel_values_videos"}
    )
    text = (batch["attention_mask"].cumsum(-1) - 1).clamp_min(0)[None]  # as generate prepares it
    options = {"return_dict_in_generate": True, "output_logits": True, "max_new_tokens": NEW}
    expected = stock.generate(**batch, **options, position_ids=torch.cat([text, positions]))
    output = generate(model, batch, **off)
    assert torch.equal(output.sequences, expected.sequences)
    assert all(torch.equal(a, b) for a, b in zip(output.logits, expected.logits, strict=True))
    assert output.latent_states.shape[:2] == (3, 0) and not output.latent_counts.any()
    wish = LogitsProcessorList([Always([TOKENS.start], 1e4)])
    silent = model.generate(**batch, **off, logits_processor=wish, max_new_tokens=3)
    assert not (silent[:, -3:] == TOKENS.start).any()


def test_a_model_without_latent_tokens_generates_as_if_off_and_cannot_be_forced() -> None:
    model, row = tiny_model(), prompts(force=False)[0]
    off = tiny_model().generate(**row, latent_mode="off")
    for name in ("start", "pad", "end"):
        delattr(model.config, f"latent_{name}_token_id")
    for mode in ({}, {"latent_mode": "auto"}, {"latent_mode": "off"}):
        assert torch.equal(model.generate(**row, **mode), off)
    with pytest.raises(ValueError, match="add_latent_tokens"):
        model.generate(**row, latent_mode="force")


@pytest.mark.skipif(transformers.__version__ < "5.18", reason="its own generate fails at chunks")
@pytest.mark.parametrize("chunk", [3, 7])
def test_a_prompt_read_in_chunks_can_be_forced(chunk: int) -> None:
    """Of text alone: transformers reads no video in chunks."""
    model = tiny_model()
    ids = torch.tensor([[*range(40, 60), TOKENS.start]])
    whole = model.generate(ids, latent_mode="force", max_new_tokens=NEW)
    assert int((whole == TOKENS.pad).sum()) == BUDGET
    chunked = {"latent_mode": "force", "max_new_tokens": NEW, "prefill_chunk_size": chunk}
    assert torch.equal(model.generate(ids, **chunked), whole)
    with pytest.raises(ValueError, match="force"):
        model.generate(ids[:, :-1], **chunked)


def test_a_plain_forward_refuses_ids_of_latent_slots() -> None:
    """It would feed the pad's embedding where `generate` fed a state: a trainer would learn from the difference."""
    model, row = tiny_model(), prompts()[0]
    written = model.generate(**row, max_new_tokens=NEW)
    assert int((written == TOKENS.pad).sum()) == BUDGET
    text = {"mm_token_type_ids": torch.zeros_like(written)}
    calls: tuple[Any, ...] = (model, model.base_model)  # TRL's trainers call the latter
    for call in [partial(call, **text) for call in calls]:
        with pytest.raises(ValueError, match=r"latent_pad.*rollout"):
            call(input_ids=written)
        with pytest.raises(ValueError, match=r"latent_pad.*rollout"):
            call(written)
    embeds = model.get_input_embeddings()(written)
    assert model(inputs_embeds=embeds).logits.shape[1] == written.shape[1]
    model.config.latent_pause = True  # slots hold the pad's own embedding
    assert model(written, **text).logits.shape[1] == written.shape[1]


def test_budget_and_mode_come_from_call_then_generation_config_then_checkpoint() -> None:
    model, row = tiny_model(), prompts()[0]

    def slots(**options: Any) -> int:
        return int((model.generate(**row, max_new_tokens=NEW, **options) == TOKENS.pad).sum())

    assert slots() == BUDGET
    model.generation_config.latent_budget = 2
    assert slots() == 2 and slots(latent_budget=3) == 3 and slots() == 2
    model.generation_config.latent_mode = "off"
    assert slots() == 0 and slots(latent_mode="force") == 2


# ---------------------------------------------------------------- strategies of stock generate


def test_sampled_sequences_equal_their_replay() -> None:
    model, rows = exact_model(), prompts()
    batch = left_pad(rows)
    torch.manual_seed(3)
    wish = Always([TOKENS.end], 4.0)  # makes early ends likely enough to see some
    output = generate(
        model, batch, wish, do_sample=True, top_k=0, temperature=1.5, num_return_sequences=4
    )
    length = batch["input_ids"].shape[1]
    for i in range(12):
        replay = without_eos(output.sequences[i, length:].tolist())
        _, logits, states = naive(model, rows[i // 4], replay)
        got = torch.stack([step[i] for step in output.logits])[: len(replay)]
        torch.testing.assert_close(got, logits.to(got), atol=1e-5, rtol=0)
        count = int(output.latent_counts[i])
        torch.testing.assert_close(output.latent_states[i, :count], states, atol=1e-5, rtol=0)
    assert len(set(output.latent_counts.tolist())) > 1


def test_sampling_keeps_the_probability_of_ending() -> None:
    from storm_vlm.model.segment import LatentBudgetProcessor

    scores = torch.randn(1, 300)
    processor = LatentBudgetProcessor(TOKENS, BUDGET, sampling=True, prompt_length=2)
    out = processor(torch.tensor([[5, TOKENS.start, TOKENS.pad]]), scores).softmax(-1)
    torch.testing.assert_close(out[0, TOKENS.end], scores.softmax(-1)[0, TOKENS.end])
    torch.testing.assert_close(out[0, TOKENS.end] + out[0, TOKENS.pad], torch.tensor(1.0))


def test_beams_that_differ_before_the_segment_keep_their_own_states() -> None:
    """The score of every beam equals its replay, so cache and states were reordered alike."""
    model, rows = exact_model(), prompts(force=False)
    batch = left_pad(rows)
    length = batch["input_ids"].shape[1]
    output = generate(
        model,
        batch,
        Start(length),
        num_beams=4,
        num_return_sequences=4,
        max_new_tokens=9,
        output_scores=True,
        length_penalty=0.0,
        output_latent_states=False,
    )
    starts = set()
    for i in range(12):
        replay = without_eos(output.sequences[i, length:].tolist())
        _, logits, _ = naive(model, rows[i // 4], replay)
        chosen = logits.log_softmax(-1)[torch.arange(len(replay)), replay]
        start = replay.index(TOKENS.start)
        free = [0, *range(start + BUDGET + 2, len(replay))]  # where the model chose by itself
        expected = float(chosen[free].sum())
        assert float(output.sequences_scores[i]) == pytest.approx(expected, abs=1e-4)
        assert replay.count(TOKENS.pad) == BUDGET
        starts.add((i // 4, start))
    assert any({(row, 1), (row, 3)} <= starts for row in range(3))


def test_beam_scores_count_only_text() -> None:
    model, rows = exact_model(), prompts()
    batch = left_pad(rows)
    options = {"num_beams": 3, "output_scores": True, "length_penalty": 0.0}
    output = generate(model, batch, output_latent_states=False, **options)
    for i, row in enumerate(rows):
        replay = without_eos(output.sequences[i, batch["input_ids"].shape[1] :].tolist())
        _, logits, _ = naive(model, row, replay)
        chosen = logits.log_softmax(-1)[torch.arange(len(replay)), replay]
        text = torch.tensor([t not in TOKENS for t in replay])
        expected = float(chosen[text].sum())
        assert float(output.sequences_scores[i]) == pytest.approx(expected, abs=1e-4)


def test_streamer_receives_every_token() -> None:
    class Collect(BaseStreamer):
        def __init__(self) -> None:
            self.ids: list[int] = []
            self.ended = False

        def put(self, value: Tensor) -> None:
            self.ids += value.flatten().tolist()

        def end(self) -> None:
            self.ended = True

    model, row, streamer = tiny_model(), prompts()[0], Collect()
    output = model.generate(**row, streamer=streamer)
    assert streamer.ids == output[0].tolist() and streamer.ended


def test_static_cache_and_a_reused_one() -> None:
    model, rows = exact_model(), prompts()
    for _ in range(2):  # generate keeps the static cache on the model and uses it again
        output = generate(
            model, left_pad(rows), cache_implementation="static", disable_compile=True
        )
        assert_same(model, rows, output, (BUDGET,) * 3)


def test_compiled_static_cache_is_one_graph() -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    config: Any = CompileConfig(fullgraph=True, backend="aot_eager", mode=None)  # type: ignore[arg-type]
    config._compile_all_devices = True
    model, rows = tiny_model(), prompts()
    batch = left_pad(rows)
    options = {"cache_implementation": "static", "compile_config": config, "max_new_tokens": 8}
    expected = generate(model, batch, EndAfter(2, 99, 0), max_new_tokens=8)
    for _ in range(2):
        output = generate(model, batch, EndAfter(2, 99, 0), **options)
        assert torch.equal(output.sequences, expected.sequences)
        torch.testing.assert_close(output.latent_states, expected.latent_states, atol=1e-4, rtol=0)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_peft_wrapped_model_equals_the_recompute_with_its_adapters() -> None:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        target_modules=["q_proj", "v_proj"], r=4, init_lora_weights=False, task_type="CAUSAL_LM"
    )
    wrapped: Any = get_peft_model(tiny_model(), config).double().eval()
    rows = prompts()
    assert_same(wrapped.get_base_model(), rows, generate(wrapped, left_pad(rows)), (BUDGET,) * 3)


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt_lookup_num_tokens": 3}, "prompt lookup"),
        ({"use_cache": False}, "use_cache"),
        ({"num_beams": 2, "output_latent_states": True}, "num_beams=1"),
        ({"latent_mode": "sometimes"}, "latent_mode"),
        ({"latent_budget": -1}, "latent_budget"),
        ({"latent_override": torch.zeros(1, BUDGET - 1, 64)}, "latent_override"),
    ],
)
def test_what_cannot_work_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_model().generate(**prompts()[0], **options)


def test_force_refuses_prompts_that_do_not_open_the_segment() -> None:
    with pytest.raises(ValueError, match=r"force.*<\|latent_start\|>"):
        tiny_model().generate(**prompts(force=False)[0], latent_mode="force")


def test_old_segments_in_the_prompt_are_refused() -> None:
    row = prompts()[0]
    row["input_ids"][0, 1] = TOKENS.pad
    with pytest.raises(ValueError, match="strip"):
        tiny_model().generate(**row)


def test_continuous_batching_is_refused() -> None:
    with pytest.raises(NotImplementedError, match="continuous batching"):
        tiny_model().generate_batch([[5, 6, 7]])


def test_checkpointing_in_train_mode_is_refused() -> None:
    model = tiny_model().train()
    for layer in model.model.language_model.layers:
        layer.gradient_checkpointing = True
    with pytest.raises(ValueError, match="eval"):
        model.generate(**prompts()[0])

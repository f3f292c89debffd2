"""The plugin in the real engine, on the shipped micro model: `make test-vllm`, which makes an environment for it.

It runs under both of vLLM's model runners, see `vllm_on_cpu`.
"""

from __future__ import annotations

import base64
import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import set_seed
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.exceptions import VLLMError

from storm_vlm.data.prompt import LatentMode, build_messages
from storm_vlm.data.row import Row, read_rows
from storm_vlm.data.video import read_video
from storm_vlm.inference.pipeline import GREEDY, MAX_NEW_TOKENS, StormPipeline
from storm_vlm.lab.bench.vllm_engine import vllm_prompt
from storm_vlm.lab.checkpoints import shipped
from storm_vlm.lab.world.clips import build_world
from storm_vlm.model.positions import TrainedPositions
from storm_vlm.model.tokens import latent_tokens
from storm_vlm.serving.vllm import feedback, model
from storm_vlm.serving.vllm.feedback import Batch, Feedback
from storm_vlm.serving.vllm.rule import Request
from storm_vlm.serving.vllm.usage import Slots, slots_of

RUNNER = int(os.environ.get("STORM_VLLM_RUNNER", "1"))
CHECKPOINT = str(shipped("storm"))
FRAMES, BUDGET = 6, 8
START, PAD, END = 476, 477, 478
QUESTIONS = 200
FEW = 48
first_runner = pytest.mark.skipif(RUNNER == 2, reason="the same under both runners")


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[Row]:
    """Questions of the micro world, each about a clip of its own."""
    file = build_world(tmp_path_factory.mktemp("world"), "reasoning", "test", QUESTIONS)
    return read_rows(file)[:QUESTIONS]


@pytest.fixture(scope="session")
def pipeline() -> StormPipeline:
    return StormPipeline.from_pretrained(CHECKPOINT)


Reference = Callable[..., list[list[int]]]


@pytest.fixture(scope="session")
def generate(pipeline: StormPipeline) -> Reference:
    """Ids that our `generate` writes to rows, up to the end of the turn; asked 32 at a time."""
    known: dict[tuple[Any, ...], list[list[int]]] = {}

    def reference(
        rows: Sequence[Row], mode: LatentMode = "force", **options: Any
    ) -> list[list[int]]:
        key = (tuple(row.id for row in rows), mode, *sorted(options.items()))
        if key not in known:
            written: list[list[int]] = []
            for at in range(0, len(rows), 32):
                batch = pipeline.collator.collate_prompts(rows[at : at + 32], mode)
                ids = pipeline.model.generate(
                    **batch,
                    **GREEDY,
                    max_new_tokens=MAX_NEW_TOKENS + BUDGET + 2,
                    latent_mode=mode,
                    **options,
                )
                new = ids[:, batch["input_ids"].shape[1] :].tolist()
                turn = pipeline.processor.tokenizer.eos_token_id
                written += [ids[: ids.index(turn) + 1] if turn in ids else ids for ids in new]
            known[key] = written
        return known[key]

    return reference


@contextmanager
def engine(**options: Any) -> Iterator[LLM]:
    defaults: dict[str, Any] = {
        "dtype": "float32",  # the micro model's; vLLM would take bfloat16
        "max_model_len": 1024,
        "max_num_seqs": 32,
        "enforce_eager": True,
        "block_size": 32,
        "num_gpu_blocks_override": 400,
        "kv_cache_memory_bytes": 2**26,
        "disable_log_stats": False,
        "enable_prefix_caching": True,
        "mm_processor_cache_gb": 0,
    }
    made = LLM(CHECKPOINT, **{**defaults, **options})
    try:
        yield made
    finally:
        made.llm_engine.engine_core.shutdown()
        del made
        gc.collect()
        cleanup_dist_env_and_memory()


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    """Room for 32 rows."""
    with engine() as made:
        yield made


@pytest.fixture(scope="module")
def tight() -> Iterator[LLM]:
    """Blocks for a few rows only, prompts in chunks of 64 tokens."""
    with engine(
        num_gpu_blocks_override=15, max_num_seqs=16, max_num_batched_tokens=64, max_model_len=256
    ) as made:
        yield made


def prompt(pipeline: StormPipeline, row: Row) -> dict[str, Any]:
    clip = read_video(str(row.video), FRAMES, row.start, row.end)
    return vllm_prompt(pipeline.processor, row, clip)


def params(mode: str | None = None, budget: int | None = None, **options: Any) -> SamplingParams:
    extra = {"latent_mode": mode, "latent_budget": budget}
    options = {"temperature": 0.0, "max_tokens": MAX_NEW_TOKENS + BUDGET + 2, **options}
    given = {name: value for name, value in extra.items() if value is not None}
    return SamplingParams(**options, extra_args=given or None)


def ask(
    llm: LLM, prompts: Sequence[Any], asked: Sequence[SamplingParams] | SamplingParams, at_once: int
) -> list[Any]:
    """Outputs in order. At most one request enters at each step, so that all are at different phases."""
    serving = llm.llm_engine
    each = [asked] * len(prompts) if isinstance(asked, SamplingParams) else asked
    waiting = list(range(len(prompts)))[::-1]
    done: dict[int, Any] = {}
    running: dict[str, int] = {}
    while waiting or running:
        if waiting and len(running) < at_once:
            index = waiting.pop()
            try:
                running[serving.add_request(str(index), prompts[index], each[index])] = index
            except VLLMError as error:
                done[index] = error
        for output in serving.step():
            if output.finished:
                index = int(output.request_id)
                done[index] = output
                running = {name: other for name, other in running.items() if other != index}
    return [done[index] for index in range(len(prompts))]


def written(outputs: Sequence[Any]) -> list[list[int]]:
    return [list(output.outputs[0].token_ids) for output in outputs]


def opened(expected: Sequence[list[int]]) -> list[list[int]]:
    """What `generate` wrote behind a prompt that ends in the start, which a request here writes itself."""
    return [[START, *ids] for ids in expected]


def say(text: str) -> None:
    """A figure; ``pytest -s`` shows it."""
    sys.stdout.write(f"\n{text}\n")


def count_equal(left: Sequence[Any], right: Sequence[Any]) -> int:
    return sum(a == b for a, b in zip(left, right, strict=True))


def counter(llm: LLM, name: str) -> int:
    return sum(metric.value for metric in llm.get_metrics() if metric.name == f"vllm:{name}")  # type: ignore


# What can go wrong with the feedback, one by one.
def never_fed(self: Feedback, batch: Batch, embeds: Any, run: Any) -> Any:
    return run(embeds)


FORWARD = Feedback.forward


def of_another_block(self: Feedback, batch: Batch, embeds: Any, run: Any) -> Any:
    self.states = self.states.roll(1, 0)
    return FORWARD(self, batch, embeds, run)


MUTATIONS: dict[str, tuple[Any, str, Any]] = {
    "no feedback": (Feedback, "forward", never_fed),
    "another block's": (Feedback, "forward", of_another_block),
    "no second pass": (feedback, "_most", lambda slots, bounds: 0),
    "no ends of blocks": (Feedback, "_keep_full_blocks", lambda *_: None),
}


def mutated(monkeypatch: pytest.MonkeyPatch, llm: LLM, name: str) -> None:
    llm.reset_prefix_cache()
    monkeypatch.setattr(*MUTATIONS[name])


@pytest.mark.parametrize("at_once", [1, 8, 32])
def test_tokens_equal_those_of_generate(
    llm: LLM, pipeline: StormPipeline, rows: list[Row], generate: Reference, at_once: int
) -> None:
    llm.reset_prefix_cache()
    outputs = ask(llm, [prompt(pipeline, row) for row in rows], params(), at_once)
    expected = opened(generate(rows))
    assert count_equal(written(outputs), expected) == len(rows) == QUESTIONS
    assert sum(ids.count(PAD) for ids in expected) > 5 * QUESTIONS


@pytest.mark.parametrize("mutation", ["no feedback", "another block's"])
def test_wrong_feedback_gives_other_tokens(
    llm: LLM,
    pipeline: StormPipeline,
    rows: list[Row],
    generate: Reference,
    mutation: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    mutated(monkeypatch, llm, mutation)
    outputs = ask(llm, [prompt(pipeline, row) for row in rows[:FEW]], params(), 8)
    equal = count_equal(written(outputs), opened(generate(rows[:FEW])))
    say(f"{mutation}: {equal} of {FEW} equal")
    assert equal < FEW
    monkeypatch.undo()
    llm.reset_prefix_cache()


@pytest.mark.parametrize("budget", [BUDGET, 3])
def test_states_equal_those_of_generate(
    llm: LLM,
    pipeline: StormPipeline,
    rows: list[Row],
    budget: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each slot's state, of norm 10, one question at a time."""
    seen: list[torch.Tensor] = []
    stock = Feedback.forward

    def recorded(self: Feedback, batch: Batch, embeds: Any, run: Any) -> Any:
        states = stock(self, batch, embeds, run)
        if batch.ids[-1] in (START, PAD):
            seen.append(states[len(batch.ids) - 1].clone())
        return states

    monkeypatch.setattr(Feedback, "forward", recorded)
    llm.reset_prefix_cache()
    some = rows[:16]
    ask(llm, [prompt(pipeline, row) for row in some], params(budget=budget), 1)
    worst, at = 0.0, 0
    for row in some:
        output = pipeline.model.generate(
            **pipeline.collator.collate_prompts([row], "force"),
            **{**GREEDY, "max_new_tokens": 2 + budget, "latent_mode": "force"},
            latent_budget=budget,
            output_latent_states=True,
            return_dict_in_generate=True,
        )
        used = int(output.latent_counts[0])
        fed = torch.stack(seen[at : at + used])
        worst = max(worst, float((fed - output.latent_states[0, :used]).abs().max()))
        at += used + 1  # the last pad's state is no slot's
    say(f"{at - len(some)} states, largest difference of a number: {worst:.1e}")
    assert at == len(seen)
    assert worst < 1e-3


def long_prompts(pipeline: StormPipeline, rows: Sequence[Row]) -> tuple[list[Row], list[Any]]:
    """The question twice: then segments lie across the borders of blocks."""
    twice = [replace_question(row, f"{row.question} {row.question}") for row in rows]
    return twice, [prompt(pipeline, row) for row in twice]


def replace_question(row: Row, question: str) -> Row:
    return row.model_copy(update={"question": question, "id": f"{row.id} {len(question)}"})


@pytest.mark.parametrize("mode", ["force", "auto"])
def test_preempted_and_chunked_requests_equal_generate(
    tight: LLM, pipeline: StormPipeline, rows: list[Row], generate: Reference, mode: LatentMode
) -> None:
    tight.reset_prefix_cache()
    before = counter(tight, "num_preemptions")
    twice, prompts = long_prompts(pipeline, rows[:FEW])
    outputs = ask(tight, prompts, params(mode), 16)
    expected = generate(twice, mode)
    expected = opened(expected) if mode == "force" else expected
    assert counter(tight, "num_preemptions") - before >= 5
    assert count_equal(written(outputs), expected) == FEW


@pytest.mark.parametrize("mutation", ["no feedback", "no second pass"])
def test_wrong_feedback_is_seen_behind_preemptions(
    tight: LLM,
    pipeline: StormPipeline,
    rows: list[Row],
    generate: Reference,
    mutation: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    mutated(monkeypatch, tight, mutation)
    twice, prompts = long_prompts(pipeline, rows[:FEW])
    equal = count_equal(written(ask(tight, prompts, params(), 16)), opened(generate(twice)))
    say(f"{mutation}: {equal} of {FEW} equal")
    assert equal < FEW
    monkeypatch.undo()
    tight.reset_prefix_cache()


@pytest.mark.parametrize("mutation", ["", "no ends of blocks"])
def test_shared_prefixes_hold_states(
    llm: LLM,
    pipeline: StormPipeline,
    rows: list[Row],
    generate: Reference,
    mutation: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Prompts that hold a whole segment, twice: the second time blocks that end within it are in the cache."""
    llm.reset_prefix_cache()
    if mutation:
        mutated(monkeypatch, llm, mutation)
    twice, prompts = long_prompts(pipeline, rows[:FEW])
    whole = opened(generate(twice))
    cuts = [ids.index(END) + 1 for ids in whole]
    for first, ids, cut in zip(prompts, whole, cuts, strict=True):
        first["prompt"] += pipeline.processor.tokenizer.decode(ids[:cut])
    ask(llm, prompts, params("off"), 8)
    outputs = ask(llm, prompts, params("off"), 8)
    hits = sum(output.num_cached_tokens or 0 for output in outputs)
    equal = count_equal(written(outputs), [ids[cut:] for ids, cut in zip(whole, cuts, strict=True)])
    say(f"{mutation or 'prefixes'}: {equal} of {FEW} equal, {hits} tokens from the cache")
    assert hits > FEW * 32
    assert (equal < FEW) if mutation else (equal == FEW)
    llm.reset_prefix_cache()


def test_rows_of_other_modes_and_budgets_share_a_batch(
    llm: LLM, pipeline: StormPipeline, rows: list[Row], generate: Reference
) -> None:
    few, kinds = (
        rows[:FEW],
        [("force", None), ("auto", None), ("off", None), ("force", 3), ("force", 0)],
    )
    asked = [params(*kinds[i % len(kinds)]) for i in range(FEW)]
    expected = []
    for i, row in enumerate(few):
        mode, budget = kinds[i % len(kinds)]
        ids = generate([row], mode, **({} if budget is None else {"latent_budget": budget}))[0]
        expected.append([START, *ids] if mode == "force" and budget != 0 else ids)
    # Without slots, generate's prompt ends in a start that it must close; ours does not open one.
    off = generate(few, "off")
    for i in range(4, FEW, len(kinds)):
        expected[i] = off[i]
    outputs = ask(llm, [prompt(pipeline, row) for row in few], asked, 8)
    assert count_equal(written(outputs), expected) == FEW


def test_slots_and_forced_ends_are_told(llm: LLM, pipeline: StormPipeline, rows: list[Row]) -> None:
    few, found, wanted = rows[:FEW], [], []
    tokens = latent_tokens(pipeline.model.config)
    for budget in (BUDGET, 3):
        asked = params(budget=budget, logprobs=0)
        outputs = ask(llm, [prompt(pipeline, row) for row in few], asked, 8)
        found += [slots_of(output.outputs[0], tokens, budget) for output in outputs]
        answers = pipeline.answer_batch(few, latent_budget=budget)
        wanted += [Slots(answer.slots_used, answer.forced_end) for answer in answers]
    assert found == wanted
    assert {slots.forced_end for slots in found} == {True, False}


def test_bad_requests_leave_their_neighbours_alone(
    llm: LLM, pipeline: StormPipeline, rows: list[Row], generate: Reference
) -> None:
    few = rows[:FEW]
    prompts = [prompt(pipeline, row) for row in few]
    asked = [params()] * FEW
    asked[0], asked[6], asked[12] = params("on"), params(budget=-1), params(max_tokens=1)
    prompts[18] = {**prompts[18], "prompt": prompts[18]["prompt"] + "word " * 2000}
    prompts[24] = {**prompts[24], "prompt": "<|latent_pad|>" * 9 + prompts[24]["prompt"]}
    outputs = ask(llm, prompts, asked, 8)
    assert [i for i in range(FEW) if isinstance(outputs[i], VLLMError)] == [0, 6, 12, 18]
    good = [i for i in range(FEW) if i not in (0, 6, 12, 18, 24)]
    expected = opened(generate(few))
    assert [written([outputs[i]])[0] for i in good] == [expected[i] for i in good]


def test_the_end_under_sampling_comes_where_generate_would_draw_it(
    llm: LLM, pipeline: StormPipeline, rows: list[Row]
) -> None:
    """By the probabilities of `generate`, which are the same for all, and each request's own draws.

    The model hardly ever ends early by itself, so its wish is made stronger, for both alike.
    """
    bias, seeds = 8.0, range(FEW)
    # Triton's interpreter cannot run vLLM's top-k.
    options = {"temperature": 1.3} | ({"top_k": 20} if RUNNER == 1 else {})
    sampling = {"do_sample": True, "top_k": 0, "sequence_bias": [[[END], bias]], **options}
    set_seed(0)
    output = pipeline.model.generate(
        **pipeline.collator.collate_prompts([rows[0]], "force"),
        **{**GREEDY, **sampling, "num_return_sequences": 64},
        latent_mode="force",
        max_new_tokens=BUDGET + 2,
        return_dict_in_generate=True,
        output_scores=True,
    )
    longest = int((output.sequences == PAD).sum(1).argmax())
    ends = [float(scores[longest].softmax(-1)[END]) for scores in output.scores[:BUDGET]]
    say(f"probabilities of the end: {', '.join(f'{end:.2f}' for end in ends)}")

    def slots(seed: int) -> int:
        request = Request("force", BUDGET, seed, None)
        drawn = (k for k, end in enumerate(ends) if request.draw(1 + k) < end)
        return next(drawn, BUDGET)

    asked = [params(**options, logit_bias={END: bias}, seed=seed) for seed in seeds]
    found = ask(llm, [prompt(pipeline, rows[0])] * FEW, asked, 32)
    expected = [slots(seed) for seed in seeds]
    assert [ids.count(PAD) for ids in written(found)] == expected
    assert len(set(expected)) > 3
    again = ask(llm, [prompt(pipeline, rows[0])], asked[7], 1)
    assert written(again)[0] == written(found)[7]


def test_prompt_logprobs_are_the_models_own(
    llm: LLM, pipeline: StormPipeline, rows: list[Row]
) -> None:
    few = rows[:8]
    outputs = ask(llm, [prompt(pipeline, row) for row in few], params(prompt_logprobs=0), 8)
    for row, output in zip(few, outputs, strict=True):
        batch = pipeline.collator.collate_prompts([row], "auto")
        ids = batch["input_ids"][0]
        assert ids.tolist() == list(output.prompt_token_ids)
        with torch.inference_mode():
            scores = pipeline.model(**batch).logits[0].log_softmax(-1)
        wanted = scores[:-1].gather(1, ids[1:, None])[:, 0]
        found = [
            chosen[int(i)].logprob
            for chosen, i in zip(output.prompt_logprobs[1:], ids[1:], strict=True)
        ]
        torch.testing.assert_close(torch.tensor(found), wanted, atol=2e-3, rtol=1e-3)


@first_runner
def test_off_is_stock_vllm(
    llm: LLM, pipeline: StormPipeline, rows: list[Row], generate: Reference, tmp_path: Path
) -> None:
    """Against a process that loads no plugin, and may not write latent tokens: the same tokens and probabilities."""
    few = rows[:FEW]
    (tmp_path / "rows.json").write_text(json.dumps([row.model_dump(mode="json") for row in few]))
    environment = {**os.environ, "VLLM_PLUGINS": "none"}
    subprocess.run([sys.executable, __file__, str(tmp_path)], env=environment, check=True)
    stock = json.loads((tmp_path / "stock.json").read_text())
    outputs = ask(llm, [prompt(pipeline, row) for row in few], params("off", logprobs=0), 8)
    assert stock["model"] == "Qwen2_5_VLForConditionalGeneration"
    assert written(outputs) == stock["ids"] == generate(few, "off")
    for output, wanted in zip(outputs, stock["logprobs"], strict=True):
        torch.testing.assert_close(
            torch.tensor(chosen(output)), torch.tensor(wanted), atol=1e-4, rtol=1e-4
        )


def chosen(output: Any) -> list[float]:
    completion = output.outputs[0]
    pairs = zip(completion.token_ids, completion.logprobs, strict=True)
    return [scores[token].logprob for token, scores in pairs]


def stock_answers(folder: Path) -> None:
    rows = [Row.model_validate(row) for row in json.loads((folder / "rows.json").read_text())]
    pipeline = StormPipeline.from_pretrained(CHECKPOINT)
    ban = params(logprobs=0, logit_bias=dict.fromkeys((START, PAD, END), -100.0))
    with engine() as llm:
        kind = llm.apply_model(lambda model: type(model).__name__)[0]
        outputs = ask(llm, [prompt(pipeline, row) for row in rows], ban, 8)
    found = {"model": kind, "ids": written(outputs), "logprobs": [chosen(o) for o in outputs]}
    (folder / "stock.json").write_text(json.dumps(found))


@first_runner
def test_a_clip_by_address_is_what_training_reads(
    llm: LLM,
    pipeline: StormPipeline,
    rows: list[Row],
    generate: Reference,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The pixels that the model is given, to the bit, and its answers; vLLM decodes the files by our reader."""
    pixels: list[torch.Tensor] = []
    seconds: list[float] = []
    parse = model.StormQwen2_5_VL._parse_and_validate_video_input
    place = model.StormQwen2_5_VL.get_mrope_input_positions

    def seen(self: Any, **kwargs: Any) -> Any:
        pixels.append(kwargs["pixel_values_videos"].clone())
        return parse(self, **kwargs)

    def placed(self: Any, input_tokens: Any, mm_features: Any) -> Any:
        seconds.extend(float(f.data["second_per_grid_ts"].data) for f in mm_features)
        return place(self, input_tokens, mm_features)

    monkeypatch.setattr(model.StormQwen2_5_VL, "_parse_and_validate_video_input", seen)
    monkeypatch.setattr(model.StormQwen2_5_VL, "get_mrope_input_positions", placed)
    few = rows[:16]
    for row in few:
        url = (
            "data:video/mp4;base64," + base64.b64encode(Path(str(row.video)).read_bytes()).decode()
        )
        video = {"type": "video_url", "video_url": {"url": url}}
        text = build_messages(row.question, row.options)[0]["content"][1]
        messages: Any = [{"role": "user", "content": [video, text]}]
        (output,) = llm.chat(messages, params(), use_tqdm=False)
        assert written([output]) == opened(generate([row]))
        ours = pipeline.collator.videos.load(str(row.video), row.start, row.end)
        assert torch.equal(pixels[-1], whole_pixels(pipeline, ours["pixel_values_videos"]))
        assert seconds[-1] == float(ours["second_per_grid_ts"])
    assert len(pixels) == len(few)


def whole_pixels(pipeline: StormPipeline, patches: torch.Tensor) -> torch.Tensor:
    """Patches (n, 3 colours x values) as the numbers from 0 to 255 that they were: vLLM normalises them later."""
    video = pipeline.processor.video_processor
    mean, std = (torch.tensor(values)[:, None] for values in (video.image_mean, video.image_std))
    pixels = (patches.unflatten(1, (3, -1)) * std + mean) / video.rescale_factor
    assert (pixels - pixels.round()).abs().max() < 1e-3
    return pixels.round().flatten(1).to(torch.uint8)


@first_runner
def test_positions_are_those_of_training(llm: LLM) -> None:
    """Also at rates where vLLM's own rule is a step off."""

    def check(served: Any) -> tuple[int, int]:
        ours = TrainedPositions()
        ours.config = served.config
        video, equal, stock = served.config.video_token_id, 0, 0
        for count in range(2, 40):
            grid = torch.tensor([count, 4, 4])
            ids = [1, 2, *[video] * (count * 4), 3]
            for seconds in (1.6667, 2 / 3, 0.1, 2 * 5 / 3):
                place = SimpleNamespace(offset=2, length=count * 4)
                data = {"video_grid_thw": grid, "second_per_grid_ts": torch.tensor(seconds)}
                fields = {name: SimpleNamespace(data=value) for name, value in data.items()}
                feature = SimpleNamespace(mm_position=place, modality="video", data=fields)
                found, delta = served.get_mrope_input_positions(ids, [feature])
                kinds = torch.tensor([[2 * (token == video) for token in ids]])
                wanted, deltas = ours.get_rope_index(
                    torch.tensor([ids]), kinds, None, grid[None], [seconds]
                )
                equal += torch.equal(found, wanted[:, 0]) and delta == int(deltas)
                theirs, _ = super(type(served), served).get_mrope_input_positions(ids, [feature])
                stock += torch.equal(theirs, wanted[:, 0])
        return equal, stock

    ((equal, stock),) = llm.apply_model(check)
    assert equal == 38 * 4 > stock


REFUSED = [
    ({"pipeline_parallel_size": 2}, "pipeline parallelism"),
    (
        {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}},
        "speculative decoding",
    ),
    ({"hf_overrides": {"latent_bottleneck": 475}}, "a bottleneck"),
    (
        {"hf_overrides": {"architectures": ["Qwen2VLForConditionalGeneration"]}},
        "vLLM's Qwen2VLForConditionalGeneration",
    ),
]


@first_runner
@pytest.mark.parametrize(("options", "said"), REFUSED)
def test_what_cannot_work_is_refused_by_name(options: dict[str, Any], said: str) -> None:
    with pytest.raises(Exception, match=said), engine(**options):
        pass


@first_runner
def test_another_vllm_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("storm_vlm.serving.vllm.config.__version__", "0.30.2")
    with pytest.raises(Exception, match=r"vLLM 0\.30\.2 .* 0\.31 or later"), engine():
        pass


if __name__ == "__main__":
    stock_answers(Path(sys.argv[1]))

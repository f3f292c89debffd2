"""The plugin's own logic without vLLM: states kept with blocks, in a toy engine that does what a paged engine may do.

`tests/vllm` asks the real engine (`make test-vllm`).
"""

import itertools
import os
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_model import TOKENS
from torch import Tensor
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper

from storm_vlm.errors import StormError
from storm_vlm.model.segment import LatentBudgetProcessor
from storm_vlm.serving import serve
from storm_vlm.serving.config import ServeConfig
from storm_vlm.serving.vllm import feedback
from storm_vlm.serving.vllm.feedback import Batch, Feedback
from storm_vlm.serving.vllm.rule import NOTHING, Segment, check_params

START, PAD, END = 1, 2, 3
WORDS, WIDTH, BLOCK, BLOCKS = 20, 6, 4, 256
EMBEDDINGS = torch.randn(WORDS, WIDTH, generator=torch.Generator().manual_seed(0)).double()


def attend(inputs: Tensor, past: int = 0) -> Tensor:
    """States (T - past, D) of a layer of attention over inputs (T, D) and all before them."""
    scores = inputs[past:] @ inputs.T
    seen = torch.ones_like(scores, dtype=torch.bool).tril(past)
    return torch.tanh(scores.masked_fill(~seen, float("-inf")).softmax(-1) @ inputs + inputs[past:])


def one_by_one(ids: list[int]) -> Tensor:
    """States (T, D), a token at a time: the definition."""
    inputs = EMBEDDINGS[:0]
    for token in ids:
        fed = attend(inputs)[-1] if token == PAD and len(inputs) else EMBEDDINGS[token]
        inputs = torch.cat([inputs, fed[None]])
    return attend(inputs)


class ToyEngine:
    """Blocks of inputs take the place of keys and values. Freed blocks come back with what was in them."""

    def __init__(self) -> None:
        self.feedback = Feedback(PAD, BLOCKS, EMBEDDINGS)
        self.feedback.states.normal_()
        self.inputs = torch.randn(BLOCKS, BLOCK, WIDTH).double()
        self.free = list(range(1, BLOCKS))
        self.full: dict[
            tuple[int, ...], int
        ] = {}  # blocks that may be shared, by all the tokens up to their end
        self.tables: dict[int, list[int]] = {}
        self.done: dict[int, int] = {}

    def begin(self, name: int, ids: list[int]) -> None:
        """Take over the full blocks that hold the same tokens. At least one token is left to compute."""
        self.tables[name], self.done[name] = [], 0
        for end in range(BLOCK, len(ids), BLOCK):
            if tuple(ids[:end]) not in self.full:
                break
            self.tables[name].append(self.full[tuple(ids[:end])])
            self.done[name] = end

    def end(self, name: int, ids: list[int]) -> None:
        """At its end, or paused: then all of it is computed again, unless its blocks still have it."""
        done = self.done.pop(name)
        for end, block in enumerate(self.tables.pop(name), 1):
            known = tuple(ids[: end * BLOCK])
            if end * BLOCK <= done and self.full.setdefault(known, block) == block:
                continue
            self.free.append(block)

    def forward(self, pieces: dict[int, list[int]], padding: int) -> dict[int, Tensor]:
        """The last state of each sequence after the next tokens of some."""
        for name, piece in pieces.items():
            while len(self.tables[name]) * BLOCK < self.done[name] + len(piece):
                self.tables[name].append(self.free.pop(random.randrange(len(self.free))))
        names, sizes = list(pieces), [len(piece) for piece in pieces.values()]
        bounds = [0]
        for size in sizes:
            bounds.append(bounds[-1] + size)
        lengths = [self.done[name] + size for name, size in zip(names, sizes, strict=True)]
        table = torch.zeros(len(names) + padding, 16, dtype=torch.int32)  # unused: the null block
        for row, name in enumerate(names):
            table[row, : len(self.tables[name])] = torch.tensor(self.tables[name])
        if bounds[-1] != len(names):
            padding = 0  # only graphs are filled up, and they hold a token of each sequence
        ids = torch.tensor(
            [token for piece in pieces.values() for token in piece] + [PAD] * padding
        )

        def run(embeds: Tensor) -> Tensor:
            states = torch.full_like(embeds, float("nan"))
            for row, name in enumerate(names):
                for at in range(bounds[row], bounds[row + 1]):
                    place = self.done[name] + at - bounds[row]
                    self.inputs[self.tables[name][place // BLOCK], place % BLOCK] = embeds[at]
                known = self.inputs[self.tables[name]].flatten(0, 1)[: lengths[row]]
                states[bounds[row] : bounds[row + 1]] = attend(known, self.done[name])
            return states

        batch = Batch(
            ids,
            torch.tensor(bounds + bounds[-1:] * padding, dtype=torch.int32),
            torch.tensor(lengths + [0] * padding),
            table,
            BLOCK,
        )
        embeds = torch.cat([EMBEDDINGS[ids], torch.full((2, WIDTH), float("nan")).double()])
        states = self.feedback.forward(batch, embeds, run)
        self.done.update(zip(names, lengths, strict=True))
        return {name: states[bounds[row + 1] - 1] for row, name in enumerate(names)}


def sequence(prefix: list[int]) -> list[int]:
    words = [random.randrange(4, WORDS) for _ in range(random.randint(1, 12))]
    after = [random.randrange(4, WORDS) for _ in range(random.randint(1, 4))]
    return [*prefix, *words, START, *[PAD] * random.randint(0, 7), END, *after]


def schedule(seed: int) -> tuple[int, float]:
    """Six sequences by a random schedule: states compared, and the largest distance from the definition."""
    random.seed(seed)
    torch.manual_seed(seed)
    engine, compared, distance = ToyEngine(), 0, 0.0
    prefix = sequence([])
    left = {name: sequence(prefix if name % 2 else []) for name in range(6)}
    states = {name: one_by_one(ids) for name, ids in left.items()}
    while left:
        running = [name for name in left if name in engine.done]
        if running and random.random() < 0.15:
            name = random.choice(running)
            engine.end(name, left[name])
        longest = random.choice([1, 1, 9])
        pieces = {}
        for name in random.sample(sorted(left), random.randint(1, len(left))):
            if name not in engine.done:
                engine.begin(name, left[name])
            done = engine.done[name]
            pieces[name] = left[name][done : done + random.randint(1, longest)]
        for name, state in engine.forward(pieces, random.randint(0, 2)).items():
            wanted = states[name][engine.done[name] - 1]
            distance = max(distance, float((state - wanted).abs().nan_to_num(9).max()))
            compared += 1
            if engine.done[name] == len(left[name]):
                engine.end(name, left.pop(name))
    return compared, distance


def test_any_schedule_gives_the_states_of_one_token_at_a_time() -> None:
    results = [schedule(seed) for seed in range(40)]
    assert sum(compared for compared, _ in results) > 2000
    assert max(distance for _, distance in results) < 1e-9


def _state_of_another_token(self: Batch, row: Tensor, position: Tensor) -> Tensor:
    return self.table[row, (position.clamp_min(0) - 1).clamp_min(0) // self.block_size].long()


@pytest.mark.parametrize(
    ("owner", "name", "broken"),
    [
        (feedback, "_most", lambda slots, bounds: 0),
        (feedback, "_most", lambda slots, bounds: 1),
        (Feedback, "_keep_full_blocks", lambda *_: None),
        (Batch, "block", _state_of_another_token),
    ],
)
def test_a_broken_feedback_is_caught(
    owner: Any, name: str, broken: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(owner, name, broken)
    assert max(schedule(seed)[1] for seed in range(12)) > 1e-3


def test_slots_without_feedback_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Feedback.__init__

    def no_pad(self: Feedback, pad: int, blocks: int, like: Tensor) -> None:
        made(self, -1, blocks, like)

    monkeypatch.setattr(Feedback, "__init__", no_pad)
    assert max(schedule(seed)[1] for seed in range(4)) > 1e-3


def test_a_step_of_one_token_each_reads_nothing_on_the_host() -> None:
    """What a CUDA graph needs: traced once, replayed on other sequences, blocks and places."""
    from torch.fx.experimental.proxy_tensor import make_fx

    def step(states: Tensor, ids: Tensor, lengths: Tensor, table: Tensor, embeds: Tensor) -> Tensor:
        kept = Feedback(PAD, 32, embeds)
        kept.states = states
        batch = Batch(ids, torch.arange(5), lengths, table, BLOCK)
        return kept.forward(batch, embeds, torch.tanh)

    def case(seed: int) -> list[Tensor]:
        made = torch.Generator().manual_seed(seed)
        return [
            torch.randn(33, WIDTH, generator=made),
            torch.randint(0, 5, (4,), generator=made),
            torch.randint(0, 12, (4,), generator=made),
            torch.randperm(32, generator=made)[:12].view(4, 3),
            torch.randn(4, WIDTH, generator=made),
        ]

    traced = make_fx(step)(*case(0))
    for seed in range(1, 6):
        replayed, run = case(seed), case(seed)
        torch.testing.assert_close(traced(*replayed), step(*run), rtol=0, atol=0)
        for left, right in zip(replayed, run, strict=True):
            assert torch.equal(left, right)  # and what was written in place


def params(**fields: Any) -> Any:
    """The fields of vLLM's SamplingParams that are read."""
    known = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": None}
    more = {"max_tokens": 16, "structured_outputs": None, "extra_args": None}
    return SimpleNamespace(**{**known, **more, **fields})


def segment(budget: int = 3) -> Segment:
    names = ("start", "pad", "end")
    ids = {f"latent_{name}_token_id": i for name, i in zip(names, TOKENS, strict=True)}
    config = SimpleNamespace(latent_budget=budget, **ids)
    return Segment(SimpleNamespace(model_config=SimpleNamespace(hf_config=config, seed=0)))


def apply(rule: Segment, logits: Tensor, requests: list[Any], written: list[list[int]]) -> Tensor:
    """The rule for requests whose ids from the prompt's last on are these."""

    def ids_of(rows: list[int], width: int) -> Tensor:
        return torch.tensor([[NOTHING] * (width - len(written[r])) + written[r] for r in rows])

    return rule.apply(logits, requests, [len(ids) - 1 for ids in written], ids_of)


def test_each_row_obeys_the_rule_of_generate() -> None:
    """Rows of other modes, budgets and phases side by side, against `LatentBudgetProcessor` on each alone."""
    rule, vocabulary = segment(), max(TOKENS) + 5
    drawn = random.Random(0)
    for _ in range(60):
        rows, logits = [], torch.randn(8, vocabulary)
        for row in range(8):
            mode, budget = drawn.choice(["force", "auto", "off"]), drawn.choice([0, 1, 3, 5])
            request = rule.request(
                params(extra_args={"latent_mode": mode, "latent_budget": budget})
            )
            ids = [7, *[TOKENS.start][: mode == "force" or drawn.random() < 0.6]]
            ids += [TOKENS.pad] * drawn.randint(0, request.budget) if len(ids) > 1 else []
            if drawn.random() < 0.5 and len(ids) > 1:
                ids += [TOKENS.end, *[8] * drawn.randint(0, 9)]
            if drawn.random() < 0.3:
                logits[row, TOKENS.end] = 9
            rows.append((request, ids))
        expected = torch.cat(
            [
                LatentBudgetProcessor(TOKENS, request.budget, False, 1)(
                    torch.tensor([ids]), logits[row : row + 1]
                )
                for row, (request, ids) in enumerate(rows)
            ]
        )
        found = apply(rule, logits, [request for request, _ in rows], [ids for _, ids in rows])
        assert torch.equal(found, expected)


def test_force_writes_the_start_unless_the_prompt_ends_in_it() -> None:
    rule = segment()
    request = rule.request(params())
    for last, wanted in ((7, TOKENS.start), (TOKENS.start, TOKENS.pad)):
        logits = apply(rule, torch.zeros(1, max(TOKENS) + 5), [request], [[last]])
        assert logits.isfinite().sum() == 1
        assert logits.argmax() == wanted


def test_the_end_under_sampling_comes_as_often_as_in_generate() -> None:
    """Of 4000 draws, against the probability that `generate`'s own processors give it."""
    rule, vocabulary = segment(), max(TOKENS) + 5
    torch.manual_seed(0)
    logits = torch.randn(1, vocabulary)
    logits[0, TOKENS.end] = 4.0
    ids = torch.tensor([[7, TOKENS.start, TOKENS.pad]])
    warpers = LogitsProcessorList([TemperatureLogitsWarper(0.7), TopKLogitsWarper(6)])
    scores = LatentBudgetProcessor(TOKENS, 3, True, 1)(ids, warpers(ids, logits.clone()))
    wanted = float(scores.softmax(-1)[0, TOKENS.end])
    assert 0.2 < wanted < 0.8
    requests = [rule.request(params(temperature=0.7, top_k=6)) for _ in range(4000)]
    chosen = apply(rule, logits.repeat(4000, 1), requests, [ids[0].tolist()] * 4000)
    assert (chosen.isfinite().sum(1) == 1).all()
    share = float((chosen.argmax(-1) == TOKENS.end).double().mean())
    assert share == pytest.approx(wanted, abs=0.025)  # 3 standard errors
    seeded = [rule.request(params(temperature=0.7, seed=5)) for _ in range(2)]
    assert seeded[0].draw(1) == seeded[1].draw(1) != seeded[0].draw(2)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"extra_args": {"latent_mode": "on"}}, "latent_mode must be one of"),
        ({"extra_args": {"latent_budget": -1}}, "latent_budget must be"),
        ({"extra_args": {"latent_budget": True}}, "latent_budget must be"),
        ({"extra_args": {"latent_budget": None}}, "latent_budget must be"),
        ({"extra_args": {"latent_modes": "off"}}, "latent_modes is unknown"),
        ({"max_tokens": 1}, "leaves no room"),
        ({"structured_outputs": object()}, "grammar"),
    ],
)
def test_a_request_that_cannot_work_is_refused(fields: dict[str, Any], said: str) -> None:
    check_params(params())
    check_params(params(**{**fields, "extra_args": {"latent_mode": "off"}}))
    with pytest.raises(ValueError, match=said):
        check_params(params(**fields))


def test_storm_serve_becomes_vllms_server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What it is started with; `tests/test_vllm_engine.py` starts it."""
    became: list[str] = []
    monkeypatch.setattr(serve, "find_spec", lambda name: object())
    monkeypatch.setattr(serve.os, "execv", lambda program, words: became.extend(words))
    monkeypatch.setenv("STORM_API_KEY", "secret")
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    config = ServeConfig.model_validate({"host": "0.0.0.0", "port": 9, "root": tmp_path})
    serve.hand_over("runs/mine", config)
    assert became[1:5] == ["-m", "vllm.entrypoints.openai.api_server", "--model", "runs/mine"]
    options = dict(itertools.pairwise(became))
    assert options["--served-model-name"] == "mine"
    assert (options["--host"], options["--port"]) == ("0.0.0.0", "9")
    assert options["--allowed-local-media-path"] == str(tmp_path)
    assert options["--allowed-media-domains"] == "none.invalid"
    assert os.environ["VLLM_API_KEY"] == "secret"
    with pytest.raises(StormError, match="vLLM has no --queue"):
        serve.hand_over("runs/mine", ServeConfig.model_validate({"queue": 3}))
    monkeypatch.delenv("STORM_API_KEY")
    with pytest.raises(StormError, match="STORM_API_KEY"):
        serve.hand_over("runs/mine", config)

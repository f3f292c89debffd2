"""Does the answer depend on the latents? The table to print beside every accuracy.

Latents of relatives of this method have been found to move little when the input changes, and answers to move
little when the latents do. Each line here is one way to tamper with the latents and what it does to accuracy.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor
from tqdm.auto import tqdm

from storm_vlm.analysis import AnalysisError
from storm_vlm.data.collator import Question
from storm_vlm.data.prompt import answer_text, is_correct, parse_answer
from storm_vlm.data.row import Row
from storm_vlm.evaluation.question_set import QuestionSet
from storm_vlm.evaluation.records import Intervention, Movement, Reliance, Sensitivity
from storm_vlm.evaluation.run_folder import Run
from storm_vlm.evaluation.statistics import Estimate, estimate, paired_difference
from storm_vlm.inference.pipeline import StormPipeline
from storm_vlm.model.backbones import input_device
from storm_vlm.model.interventions import (
    answers_when_fed,
    end_tokens,
    latent_states,
    noised,
    reordered,
)

KINDS = {
    "own": "its own latents",
    "zero": "zeros",
    "mean": "each slot's mean over the data set",
    "noise": "noise as long as they are added, length kept",
    "shuffle": "its own, shuffled between slots",
    "swap_same_answer": "another clip's, whose answer is the same",
    "swap_other_answer": "another clip's, whose answer is another",
    "removed": "no slots at all",
}


@dataclass(frozen=True)
class Tampered:
    """What became of each row's answer, by `KINDS`; None for a row without a donor."""

    right: dict[str, list[bool | None]]
    changed: dict[str, list[bool | None]]  #: not what it answers with its own latents
    follows: list[bool | None]  #: under `swap_other_answer` it is the donor's
    follows_own: list[bool | None]  #: with its own latents it is that donor's, too: by accident


@dataclass(frozen=True)
class SlotAccuracy:
    """Accuracy by which slots are fed, and by how many (K) at test time. Intervals are over videos."""

    variants: dict[str, Estimate]
    sweep: dict[int, Estimate]


def tamper(
    pipeline: StormPipeline,
    rows: Sequence[Row],
    states: Tensor | None = None,
    batch_size: int = 32,
    seed: int = 0,
    wording: Sequence[Row | Question] | None = None,
) -> tuple[Tampered, Tensor]:
    """Greedy answers with all K slots fed as `KINDS` says; also returns the rows' own latents (N, K, D).

    Args:
        states: the rows' own latents, if they are known; else one more pass finds them.
        wording: how the rows are put, such as in a benchmark's own words; by default as they are.

    Raises:
        AnalysisError: the checkpoint has no latent slots, or no row can be given another clip's latents.
    """
    if pipeline.latent_mode == "off":
        raise AnalysisError("latent reliance needs a checkpoint with latent slots (storm train)")
    given_by = {
        f"swap_{name}_answer": _donors(rows, name == "same", random.Random(seed))
        for name in ("same", "other")
    }
    if all(donor is None for donor in given_by["swap_other_answer"]):
        raise AnalysisError(
            "no row has another clip with another answer to take latents from: give more rows"
        )
    wording = rows if wording is None else wording
    if states is None:
        states = rolled_out(pipeline, wording, batch_size)
    answers = fed_answers(pipeline, wording, _tampered(states, given_by, seed), batch_size)
    right: dict[str, list[bool | None]] = {}
    changed: dict[str, list[bool | None]] = {}
    for kind in KINDS:
        donors = given_by.get(kind, range(len(rows)))
        each = list(zip(rows, donors, answers[kind], answers["own"], strict=True))
        right[kind] = [None if d is None else bool(is_correct(a, row)) for row, d, a, _ in each]
        changed[kind] = [None if d is None else a != own for _, d, a, own in each]
    donors = given_by["swap_other_answer"]
    follows, follows_own = (
        [
            None if donor is None else _says(text, row, rows[donor])
            for row, donor, text in zip(rows, donors, texts, strict=True)
        ]
        for texts in (answers["swap_other_answer"], answers["own"])
    )
    return Tampered(right, changed, follows, follows_own), states


def latent_reliance(
    pipeline: StormPipeline,
    rows: Sequence[Row],
    states: Tensor | None = None,
    batch_size: int = 32,
    seed: int = 0,
    wording: Sequence[Row | Question] | None = None,
) -> Reliance:
    """Accuracy under all `KINDS` of tampering, and how far latents move with the clip. Takes and raises as `tamper`.

    A row without a donor does not count where one is needed.
    """
    tampered, states = tamper(pipeline, rows, states, batch_size, seed, wording)
    wording = rows if wording is None else wording
    videos = [row.video for row in rows]

    def over_videos(outcomes: Sequence[bool | None]) -> Estimate | None:
        used = [i for i, hit in enumerate(outcomes) if hit is not None]
        values = [bool(outcomes[i]) for i in used]
        return estimate(values, [videos[i] for i in used]) if used else None

    def difference(hits: Sequence[bool | None]) -> Estimate | None:
        used = [i for i, hit in enumerate(hits) if hit is not None]
        theirs, own = ([bool(right[i]) for i in used] for right in (hits, tampered.right["own"]))
        return paired_difference(theirs, own, [videos[i] for i in used]) if used else None

    lines = {
        kind: Intervention(
            what,
            over_videos(tampered.right[kind]),
            difference(tampered.right[kind]),
            over_videos(tampered.changed[kind]),
        )
        for kind, what in KINDS.items()
    }
    lines["swap_other_answer"] = swap = replace(
        lines["swap_other_answer"],
        follows=over_videos(tampered.follows),
        follows_own=over_videos(tampered.follows_own),
    )
    assert swap.difference  # `tamper` refuses rows without it
    return Reliance(
        n=len(rows),
        drawn_from=len(rows),
        videos=len(set(videos)),
        slots=states.shape[1],
        interventions=lines,
        reliance=-swap.difference,
        sensitivity=input_sensitivity(pipeline, wording, states, batch_size, seed),
    )


def sampled_reliance(
    pipeline: StormPipeline,
    questions: QuestionSet,
    run: Run,
    count: int,
    batch_size: int,
    seed: int = 0,
) -> Reliance:
    """`latent_reliance` of `count` rows drawn from those that a run could ask, put as it put them.

    Raises as `latent_reliance` does, and VideoError.
    """
    failed = {record.id for record in run.records if record.error}
    answered = [row for row in questions.rows if row.id not in failed]
    places = random.Random(seed).sample(range(len(answered)), min(count, len(answered)))
    rows = [answered[place] for place in sorted(places)]
    wording = [questions.question(row) for row in rows]
    reliance = latent_reliance(pipeline, rows, None, batch_size, seed, wording)
    return replace(reliance, drawn_from=len(answered))


def slot_accuracy(
    pipeline: StormPipeline,
    rows: Sequence[Row],
    latents: Tensor,
    further: Tensor,
    batch_size: int = 32,
) -> SlotAccuracy:
    """Accuracy by which slots are fed (cf. Figure 8), and by K at test time; (N, K, D) latents, and K more."""
    budget = latents.shape[1]
    slots = {name: select(latents) for name, select in slot_variants(budget).items()}
    longer = torch.cat([latents, further], 1)
    sweep = sorted({0, 1, 2, *range(4, 2 * budget + 1, 2), budget})
    slots |= {f"k{k}": longer[:, :k] for k in sweep}
    answers = fed_answers(pipeline, rows, slots, batch_size)
    videos = [row.video for row in rows]
    shares = {
        name: estimate([bool(is_correct(t, r)) for t, r in zip(texts, rows, strict=True)], videos)
        for name, texts in answers.items()
    }
    return SlotAccuracy(
        variants={name: shares[name] for name in slot_variants(budget)},
        sweep={k: shares[f"k{k}"] for k in sweep},
    )


def slot_variants(budget: int) -> dict[str, Callable[[Tensor], Tensor]]:
    """What (N, K, D) states become when slots are averaged, left out, alone or turned round."""

    def keep(*slots: int) -> Callable[[Tensor], Tensor]:
        return lambda states: states[:, list(slots)]

    everything = range(budget)
    variants: dict[str, Callable[[Tensor], Tensor]] = {
        "all slots": keep(*everything),
        "mean in every slot": lambda states: states.mean(1, keepdim=True).expand_as(states),
        "reversed": keep(*reversed(everything)),
    }
    if budget > 1:
        variants |= {
            f"without {k + 1}": keep(*(s for s in everything if s != k)) for k in everything
        }
    return variants | {f"slot {k + 1} alone": keep(k) for k in everything}


def input_sensitivity(
    pipeline: StormPipeline,
    rows: Sequence[Row | Question],
    states: Tensor,
    batch_size: int,
    seed: int,
) -> Sensitivity:
    """How far latents (N, K, D) move when a row's clip, or its question, is exchanged for another's.

    Relative to the mean distance between latents of different clips: 0 means that they do not look, 1 that they
    become another clip's. Per row, and per slot in `slots`. Rows must be of at least two clips.
    """
    rng = random.Random(seed)
    others = [rng.choice([j for j, o in enumerate(rows) if o.video != r.video]) for r in rows]
    pairs = [(row, rows[other]) for row, other in zip(rows, others, strict=True)]
    exchanged = {
        "clip": [Question(o.video, r.question, r.options, o.start, o.end) for r, o in pairs],
        "question": [Question(r.video, o.question, o.options, r.start, r.end) for r, o in pairs],
    }
    spread = (states - states[others]).norm(dim=-1).mean(0)  # (K,)
    movements: dict[str, Movement] = {}
    for name, questions in exchanged.items():
        moved = rolled_out(pipeline, questions, batch_size, states.shape[1])
        relative = (moved - states).norm(dim=-1) / spread.clamp_min(1e-12)  # (N, K)
        over_videos = estimate(relative.mean(1), [str(row.video) for row in rows])
        movements[name] = Movement(**asdict(over_videos), slots=tuple(relative.mean(0).tolist()))
    return Sensitivity(**movements)


def rolled_out(
    pipeline: StormPipeline,
    rows: Sequence[Row | Question],
    batch_size: int = 32,
    budget: int | None = None,
) -> Tensor:
    """The rows' own latents (N, K, D), float32 on the CPU."""
    latents = []
    for first in tqdm(range(0, len(rows), batch_size), "latents", leave=False):
        inputs = _inputs(pipeline, rows[first : first + batch_size])
        states, _ = latent_states(pipeline.model, inputs, budget or pipeline.collator.latent_budget)
        latents.append(states.float().cpu())
    return torch.cat(latents)


def fed_answers(
    pipeline: StormPipeline,
    rows: Sequence[Row | Question],
    slots: Mapping[str, Tensor],
    batch_size: int = 32,
) -> dict[str, list[str]]:
    """What the model answers each row, by kind of slots (N, n, D); each prompt is read once."""
    texts: dict[str, list[str]] = {kind: [] for kind in slots}
    ends = end_tokens(pipeline.model)
    for first in tqdm(range(0, len(rows), batch_size), "answers", leave=False):
        part = slice(first, first + batch_size)
        batch = {kind: states[part] for kind, states in slots.items()}
        answers = answers_when_fed(pipeline.model, _inputs(pipeline, rows[part]), batch)
        for kind, logits in answers.items():
            for ids in logits.argmax(-1).cpu():
                closed = torch.isin(ids, ends).nonzero()
                written = ids[: int(closed[0])] if len(closed) else ids
                text = pipeline.processor.decode(written, skip_special_tokens=True)
                texts[kind].append(text.strip())
    return texts


def _inputs(pipeline: StormPipeline, rows: Sequence[Row | Question]) -> dict[str, Tensor]:
    inputs = pipeline.collator.collate_prompts(rows, "force")
    device = input_device(pipeline.model)
    return {name: tensor.to(device) for name, tensor in inputs.items()}


def _tampered(
    states: Tensor, given_by: Mapping[str, Sequence[int | None]], seed: int
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    count, budget = states.shape[:2]
    order = torch.rand(count, budget, generator=generator).argsort(1)
    swapped = {
        kind: states[[i if donor is None else donor for i, donor in enumerate(given)]]
        for kind, given in given_by.items()
    }
    return {
        "own": states,
        "zero": torch.zeros_like(states),
        "mean": states.mean(0, keepdim=True).expand_as(states),
        "noise": noised(states, 1.0, generator),
        "shuffle": reordered(states, order),
        "removed": states[:, :0],
        **swapped,
    }


def _donors(rows: Sequence[Row], same_answer: bool, rng: random.Random) -> list[int | None]:
    """For each row another clip's row, of the same answer or of another; asked the same question if there is one,
    else one of the same family, else any. None where there is none."""
    answers = [answer_text(row) for row in rows]
    families = [row.meta.get("family") for row in rows]
    donors: list[int | None] = []
    for i, row in enumerate(rows):
        fitting = [
            j
            for j, other in enumerate(rows)
            if other.video != row.video and (answers[j] == answers[i]) == same_answer
        ]
        alike = [j for j in fitting if rows[j].question == row.question]
        alike = alike or [j for j in fitting if families[j] == families[i]]
        donors.append(rng.choice(alike or fitting) if fitting else None)
    return donors


def _says(text: str, row: Row, donor: Row) -> bool:
    """Whether an answer to `row` is what `donor` has for an answer (the letter, where there are options)."""
    if row.options and donor.options:
        labels = row.meta.get("labels", ())
        return parse_answer(text, row.options, labels) == donor.options.index(donor.answer)
    return bool(is_correct(text, donor))

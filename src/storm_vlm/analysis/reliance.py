"""Does the answer depend on the latents? The token replacement test, and how far latents move with the clip.

Each kind is one way to replace what is fed into the slots, under the name that the field has for it (TRT, arXiv
2605.21642, where it has one). What they come to is said by `evaluation/verdict.py`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor
from tqdm.auto import tqdm

from storm_vlm.analysis import AnalysisError
from storm_vlm.analysis.states import Batches
from storm_vlm.data.answer import is_correct, parse_answer
from storm_vlm.data.collator import Question
from storm_vlm.data.prompt import answer_text
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
    own_slots,
    pause_slots,
    reordered,
)

KINDS = {
    "own": "its own latents",
    "zero": "zero",
    "mean": "mean: each slot's over the data",
    "random": "random: Gaussian, of its own latents' length",
    "matched_random": "distribution-matched random: each slot's state of a row drawn for it",
    "noise": "noised: its own plus noise as long as they are, length kept",
    "first_repeat": "first-repeat: the first slot's state in all",
    "shuffle": "shuffled slots",
    "swap_same_answer": "another clip's, same answer",
    "swap_other_answer": "another clip's, other answer",
    "oracle": "oracle: the thought video's targets",
    "pause": "count-matched pause tokens",
    "removed": "markers only: no slots",
    "no_markers": "no markers: the plain prompt",
}


@dataclass(frozen=True)
class Tampered:
    """What became of each row's answer, by `KINDS`; None for a row without a donor, or without a target."""

    right: dict[str, list[bool | None]]
    changed: dict[str, list[bool | None]]  #: not what it answers with its own latents
    follows: list[bool | None]  #: under `swap_other_answer` it is the donor's
    follows_own: list[bool | None]  #: with its own latents it is that donor's, too: by accident


@dataclass(frozen=True)
class SlotAccuracy:
    """Accuracy by which slots are fed, and by how many (K) at test time. Intervals are over videos."""

    variants: dict[str, Estimate]
    sweep: dict[int, Estimate]


@dataclass(frozen=True)
class Donors:
    """For each row another clip's row, whose answer is the same or another; None where there is none."""

    same: list[int | None]
    other: list[int | None]


def donors(rows: Sequence[Row], seed: int = 0) -> Donors:
    """Raises AnalysisError: no row can be given another clip's latents of another answer."""
    found = Donors(*(_donors(rows, same, random.Random(seed)) for same in (True, False)))
    if all(donor is None for donor in found.other):
        raise AnalysisError(
            "no row has another clip with another answer to take latents from: give more rows"
        )
    return found


def replacements(
    pipeline: StormPipeline,
    states: Tensor,
    given: Donors,
    targets: Tensor | None = None,
    seed: int = 0,
) -> dict[str, Tensor | None]:
    """What is fed into the slots of all rows, by `KINDS`: (N, n, D), None for no segment.

    Args:
        states: (N, K, D), the rows' own latents; NaN in slots that a row has not, and is not given but by a swap.
        targets: (N, K, D) in the latents' space; None: no oracle.
    """
    generator = torch.Generator().manual_seed(seed)
    count, budget = states.shape[:2]
    missing = states.isnan().any(-1)
    order = (torch.rand(count, budget, generator=generator) + missing).argsort(1)

    def swapped(donors: Sequence[int | None]) -> Tensor:
        return states[[i if donor is None else donor for i, donor in enumerate(donors)]]

    slots: dict[str, Tensor | None] = {
        "own": states,
        "zero": torch.zeros_like(states),
        "mean": states.nanmean(0, keepdim=True).expand_as(states),
        "noise": noised(states, 1.0, generator),
        "shuffle": reordered(states, order),
        "removed": states[:, :0],
        "swap_same_answer": swapped(given.same),
        "swap_other_answer": swapped(given.other),
        "first_repeat": states[:, :1].expand_as(states),
        "pause": pause_slots(pipeline.model, count, budget).to(states),
        "no_markers": None,
    }
    drawn = torch.randn(states.shape, generator=generator)
    slots["random"] = drawn * (states.norm(dim=-1) / drawn.norm(dim=-1))[..., None]
    of_row = torch.randint(count, (count, budget), generator=generator)
    having = missing.long().argsort(
        dim=0, stable=True
    )  # (N, K): rows that have the slot come first
    rows = having.take_along_dim(of_row % (~missing).sum(0).clamp_min(1), 0)
    slots["matched_random"] = states[rows, torch.arange(budget)]
    if targets is not None:
        slots["oracle"] = targets
    whole = ("swap_same_answer", "swap_other_answer", "removed", "no_markers")
    return {
        kind: fed if fed is None or kind in whole else _without(fed, missing)
        for kind, fed in slots.items()
    }


def _without(states: Tensor, missing: Tensor) -> Tensor:
    """States (N, K, D) with NaN where (N, K) says so."""
    return states.masked_fill(missing[..., None], float("nan"))


def own_latents(pipeline: StormPipeline, states: Tensor, batch_size: int) -> Tensor:
    """The rows' latents (N, K, D), NaN in slots that a row has not: see `own_slots`."""
    weight = pipeline.model.get_input_embeddings().weight
    parts = (own_slots(pipeline.model, part.to(weight)) for part in states.split(batch_size))
    return torch.cat([part.float().cpu() for part in parts])


def outcomes(
    rows: Sequence[Row],
    answers: Mapping[str, Sequence[str]],
    given: Donors,
    has_target: Sequence[bool] | None = None,
) -> Tampered:
    """Right or wrong, and changed, of the answers by kind."""
    everywhere: list[int | None] = [*range(len(rows))]
    counts = {"swap_same_answer": given.same, "swap_other_answer": given.other}
    if has_target is not None:
        counts["oracle"] = [i if has else None for i, has in enumerate(has_target)]
    right: dict[str, list[bool | None]] = {}
    changed: dict[str, list[bool | None]] = {}
    for kind in (kind for kind in KINDS if kind in answers):
        counted = counts.get(kind, everywhere)
        each = list(zip(rows, counted, answers[kind], answers["own"], strict=True))
        right[kind] = [None if c is None else bool(is_correct(a, row)) for row, c, a, _ in each]
        changed[kind] = [None if c is None else a != own for _, c, a, own in each]
    follows, follows_own = (
        [
            None if donor is None else _says(text, row, rows[donor])
            for row, donor, text in zip(rows, given.other, answers[kind], strict=True)
        ]
        for kind in ("swap_other_answer", "own")
    )
    return Tampered(right, changed, follows, follows_own)


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
    given = donors(rows, seed)
    wording = rows if wording is None else wording
    if states is None:
        states = rolled_out(pipeline, wording, Batches(batch_size))
    slots = replacements(pipeline, own_latents(pipeline, states, batch_size), given, seed=seed)
    answers: dict[str, list[str]] = {kind: [] for kind in slots}
    for first in tqdm(range(0, len(rows), batch_size), "answers", leave=False):
        part = slice(first, first + batch_size)
        fed = {kind: None if s is None else s[part] for kind, s in slots.items()}
        for kind, texts in fed_answers(pipeline, wording[part], fed).items():
            answers[kind] += texts
    return outcomes(rows, answers, given), states


def latent_reliance(
    pipeline: StormPipeline,
    rows: Sequence[Row],
    states: Tensor | None = None,
    batch_size: int = 32,
    seed: int = 0,
    wording: Sequence[Row | Question] | None = None,
) -> Reliance:
    """Accuracy under all `KINDS` but the oracle, and how far latents move with the clip.

    Takes and raises as `tamper`. A row without a donor does not count where one is needed.
    """
    tampered, states = tamper(pipeline, rows, states, batch_size, seed, wording)
    wording = rows if wording is None else wording
    sensitivity = input_sensitivity(pipeline, wording, states, Batches(batch_size), seed)
    return reliance_of(rows, tampered, states.shape[1], sensitivity)


def reliance_of(
    rows: Sequence[Row], tampered: Tampered, slots: int, sensitivity: Sensitivity
) -> Reliance:
    """The table of what was found."""
    videos = [row.video for row in rows]

    def over_videos(outcomes: Sequence[bool | None]) -> Estimate | None:
        used = [i for i, hit in enumerate(outcomes) if hit is not None]
        values = [bool(outcomes[i]) for i in used]
        return estimate(values, [videos[i] for i in used]) if used else None

    def difference(ours: Sequence[bool | None], theirs: Sequence[bool | None]) -> Estimate | None:
        used = [i for i, hit in enumerate(ours) if hit is not None]
        a, b = ([bool(hits[i]) for i in used] for hits in (ours, theirs))
        return paired_difference(a, b, [videos[i] for i in used]) if used else None

    lines = {
        kind: Intervention(
            KINDS[kind],
            over_videos(right),
            difference(right, tampered.right["own"]),
            over_videos(tampered.changed[kind]),
        )
        for kind, right in tampered.right.items()
    }
    lines["swap_other_answer"] = swap = replace(
        lines["swap_other_answer"],
        follows=over_videos(tampered.follows),
        follows_own=over_videos(tampered.follows_own),
        follows_more=difference(tampered.follows, tampered.follows_own),
    )
    assert swap.difference  # `donors` refuses rows without it
    return Reliance(
        n=len(rows),
        drawn_from=len(rows),
        videos=len(set(videos)),
        slots=slots,
        interventions=lines,
        reliance=-swap.difference,
        sensitivity=sensitivity,
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


def slot_kinds(own: Tensor, latents: Tensor, further: Tensor) -> dict[str, Tensor]:
    """What `slot_accuracy` needs fed: subsets of a row's `own_latents`; and so many for all rows, to 2 K.

    All are (N, K, D).
    """
    budget = latents.shape[1]
    longer = torch.cat([latents, further], 1)
    sweep = sorted({0, 1, 2, *range(4, 2 * budget + 1, 2), budget})
    variants = {name: select(own) for name, select in slot_variants(budget).items()}
    return variants | {f"k{k}": longer[:, :k] for k in sweep}


def slot_accuracy(rows: Sequence[Row], answers: Mapping[str, Sequence[str]]) -> SlotAccuracy:
    """Accuracy by which slots are fed (cf. Figure 8), and by K at test time, from the answers by `slot_kinds`."""
    videos = [row.video for row in rows]
    shares = {
        name: estimate([bool(is_correct(t, r)) for t, r in zip(texts, rows, strict=True)], videos)
        for name, texts in answers.items()
        if name not in KINDS
    }
    swept = {name: int(name[1:]) for name in shares if name[1:].isdigit()}
    return SlotAccuracy(
        variants={name: share for name, share in shares.items() if name not in swept},
        sweep={k: shares[name] for name, k in swept.items()},
    )


def slot_variants(budget: int) -> dict[str, Callable[[Tensor], Tensor]]:
    """What (N, K, D) states become when slots are averaged, left out, alone or turned round."""

    def keep(*slots: int) -> Callable[[Tensor], Tensor]:
        return lambda states: states[:, list(slots)]

    everything = range(budget)
    variants: dict[str, Callable[[Tensor], Tensor]] = {
        "all slots": keep(*everything),
        "mean in every slot": lambda states: torch.where(
            states.isnan(), states, states.nanmean(1, keepdim=True)
        ),
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
    batches: Batches,
    seed: int = 0,
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
        moved = rolled_out(pipeline, questions, batches, states.shape[1])
        relative = (moved - states).norm(dim=-1) / spread.clamp_min(1e-12)  # (N, K)
        over_videos = estimate(relative.mean(1), [str(row.video) for row in rows])
        movements[name] = Movement(**asdict(over_videos), slots=tuple(relative.mean(0).tolist()))
    return Sensitivity(**movements)


def rolled_out(
    pipeline: StormPipeline,
    rows: Sequence[Row | Question],
    batches: Batches | None = None,
    budget: int | None = None,
) -> Tensor:
    """The rows' own latents (N, K, D), float32 on the CPU."""
    budget = budget or pipeline.collator.latent_budget

    def compute(batch: Sequence[Row | Question]) -> dict[str, Tensor]:
        states, _ = latent_states(pipeline.model, _inputs(pipeline, batch), budget)
        return {"latents": states.float().cpu()}

    return (batches or Batches(32))(f"{budget} latents", rows, compute)["latents"]


def fed_answers(
    pipeline: StormPipeline, rows: Sequence[Row | Question], slots: Mapping[str, Tensor | None]
) -> dict[str, list[str]]:
    """What the model answers each row of a batch, by kind of slots (B, n, D) or None; each prompt is read once."""
    ends = end_tokens(pipeline.model)
    texts: dict[str, list[str]] = {kind: [] for kind in slots}
    for kind, logits in answers_when_fed(pipeline.model, _inputs(pipeline, rows), slots).items():
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

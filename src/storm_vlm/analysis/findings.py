"""What was found beside what the paper found, in sentences."""

from __future__ import annotations

from typing import Any

from storm_vlm.evaluation.records import Reliance
from storm_vlm.evaluation.statistics import Estimate

RIVALS = {
    "another_clip": "another clip's latents",
    "last_shown": "the last frame shown",
    "first_thought_held": "the thought video's first frame, held",
    "mean_frame": "the mean frame",
}


def findings(found: dict[str, Any]) -> dict[str, list[str]]:
    """Sentences by part; "as in" or "unlike" the paper where it says something of the kind."""
    return {
        "reliance": _reliance(found["reliance"]),
        "slots": _slots(found["slots"]),
        "embeddings": _embeddings(found["embeddings"]["nearness"]),
        "retrieval": _retrieval(found["retrieval"]),
        "watch": [_watch(found["watch"]["decoding"]), _lens(found["watch"]["lens"])],
    }


def _percent(share: float) -> str:
    return f"{100 * share:.0f}%"


def _as(agrees: bool) -> str:
    return "as in" if agrees else "unlike"


def _reliance(part: Reliance) -> list[str]:
    reliance, swap = part.reliance, part.interventions["swap_other_answer"]
    assert swap.follows and swap.follows_own
    depend = "depend" if reliance.low > 0 else "do not show that they depend"
    moved = part.sensitivity.clip.mean
    look = "they look at it" if moved > 0.5 else "they hardly look at it"
    return [
        f"Another clip's latents cost {100 * reliance.mean:.1f} points: the answers {depend} on the latents. "
        "The paper has no such test.",
        f"Given another clip's latents, the model gives that clip's answer for "
        f"{_percent(swap.follows.mean)} of rows; with its own, for "
        f"{_percent(swap.follows_own.mean)}.",
        f"When the clip changes, latents move {moved:.2f} times as far as those of different clips lie "
        f"apart: {look}.",
    ]


def _slots(part: dict[str, Any]) -> list[str]:
    variants, sweep = part["variants"], part["sweep"]
    own, best = variants["all slots"].mean, max(sweep, key=lambda k: sweep[k].mean)
    alone = [line.mean for name, line in variants.items() if name.endswith("alone")]
    drops = [own - line.mean for name, line in variants.items() if name.startswith("without")]
    said = [
        f"Of all K at test time {best} answers best; it was trained with {len(alone)}. "
        "The paper finds 8 best, and trains a model for each K (Table 5)."
    ]
    if drops:
        said.append(
            f"Leaving out one slot costs {100 * max(drops):.1f} points at most; one slot alone answers "
            f"{100 * max(alone):.1f}% at best. The paper has this for retrieval only (Figure 8)."
        )
    turned = own - variants["reversed"].mean
    return [
        *said,
        f"In reversed order the same slots cost {100 * turned:.1f} points, {_as(turned < 0.1)} the "
        "paper's retrieval probe, where order hardly matters.",
    ]


def _embeddings(part: dict[str, Any]) -> list[str]:
    said = []
    if (line := part["keyframes"]) is not None:
        nearer = line["nearer"]
        said.append(
            f"Latents are nearer to their own clip's keyframes than to another's in {_percent(nearer.mean)} "
            f"of pairs (half: no relation), {_as(nearer.low > 0.7)} the paper's Figure 5, where they lie in or "
            "beside their keyframes' regions."
        )
    if (line := part["thought_video"]) is not None:
        said.append(
            f"Slot by slot, they are nearer to their own thought video in "
            f"{_percent(line['nearer'].mean)} of pairs."
        )
    return said or ["Not measured: that needs rows with keyframes or thought videos, of two clips."]


def _retrieval(part: dict[str, Any] | None) -> list[str]:
    if part is None:
        return [
            "Not measured: no video has two questions here. Give rows with several (storm world --questions 4) "
            "as --retrieval-rows."
        ]
    latent, text = (part["representations"][kind]["mrr"] for kind in ("latent", "text"))
    slots = {name: line["mrr"].mean for name, line in part["slots"].items()}
    alone = [value for name, value in slots.items() if name.endswith("alone")]
    best, mean, half = max(alone), slots["mean of all slots"], max(1, len(alone) // 2)
    early, late = sum(alone[:half]) / half, sum(alone[-half:]) / half
    return [
        f"Latents find the same video with an MRR of {_percent(latent.mean)}, text states with "
        f"{_percent(text.mean)}: {_as(latent.low > text.high)} the paper (75% and 50%), "
        "where latents find more.",
        f"The best slot alone finds {_percent(best)} (slot {alone.index(best) + 1}), the mean of all "
        f"{_percent(mean)}: {_as(best <= mean)} the paper, where no slot beats the mean.",
        f"The earlier half of the slots finds {_percent(early)}, each alone, the later half {_percent(late)}: "
        f"{_as(late > early)} the paper, where later slots are stronger.",
        f"With the query's slots reversed, {_percent(slots['reversed'])} (in order, "
        f"{_percent(slots['side by side'])}): "
        f"{_as(slots['side by side'] - slots['reversed'] < 0.1)} the paper, where that costs little.",
    ]


def _watch(part: dict[str, Any] | None) -> str:
    if part is None:
        return "Not drawn: that needs rows with thought videos, of at least two clips."
    own = part["own"]
    beaten = {name: own.low > part[key].high for key, name in RIVALS.items()}
    nearer = ", ".join(name for name, better in beaten.items() if better) or "nothing else tried"
    rest = ", ".join(name for name, better in beaten.items() if not better)
    return (
        f"Frames drawn from the latents are {own.mean:.1f} dB from the true ones, nearer than {nearer}"
        + (f", not clearly nearer than {rest}" if rest else "")
        + ". The paper shows one case, and no frames (Figure 4)."
    )


def _lens(part: Estimate) -> str:
    said = "Read through the output layer, some slot's likeliest token begins the right answer for "
    return (
        said
        + _percent(part.mean)
        + " of rows"
        + (": latents are not words." if part.high < 0.5 else ".")
    )

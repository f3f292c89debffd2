"""What was found beside what the paper found, in sentences."""

from __future__ import annotations

from typing import Any

# Figure 6 and section A.1; Figure 8 and section A.3 give an order only.
PAPER_RETRIEVAL = {
    "latent": {"hit@1": 0.71, "hit@5": 0.79, "mrr": 0.75},
    "text": {"hit@1": 0.29, "hit@5": 0.71, "mrr": 0.50},
    "random": {"hit@1": 0.0, "hit@5": 0.0, "mrr": 0.0},
}


def findings(found: dict[str, Any]) -> dict[str, list[str]]:
    """Sentences by part; "as in the paper" or "unlike the paper" where it says something of the kind."""
    return {
        "reliance": _reliance(found["reliance"]),
        "slots": _slots(found["slots"]),
        "embeddings": _embeddings(found["embeddings"]["nearness"]),
        "retrieval": _retrieval(found["retrieval"]),
        "watch": [*_watch(found["watch"]["decoding"]), _lens(found["watch"]["lens"])],
    }


def _reliance(part: dict[str, Any]) -> list[str]:
    reliance, lines = part["reliance"], part["interventions"]
    used = reliance["low"] > 0
    said = [
        f"Another clip's latents cost {100 * reliance['mean']:.1f} points: the answers "
        + (
            "depend on the latents."
            if used
            else "do not depend on the latents, as far as this can tell."
        )
        + " The paper has no such test."
    ]
    follows = lines["swap_other_answer"]["follows"]
    before = lines["swap_other_answer"]["follows_own"]
    if follows["n"]:
        said.append(
            f"Given another clip's latents, the model gives that clip's answer in {100 * follows['mean']:.0f}% "
            f"of cases (with its own, in {100 * before['mean']:.0f}%)."
        )
    moved = part["sensitivity"]["clip"]["mean"]
    said.append(
        f"When the clip changes, latents move {moved:.2f} times as far as those of different clips lie apart: "
        + ("they look at it." if moved > 0.5 else "they hardly look at it.")
    )
    return said


def _slots(part: dict[str, Any]) -> list[str]:
    variants, sweep = part["variants"], part["sweep"]
    own = variants["all slots"]["mean"]
    best = max(sweep, key=lambda k: sweep[k]["mean"])
    trained = sum(name.endswith("alone") for name in variants)
    said = [
        f"Best at K = {best} at test time"
        + (
            ", what it was trained with: more slots do not help, fewer do not do, as"
            if int(best) == trained
            else f", though it was trained with {trained}: unlike"
        )
        + " in the paper's Table 5, which trains each K anew."
    ]
    drops = [own - line["mean"] for name, line in variants.items() if name.startswith("without")]
    alone = [line["mean"] for name, line in variants.items() if name.endswith("alone")]
    if drops:
        worst = f"at most {100 * max(drops):.1f} points" if max(drops) > 0 else "nothing"
        said.append(
            f"Leaving out any one slot costs {worst}; one slot alone answers {100 * max(alone):.1f}% at best. "
            "The paper has this for retrieval only."
        )
    turned = own - variants["reversed"]["mean"]
    said.append(
        f"Turned round, the same slots cost {100 * turned:.1f} points: "
        + ("their order matters, unlike" if turned > 0.1 else "their order hardly matters, as")
        + " in the paper's retrieval probe."
    )
    return said


def _embeddings(part: dict[str, Any]) -> list[str]:
    said = []
    names = {"keyframes": "keyframes", "thought_video": "thought video"}
    for kind, name in names.items():
        if (line := part[kind]) is None:
            continue
        nearer = line["nearer"]
        are = "are" if kind == "keyframes" else "is"
        text = f"A clip's own {name} {are} nearer to its latents than another clip's in "
        text += f"{100 * nearer['mean']:.0f}% of pairs (half: no relation)"
        if kind == "keyframes":
            text += (
                ", as in the paper's Figure 5"
                if nearer["low"] > 0.5
                else ", unlike the paper's Figure 5"
            )
        said.append(text + ".")
    return said


def _retrieval(part: dict[str, Any] | None) -> list[str]:
    if part is None:
        return [
            "Not measured: no video has two questions here. Give rows with several (storm world --questions 4) "
            "as --retrieval-rows."
        ]
    kinds, slots = part["representations"], part["slots"]
    latent, text = kinds["latent"]["mrr"], kinds["text"]["mrr"]
    more = latent["low"] > text["high"]
    less = latent["high"] < text["low"]
    ours = f"Latents find the same video with an MRR of {100 * latent['mean']:.0f}%, "
    ours += f"text states with {100 * text['mean']:.0f}%"
    said = [
        ours
        + (
            ": more, as in the paper"
            if more
            else ": less, unlike the paper"
            if less
            else ": no clear difference, unlike the paper"
        )
        + " (75% and 50%)."
    ]
    mean = slots["mean of all slots"]["mrr"]["mean"]
    alone = [slots[name]["mrr"]["mean"] for name in slots if name.endswith("alone")]
    best = max(range(len(alone)), key=lambda k: alone[k])
    if alone[best] > mean:
        said.append(
            f"Slot {best + 1} alone finds more ({100 * alone[best]:.0f}%) than the mean of all ({100 * mean:.0f}%): "
            "unlike the paper, where no slot beats the mean."
        )
    else:
        said.append(f"No slot beats the mean of all ({100 * mean:.0f}%), as in the paper.")
    half = len(alone) // 2
    if half:
        early, late = sum(alone[:half]) / half, sum(alone[-half:]) / half
        said.append(
            f"The later half of the slots finds {'more, as' if late > early else 'less, unlike'} in the paper "
            f"({100 * late:.0f}% against {100 * early:.0f}% of the earlier half, each alone)."
        )
    return said


def _watch(part: dict[str, Any] | None) -> list[str]:
    if part is None:
        return ["Not drawn: that needs rows with thought videos, of at least two clips."]
    own = part["own"]
    rivals = {
        "another_clip": "another clip's latents",
        "last_shown": "the last frame shown",
        "first_thought_held": "the thought video's first frame, held",
    }
    beaten = [name for key, name in rivals.items() if own["low"] > part[key]["high"]]
    lost = [name for key, name in rivals.items() if own["low"] <= part[key]["high"]]
    said = f"Frames drawn from the latents are {own['mean']:.1f} dB from the true ones"
    said += f": nearer than {', '.join(beaten)}" if beaten else ""
    said += f"; not clearly nearer than {', '.join(lost)}" if lost else ""
    return [said + ". The paper shows no frames, but one case in words (Figure 4)."]


def _lens(part: dict[str, Any]) -> str:
    said = "Read through the output layer, some slot's likeliest token begins the right answer for "
    said += f"{100 * part['mean']:.0f}% of rows"
    return said + (": the latents are not words." if part["high"] < 0.5 else ".")

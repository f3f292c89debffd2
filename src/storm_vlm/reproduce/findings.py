"""Each table in a sentence or two: what was found, and whether the paper found the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from storm_vlm.analysis.findings import findings as analysis_findings

Line = dict[str, Any]


def findings(found: dict[str, Any]) -> dict[str, list[str]]:
    """Sentences by table and by part of the analysis. What is not measured is not spoken of."""
    tables = {
        name: {line["arm"]: line for line in table["lines"] if line["accuracy"]}
        for name, table in found["tables"].items()
    }
    said = {
        name: [sentence for sentence in SAY[name](lines) if sentence]
        for name, lines in tables.items()
    }
    return {**said, "latency": [_latency(found["latency"])], **analysis_findings(found)}


def _percent(line: Line) -> str:
    return f"{100 * line['accuracy']['mean']:.1f}%"


def _leads(line: Line) -> bool:
    """The reference is ahead of it beyond doubt."""
    return line["behind"] is not None and line["behind"]["low"] > 0


def _lead(line: Line) -> str:
    behind = line["behind"]
    return f"{100 * behind['mean']:+.1f} points ({100 * behind['low']:+.1f} to {100 * behind['high']:+.1f})"


def _main(lines: dict[str, Line]) -> list[str]:
    said = []
    if {"full", "sft"} <= set(lines):
        agrees = "as in" if _leads(lines["sft"]) else "unlike"
        said.append(
            f"STORM against SFT on the same rows and steps: {_percent(lines['full'])} to {_percent(lines['sft'])}, "
            f"{_lead(lines['sft'])}, {agrees} Tables 1 and 2."
        )
    if {"full", "pause"} <= set(lines):
        said.append(
            f"As many slots without a target: {_percent(lines['pause'])}. "
            + (
                "It is what slots are taught, not their number."
                if _leads(lines["pause"])
                else "Slots alone do as well."
            )
        )
    if {"full", "cot"} <= set(lines):
        ahead = _leads(lines["cot"])
        behind = lines["cot"]["behind"]["high"] < 0
        verdict = (
            "STORM is ahead"
            if ahead
            else "the chain is ahead"
            if behind
            else "neither is ahead beyond doubt"
        )
        said.append(
            f"A chain of thought taught by the same oracle's plans: {_percent(lines['cot'])} with "
            f"{lines['cot']['tokens']:.0f} tokens an answer, against {lines['full']['slots']:.0f} slots and "
            f"{lines['full']['tokens']:.0f} tokens: {verdict}. The paper's CoT baseline is not trained to think."
        )
    if "full" in lines:
        swapped, follows = (
            lines["full"]["tampered"][kind]["mean"] for kind in ("swap_other_answer", "follows")
        )
        said.append(
            f"With another clip's latents STORM is right in {100 * swapped:.1f}%, and says that clip's answer in "
            f"{100 * follows:.1f}%. The paper has no such test."
        )
        harder = [lines[arm]["harder"]["mean"] for arm in ("full", "sft") if arm in lines]
        said.append(
            "On the harder split: "
            + " against ".join(f"{100 * value:.1f}%" for value in harder)
            + " for STORM and SFT."
            if len(harder) == 2
            else ""
        )
    return said


def _stages(lines: dict[str, Line]) -> list[str]:
    said = []
    if {"full", "stage1_only"} <= set(lines):
        behind = lines["stage1_only"]["behind"]
        agrees = _leads(lines["stage1_only"])
        doubt = behind["low"] <= 0 <= behind["high"]
        said.append(
            f"Stage I alone {_percent(lines['stage1_only'])}, both stages {_percent(lines['full'])}: "
            f"{_lead(lines['stage1_only'])}, "
            + (
                "as in Table 6."
                if agrees
                else "no difference beyond doubt; the paper's Table 6 has 2 to 5 points for both."
                if doubt
                else "unlike Table 6: here Stage II lets the chain drift."
            )
        )
    if {"full", "stage2_only"} <= set(lines):
        used = lines["stage2_only"]["tampered"]
        lost = used["own"]["mean"] - used["swap_other_answer"]["mean"]
        said.append(
            f"Stage II alone {_percent(lines['stage2_only'])}; another clip's latents cost it {100 * lost:.1f} points"
            + (": without alignment the slots are not used." if lost < 0.02 else ".")
        )
    return said


def _order(lines: dict[str, Line], what: str) -> list[str]:
    ranked = sorted(lines.values(), key=lambda line: -line["accuracy"]["mean"])
    if len(ranked) < 2:
        return []
    return [
        f"{what}, best first: "
        + "; ".join(f"{line['name']} {_percent(line)}" for line in ranked)
        + "."
    ]


def _sizes(lines: dict[str, Line]) -> list[str]:
    said = []
    for start, name in (("", "four"), ("deep_", "six")):
        storm, sft = lines.get(f"{start}full"), lines.get(f"{start}sft")
        if storm and sft:
            gain = 100 * (storm["accuracy"]["mean"] - sft["accuracy"]["mean"])
            said.append(
                f"With {name} layers STORM has {_percent(storm)} and SFT {_percent(sft)}: {gain:+.1f} points"
                + (
                    ", as in Table 3, where the gain is there for both sizes."
                    if gain > 2
                    else ", unlike Table 3."
                )
            )
    return said


def _latent_sizes(lines: dict[str, Line]) -> list[str]:
    if "full" not in lines or len(lines) < 2:
        return []
    best = max(lines.values(), key=lambda line: line["accuracy"]["mean"])
    agrees = "as in" if best["arm"] == "full" else "unlike"
    return [
        *_order(lines, "By latent size"),
        f"Best is {best['name']}, {agrees} Table 5, where 8 is best and not pooling costs 4 to 8 points.",
    ]


def _rows(lines: dict[str, Line]) -> list[str]:
    pairs: Sequence[tuple[str, str]] = (
        ("_eighth", "an eighth"),
        ("_third", "a third"),
        ("", "all"),
    )
    each = [
        f"{what} of the rows: STORM {_percent(lines['full' + end])}, SFT {_percent(lines['sft' + end])}"
        for end, what in pairs
        if {"full" + end, "sft" + end} <= set(lines)
    ]
    return ["With " + "; ".join(each) + "."] if each else []


SAY = {
    "main": _main,
    "stages": _stages,
    "targets": lambda lines: _order(lines, "Targets"),
    "slot_inputs": lambda lines: _order(lines, "Inputs"),
    "sizes": _sizes,
    "latent_sizes": _latent_sizes,
    "rows": _rows,
}


def _latency(latency: dict[str, Any]) -> str:
    ratios = {
        n: one["ratio_to_latent"]["median"] for n, one in latency["micro cpu"]["reasoners"].items()
    }
    return (
        f"A chain of thought takes {ratios['cot']:.1f} times as long as latent slots, a grounded one "
        f"{ratios['grounded_cot']:.1f}, tools {ratios['tools']:.1f}; an answer at once {ratios['direct']:.2f}. The "
        "paper has 33 times for tools and 37 for a grounded chain, each in a harness of its own; here only the "
        "protocol differs, and lengths are fixed."
    )

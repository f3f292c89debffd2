"""Each table in a sentence or two: what was found, and whether the paper found the same.

A difference counts only if its interval leaves nought out; and no cause is told that was not measured.
"""

from __future__ import annotations

from typing import Any

Line = dict[str, Any]
Lines = dict[str, Line]


def findings(found: dict[str, Any]) -> dict[str, list[str]]:
    """Sentences by table. What is not measured is not spoken of."""
    said = {name: sentences(name, table) for name, table in found["tables"].items()}
    return {**said, "latency": [_latency(found["latency"])]}


def sentences(name: str, table: dict[str, Any]) -> list[str]:
    """Of one table; an arm can be set against its reference only by a seed that both have."""
    lines = {
        line["arm"]: line
        for line in table["lines"]
        if line["accuracy"] and (line["behind"] or line["against"] is None)
    }
    return SAY[name](lines)


def _percent(line: Line) -> str:
    return f"{100 * line['accuracy'].mean:.1f}%"


def _ahead(line: Line) -> int:
    """1: what it is set against is ahead of it; -1: it is ahead itself; 0: no difference shown."""
    behind = line["behind"]
    return 1 if behind.low > 0 else -1 if behind.high < 0 else 0


def _gap(line: Line) -> str:
    behind = line["behind"]
    low, high = 100 * behind.low, 100 * behind.high
    alone = ", over the one seed that both have" if behind.seeds == 1 else ""
    return f"{100 * behind.mean:+.1f} points ({low:+.1f} to {high:+.1f}{alone})"


def _verdict(line: Line, paper: str) -> str:
    """What it is set against is ahead in the paper; is it here?"""
    return {1: "as in", -1: "unlike", 0: "no difference shown, unlike"}[_ahead(line)] + f" {paper}"


def _main(lines: Lines) -> list[str]:
    said = []
    if "full" in lines and "sft" in lines:
        said.append(
            f"STORM {_percent(lines['full'])}, SFT on the same rows and steps {_percent(lines['sft'])}: "
            f"{_gap(lines['sft'])}, {_verdict(lines['sft'], 'Tables 1 and 2')}."
        )
    if "full" in lines and "sft_slower" in lines:
        said.append(
            f"SFT with a lower learning rate, {_percent(lines['sft_slower'])}: "
            f"{_gap(lines['sft_slower'])}."
        )
    if "full" in lines and "pause" in lines:
        means = {
            1: "the slots' number does not explain it",
            0: "no difference shown",
            -1: "they do better",
        }
        said.append(
            f"As many slots without a target {_percent(lines['pause'])}: {_gap(lines['pause'])}; "
            f"{means[_ahead(lines['pause'])]}. The paper has no such control."
        )
    if "full" in lines and "cot" in lines:
        who = {1: "STORM is ahead", 0: "no difference shown", -1: "the chain is ahead"}
        said.append(
            f"A chain of thought taught by the same oracle's plans {_percent(lines['cot'])}, with "
            f"{lines['cot']['tokens']:.0f} tokens an answer instead of {lines['full']['slots']:.0f} slots and "
            f"{lines['full']['tokens']:.0f} tokens: {_gap(lines['cot'])}, {who[_ahead(lines['cot'])]}. The paper's "
            "chains are written by the backbone as it is."
        )
    if "full" in lines:
        tampered = lines["full"]["tampered"]
        swap, follows, by_accident = (
            100 * tampered[kind].mean for kind in ("swap_other_answer", "follows", "follows_own")
        )
        said.append(
            f"Fed with another clip's latents STORM is right in {swap:.1f}%, and says that clip's answer in "
            f"{follows:.1f}% (with its own latents: {by_accident:.1f}%). The paper has no such test."
        )
    if "full" in lines and "sft" in lines:
        harder = [f"{100 * lines[arm]['harder'].mean:.1f}%" for arm in ("full", "sft")]
        said.append(f"On the harder split STORM has {harder[0]}, SFT {harder[1]}.")
    return said


def _stages(lines: Lines) -> list[str]:
    names = {
        "stage1_only": "Stage I alone, for as many steps",
        "stage1_first": "STORM before its Stage II",
        "stage2_only": "Stage II alone",
    }
    said = [
        f"{name}, {_percent(lines[arm])}; both stages {_percent(lines['full'])}: {_gap(lines[arm])}, "
        f"{_verdict(lines[arm], 'Table 6')}."
        for arm, name in names.items()
        if arm in lines and "full" in lines
    ]
    if "stage2_only" in lines:
        own, swap = (
            100 * lines["stage2_only"]["tampered"][kind].mean
            for kind in ("own", "swap_other_answer")
        )
        said.append(
            f"Stage II alone has {own:.1f}% with its own latents and {swap:.1f}% with another clip's."
        )
    return said


def _ranked(lines: Lines) -> list[str]:
    ranked = sorted(lines.values(), key=lambda line: -line["accuracy"].mean)
    return ["Best first: " + "; ".join(f"{line['name']} {_percent(line)}" for line in ranked) + "."]


def _controls(lines: Lines) -> list[str]:
    """Which arms the reference is shown to lead; the paper has none of them."""
    if len(lines) < 2:
        return []
    by_lead: dict[int, list[str]] = {1: [], 0: [], -1: []}
    for line in lines.values():
        if line["against"] is not None:
            alone = " (one seed)" if line["behind"].seeds == 1 else ""
            by_lead[_ahead(line)].append(f"“{line['name']}”{alone}")
    (reference,) = (line["name"] for line in lines.values() if line["against"] is None)
    verbs = {1: "is ahead of", 0: "is not shown to differ from", -1: "is behind"}
    parts = [f"{verbs[lead]} {', '.join(names)}" for lead, names in by_lead.items() if names]
    return [*_ranked(lines), f"“{reference}” " + "; ".join(parts) + "."]


def _sizes(lines: Lines) -> list[str]:
    said = [
        f"With {name} layers STORM has {_percent(lines[start + 'full'])}, SFT {_percent(lines[start + 'sft'])}: "
        f"{_gap(lines[start + 'sft'])}."
        for start, name in (("", "four"), ("deep_", "six"))
        if {start + "full", start + "sft"} <= set(lines)
    ]
    if len(said) == 2:
        both = _ahead(lines["sft"]) == _ahead(lines["deep_sft"]) == 1
        said.append(
            (
                "STORM leads at both sizes, as"
                if both
                else "A lead at both sizes is not shown, unlike"
            )
            + " the paper says; its Table 3 sets a smaller model against itself untrained."
        )
    return said


def _latent_sizes(lines: Lines) -> list[str]:
    others = [arm for arm in ("k4", "k16", "unpooled") if arm in lines]
    if "full" not in lines or not others:
        return []
    said = _ranked(lines)
    for arm in others:
        said.append(
            f"{lines[arm]['name']}: K = 8 less it {_gap(lines[arm])}, {_verdict(lines[arm], 'Table 5')}."
        )
    if "unpooled" in lines:
        said.append(
            "What is not pooled has only two of the thought video's frames, or K would be 128."
        )
    return said


def _rows(lines: Lines) -> list[str]:
    return [
        f"With {what} of the rows STORM has {_percent(lines['full' + end])}, SFT {_percent(lines['sft' + end])}: "
        f"{_gap(lines['sft' + end])}."
        for end, what in (("_eighth", "an eighth"), ("_third", "a third"), ("", "all"))
        if {"full" + end, "sft" + end} <= set(lines)
    ]


SAY = {
    "main": _main,
    "stages": _stages,
    "targets": _controls,
    "slot_inputs": _controls,
    "sizes": _sizes,
    "latent_sizes": _latent_sizes,
    "rows": _rows,
}


def _latency(latency: dict[str, Any]) -> str:
    reasoners = latency["micro cpu"]["reasoners"]
    ratios = {name: one["ratio_to_latent"]["median"] for name, one in reasoners.items()}
    return (
        f"A chain of thought takes {ratios['cot']:.1f} times as long as latent slots, a grounded one "
        f"{ratios['grounded_cot']:.1f}, tools {ratios['tools']:.1f}; an answer at once {ratios['direct']:.2f}. The "
        "paper has 33 times for tools and 37 for a grounded chain, each in a harness of its own; here only the "
        "protocol differs, and lengths are fixed."
    )

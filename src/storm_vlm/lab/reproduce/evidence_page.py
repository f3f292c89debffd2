"""What was found, for people: `results.md` and one self-contained HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from storm_vlm.analysis.page import Analysis, Card, template_values
from storm_vlm.analysis.reliance import KINDS
from storm_vlm.analysis.validate import PARTS
from storm_vlm.charts import svg
from storm_vlm.data.atomic_write import write_text
from storm_vlm.lab.reproduce.evidence_charts import dots, rows_curve
from storm_vlm.pages import Estimate, interval, points, render, share

COLUMNS = (
    "",
    "accuracy",
    "behind",
    "paper agrees",
    "harder split",
    "with another clip's latents",
    "that clip's answer",
    "without slots",
    "tokens",
    "seeds",
)
NOT_MEASURED = "not measured"
READING = (
    "Clips of the micro world stop early, and every question is about what comes after. All arms take {steps} "
    "optimizer steps of 16 rows, of {train_rows}, but where a name says otherwise, and answer the same {n_test} "
    "test questions. Brackets: 95% intervals, over seeds and questions; with three seeds they reach hardly beyond "
    "the worst and the best of them, with one they are over questions alone. Behind: how far this line is behind "
    "the bold one (SFT behind STORM of the same size or rows), in points, seed by seed. The paper agrees (yes) if "
    "it has the bold line ahead, too, and this interval leaves out zero. Beside each accuracy stands what is left of "
    "it when another clip's latents (of another answer) are fed into all slots, how often the answer then becomes "
    "that clip's, and what is left without slots. Harder split: two balls, five to seven mirrors, six or seven "
    "hidden steps."
)
SPENT = " {timed} of the {runs} runs were done in one go; together these took {core_hours:.1f} hours of a core."
ANALYSED = "One model, {analysed}; intervals over videos."
REHEARSAL = (
    "A rehearsal: far too few steps to learn anything. These figures mean nothing, and nothing is "
    "concluded from them."
)
LATENCY = (
    "Only the protocol differs between these lines. The paper's Table 4 has 33 times as long for tools and 37 times "
    "for a grounded chain, each in a harness of its own. "
)
RELIANCE = (
    "STORM of all seeds with all its slots fed as the line says, and answers decoded greedily; the first line is "
    "what it does by itself. The paper has no such table."
)
CAPTIONS = {"rows": "Accuracy by the number of training rows, at equal optimizer steps."}
CAPTION = (
    "Accuracy with its interval; small dots are seeds, the cross is with another clip's latents."
)


def markdown(evidence: dict[str, Any]) -> str:
    """All tables in Markdown, with how to read them."""
    figures = "[reproduce.json](results/reproduce.json). The command also writes a page with every picture."
    parts = _head("Results", evidence, figures)
    for table in evidence["tables"].values():
        parts += [f"## {table['title']} ({table['paper']})", table["paragraph"], grid_of(table)]
    parts += [
        "## Latency (Table 4)",
        LATENCY + evidence["latency"]["micro cpu"]["note"],
        _grid(LATENCY_COLUMNS, latency_rows(evidence["latency"]), bold=0),
        "## Does the answer depend on the latents?",
        RELIANCE,
        _grid(RELIANCE_COLUMNS, reliance_rows(evidence["tables"]["main"]), bold=0),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def studies_markdown(evidence: dict[str, Any]) -> str:
    """The studies' tables in Markdown, with the accuracy of every seed."""
    figures = (
        "[method.json](method.json). Studies beside the [record](../results.md), by its rules."
    )
    parts = _head("The method, looked into", evidence, figures)
    for table in evidence["tables"].values():
        measured = [line for line in table["lines"] if line["accuracy"]]
        seeds = "\n".join(
            f"- {line['name']}: "
            + ", ".join(
                f"{share:.1%} (seed {seed})"
                for seed, share in zip(line["seeds"], line["by_seed"], strict=True)
            )
            for line in measured
        )
        parts += [f"## {table['title']} ({table['paper']})", table["paragraph"], grid_of(table)]
        parts += [seeds]
    return "\n\n".join(part for part in parts if part) + "\n"


def _head(title: str, evidence: dict[str, Any], figures: str) -> list[str]:
    made_with = ", ".join(f"{name} {number}" for name, number in evidence["versions"].items())
    return [
        f"# {title}",
        f"Written by `{evidence['command']}` (commit {evidence['commit']}; {made_with}); figures: {figures}",
        f"**{REHEARSAL}**" if evidence["rehearsal"] else "",
        _reading(evidence),
    ]


def verdicts(evidence: dict[str, Any]) -> list[str]:
    """For the terminal: each table's lines with what the paper says of them; of a rehearsal only that it is one."""
    if evidence["rehearsal"]:
        return [REHEARSAL]
    return [
        f"{table['title']}: {line['name']} {_share(line['accuracy'])}"
        + (f", paper agrees: {line['paper_agrees']}" if line["paper_agrees"] else "")
        for table in evidence["tables"].values()
        for line in table["lines"]
        if line["accuracy"]
    ]


def _reading(evidence: dict[str, Any]) -> str:
    return READING.format(**evidence) + SPENT.format(**evidence["cost"])


def write_page(path: Path, evidence: dict[str, Any], cards: Sequence[Card]) -> None:
    """The page: tables, charts, and all that `storm validate` shows."""
    tables = evidence["tables"]
    charts = {
        name: svg((rows_curve if name == "rows" else dots)(table)) for name, table in tables.items()
    }
    page = render(
        "reproduce.html",
        evidence=evidence,
        **template_values(Analysis(**{name: evidence[name] for name in PARTS}), cards),
        reading=_reading(evidence),
        rehearsal=REHEARSAL if evidence["rehearsal"] else "",
        about_analysis=ANALYSED.format(**evidence),
        columns=COLUMNS,
        rows={name: table_rows(table) for name, table in tables.items()},
        charts=charts,
        captions={name: CAPTIONS.get(name, CAPTION) for name in tables},
        latency_columns=LATENCY_COLUMNS,
        latency_rows=latency_rows(evidence["latency"]),
        about_latency=LATENCY + evidence["latency"]["micro cpu"]["note"],
        reliance_columns=RELIANCE_COLUMNS,
        reliance_rows=reliance_rows(tables["main"]),
        about_reliance=RELIANCE,
    )
    write_text(path, page)


def table_rows(table: dict[str, Any]) -> list[list[str]]:
    """Cells under `COLUMNS`."""
    return [_row(line) for line in table["lines"]]


def _row(line: dict[str, Any]) -> list[str]:
    if line["accuracy"] is None:
        return [line["name"], NOT_MEASURED, *[""] * (len(COLUMNS) - 2)]
    behind, tampered = line["behind"], line["tampered"] or {}
    return [
        line["name"],
        _share(line["accuracy"]),
        f"{points(behind)} ({interval(behind)})" if behind else "",
        line["paper_agrees"],
        _share(line["harder"]),
        *(_share(tampered.get(kind)) for kind in ("swap_other_answer", "follows", "removed")),
        f"{line['tokens']:.0f}",
        str(len(line["seeds"])),
    ]


def _share(found: Estimate | None) -> str:
    return f"{share(found)} ({interval(found)})" if found else ""


RELIANCE_COLUMNS = ("fed into the slots", "accuracy")


def reliance_rows(table: dict[str, Any]) -> list[list[str]]:
    """Cells under `RELIANCE_COLUMNS`: STORM's accuracy by what is fed into the slots; none if it has no run."""
    found = next(line.get("tampered") for line in table["lines"] if line["against"] is None)
    return (
        [[what, _share(found[kind])] for kind, what in KINDS.items() if kind in found]
        if found
        else []
    )


LATENCY_COLUMNS = ("reasoner", "seconds an item", "times latent", "times direct", "tokens")


def latency_rows(latency: dict[str, Any]) -> list[list[str]]:
    """Cells under `LATENCY_COLUMNS`: medians, and the range over rounds."""

    def spread(value: dict[str, float]) -> str:
        return f"{value['median']:.3g} ({value['low']:.3g} to {value['high']:.3g})"

    return [
        [
            name,
            *(spread(one[key]) for key in ("s_per_item", "ratio_to_latent", "ratio_to_direct")),
            f"{one['tokens']:.0f}",
        ]
        for name, one in latency["micro cpu"]["reasoners"].items()
    ]


def grid_of(table: dict[str, Any]) -> str:
    """One table in Markdown, its reference in bold."""
    bold = [line["against"] for line in table["lines"]].index(None)
    return _grid(COLUMNS, table_rows(table), bold)


def _grid(columns: Sequence[str], rows: Sequence[Sequence[str]], bold: int) -> str:
    lines = [list(columns), ["---"] * len(columns)]
    for number, row in enumerate(rows):
        lines.append([f"**{cell}**" if cell and number == bold else cell for cell in row])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)

"""What was found, for people: `results.md` and one self-contained HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from storm_vlm.analysis.analyze import PARTS
from storm_vlm.analysis.reliance import KINDS
from storm_vlm.analysis.report import Analysis, Card, shown
from storm_vlm.charts import svg
from storm_vlm.data.atomic_write import write_text
from storm_vlm.lab.reproduce.charts import dots, rows_curve
from storm_vlm.pages import Estimate, interval, points, render, share

COLUMNS = (
    "",
    "accuracy",
    "behind",
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
    "the bold one (SFT behind STORM of the same size or rows), in points, seed by seed. Beside each accuracy "
    "stands what is left of it when another clip's latents (of another answer) are fed into all slots, how often "
    "the answer then becomes that clip's, and what is left without slots. Harder split: two balls, five to seven "
    "mirrors, six or seven hidden steps."
)
SPENT = " {timed} of the {runs} runs were done in one go; together these took {core_hours:.1f} hours of a core."
ANALYSED = "One model, {analysed}; intervals over videos."
REHEARSAL = "A rehearsal: far too few steps to learn anything, so these figures mean nothing."
CAPTIONS = {"rows": "Accuracy by the number of training rows, at equal optimizer steps."}
CAPTION = (
    "Accuracy with its interval; small dots are seeds, the cross is with another clip's latents."
)


def markdown(found: dict[str, Any]) -> str:
    """All tables and what they say, in Markdown."""
    parts = [
        "# Results",
        f"Written by `{found['command']}` (commit {found['commit']}; "
        + ", ".join(f"{name} {number}" for name, number in found["versions"].items())
        + "); figures: [reproduce.json](results/reproduce.json). The command also writes a page with every picture.",
        *([REHEARSAL] if found["rehearsal"] else []),
        _reading(found),
    ]
    for name, table in found["tables"].items():
        parts.append(f"## {table['title']} ({table['paper']})")
        parts.append(_bullets(found["findings"][name]))
        parts.append(grid_of(table))
    parts.append("## Latency (Table 4)")
    parts.append(_bullets(found["findings"]["latency"]))
    parts.append(_grid(LATENCY_COLUMNS, latency_rows(found["latency"]), bold=0))
    parts.append(found["latency"]["micro cpu"]["note"])
    parts.append("## Does the answer depend on the latents?")
    parts.append(RELIANCE)
    parts.append(_grid(RELIANCE_COLUMNS, reliance_rows(found["tables"]["main"]), bold=0))
    parts.append("## What the latents hold (Figures 4 to 8)")
    parts.append(ANALYSED.format(**found))
    return "\n\n".join(part for part in parts if part) + "\n"


def _reading(found: dict[str, Any]) -> str:
    return READING.format(**found) + SPENT.format(**found["cost"])


def write_page(path: Path, found: dict[str, Any], cards: Sequence[Card]) -> None:
    """The page: tables, charts, and all that `storm analyze` shows."""
    analysis = Analysis(**{name: found[name] for name in PARTS})
    tables = found["tables"]
    charts = {
        name: svg((rows_curve if name == "rows" else dots)(table)) for name, table in tables.items()
    }
    page = render(
        "reproduce.html",
        **{name: found[name] for name in ("command", "commit", "versions", "tables", "analysed")},
        **shown(analysis, cards),
        reading=_reading(found),
        rehearsal=REHEARSAL if found["rehearsal"] else "",
        about_analysis=ANALYSED.format(**found),
        about_reliance=RELIANCE,
        reliance_columns=RELIANCE_COLUMNS,
        columns=COLUMNS,
        said=found["findings"],
        rows={name: table_rows(table) for name, table in tables.items()}
        | {
            "latency": latency_rows(found["latency"]),
            "reliance": reliance_rows(tables["main"]),
        },
        charts=charts,
        captions={name: CAPTIONS.get(name, CAPTION) for name in tables},
        latency_note=found["latency"]["micro cpu"]["note"],
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
        _share(line["harder"]),
        *(_share(tampered.get(kind)) for kind in ("swap_other_answer", "follows", "removed")),
        f"{line['tokens']:.0f}",
        str(len(line["seeds"])),
    ]


def _share(found: Estimate | None) -> str:
    return f"{share(found)} ({interval(found)})" if found else ""


RELIANCE = (
    "STORM of all seeds with all its slots fed as the line says, and answers decoded greedily; the first line is "
    "what it does by itself. The paper has no such table."
)
RELIANCE_COLUMNS = ("fed into the slots", "accuracy")


def reliance_rows(table: dict[str, Any]) -> list[list[str]]:
    """Cells under `RELIANCE_COLUMNS`: STORM's accuracy by what is fed into the slots; none if it has no run."""
    found = next(line.get("tampered") for line in table["lines"] if line["against"] is None)
    return [[what, _share(found[kind])] for kind, what in KINDS.items()] if found else []


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


def _bullets(sentences: Sequence[str]) -> str:
    return "\n".join(f"- {sentence}" for sentence in sentences)


def _grid(columns: Sequence[str], rows: Sequence[Sequence[str]], bold: int) -> str:
    lines = [list(columns), ["---"] * len(columns)]
    for number, row in enumerate(rows):
        lines.append([f"**{cell}**" if cell and number == bold else cell for cell in row])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)

"""What was found, for people: `results.md` and one self-contained HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from storm_vlm.analysis.page import Card, shown
from storm_vlm.data.files import write_text
from storm_vlm.pages import interval, points, render, share
from storm_vlm.report import svg
from storm_vlm.reproduce.charts import dots, rows_curve

COLUMNS = (
    *(
        "",
        "accuracy",
        "behind",
        "harder split",
        "with another clip's latents",
        "that clip's answer",
    ),
    *("without slots", "tokens", "seeds"),
)
NOT_MEASURED = "not measured"
READING = (
    "Clips of the micro world stop early, and every question is about what comes after. All arms of a table see the "
    "same rows for {steps} optimizer steps of 16 ({train_rows} rows, but where it says otherwise), and answer the "
    "same {n_test} test questions. Intervals: 95%, seeds and questions drawn again. Behind: the bold line less this "
    "one, in points, seed by seed. Beside each accuracy stands what is left of it when another clip's latents (of "
    "another answer) are fed into the slots, how often the answer then becomes that clip's, and what is left without "
    "slots. Harder split: two balls, six or seven hidden steps."
)
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
        READING.format(**found),
    ]
    for name, table in found["tables"].items():
        parts.append(f"## {table['title']} ({table['paper']})")
        parts.append(_bullets(found["findings"][name]))
        parts.append(grid_of(table))
    parts.append("## Latency (Table 4)")
    parts.append(_bullets(found["findings"]["latency"]))
    parts.append(_grid(LATENCY_COLUMNS, latency_rows(found["latency"]), bold=0))
    parts.append(f"## What the latents hold (of `{found['analysed']}`; Figures 4 to 8)")
    for name in ("reliance", "slots", "retrieval", "embeddings", "watch"):
        parts.append(_bullets(found["findings"][name]))
    return "\n\n".join(part for part in parts if part) + "\n"


def write_page(path: Path, found: dict[str, Any], cards: Sequence[Card]) -> None:
    """The page: tables, charts, and all that `storm analyze` shows."""
    analysis = {
        name: found[name] for name in ("reliance", "slots", "embeddings", "retrieval", "watch")
    }
    tables = found["tables"]
    charts = {
        name: svg((rows_curve if name == "rows" else dots)(table)) for name, table in tables.items()
    }
    page = render(
        "reproduce.html",
        **{name: found[name] for name in ("command", "commit", "versions", "tables", "analysed")},
        **shown(analysis, cards),
        reading=READING.format(**found),
        columns=COLUMNS,
        said=found["findings"],
        rows={name: table_rows(table) for name, table in tables.items()}
        | {"latency": latency_rows(found["latency"])},
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


def _share(found: dict[str, Any] | None) -> str:
    return f"{share(found)} ({interval(found)})" if found else ""


LATENCY_COLUMNS = ("reasoner", "seconds an item", "times latent", "times direct", "tokens")


def latency_rows(latency: dict[str, Any]) -> list[list[str]]:
    """Cells under `LATENCY_COLUMNS`: medians, and the range over rounds."""

    def spread(value: dict[str, float]) -> str:
        return f"{value['median']:.2f} ({value['low']:.2f} to {value['high']:.2f})"

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
    names = [line["name"] for line in table["lines"]]
    return _grid(COLUMNS, table_rows(table), bold=names.index(table["reference"]))


def _bullets(sentences: Sequence[str]) -> str:
    return "\n".join(f"- {sentence}" for sentence in sentences)


def _grid(columns: Sequence[str], rows: Sequence[Sequence[str]], bold: int) -> str:
    lines = [list(columns), ["---"] * len(columns)]
    for number, row in enumerate(rows):
        lines.append([f"**{cell}**" if cell and number == bold else cell for cell in row])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)

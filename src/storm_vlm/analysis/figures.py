"""The figures of the validity suite (paper, Figures 5 to 8): SVG."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from storm_vlm.analysis.embeddings import Embeddings, Projection
from storm_vlm.analysis.reliance import SlotAccuracy
from storm_vlm.analysis.retrieval import Retrieval
from storm_vlm.charts import BLUE, GREY, ORANGE, svg
from storm_vlm.evaluation.records import Probes, Reliance, Sensitivity
from storm_vlm.evaluation.statistics import Estimate

KIND_COLOURS = {"frame": GREY, "keyframe": ORANGE, "latent": BLUE}
REPRESENTATIONS = {"latent": BLUE, "text": ORANGE, "random": GREY}


def draw(
    reliance: Reliance,
    probes: Probes | None,
    slots: SlotAccuracy,
    embeddings: Embeddings,
    retrieval: Retrieval | None,
) -> dict[str, str]:
    """Data URIs of the figures that there is something for."""
    drawn = {
        "reliance": reliance_bars(reliance),
        "sensitivity": sensitivity_bars(reliance.sensitivity),
        "slots": slot_bars(slots.variants, "accuracy"),
        "sweep": sweep_line(slots.sweep),
        "embeddings": scatter(embeddings.projection),
    }
    if probes is not None:
        drawn["probes"] = probe_map(probes)
    if retrieval is not None:
        drawn["retrieval"] = retrieval_bars(retrieval.representations)
        drawn["per_query"] = per_query(retrieval.per_query)
        mrr = {name: line["mrr"] for name, line in retrieval.slots.items()}
        drawn["retrieval_slots"] = slot_bars(mrr, "MRR of same-video retrieval")
    return {name: svg(figure) for name, figure in drawn.items()}


def _plot(height: float) -> tuple[Any, Any]:
    figure = Figure(figsize=(7, height), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _legend(axes: Any) -> None:
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))  # beside the axes


def _errors(lines: list[Estimate]) -> np.ndarray:
    """How far intervals reach below and above their means, (2, n)."""
    low, mean, high = np.array([(line.low, line.mean, line.high) for line in lines]).T
    return np.stack([mean - low, high - mean]).clip(0)


def _bars(lines: dict[str, Estimate], colours: list[str], label: str) -> Any:
    values = list(lines.values())
    figure, axes = _plot(0.6 + 0.3 * len(lines))
    axes.barh(list(lines), [v.mean for v in values], xerr=_errors(values), color=colours, capsize=2)
    axes.set(xlim=(0, 1), xlabel=label)
    axes.margins(y=0.02)
    axes.invert_yaxis()
    return figure


def reliance_bars(part: Reliance) -> Any:
    """Accuracy by what is fed into the slots."""
    lines = {v.what.split(":")[0]: v.accuracy for v in part.interventions.values() if v.accuracy}
    return _bars(lines, [BLUE] + [GREY] * (len(lines) - 1), "accuracy")


def slot_bars(lines: dict[str, Estimate], label: str) -> Any:
    """By which slots are used; best first, as in Figure 8."""
    ordered = dict(sorted(lines.items(), key=lambda line: -line[1].mean))
    whole = ("all slots", "mean of all slots")
    return _bars(ordered, [BLUE if name in whole else GREY for name in ordered], label)


def sweep_line(sweep: dict[int, Estimate]) -> Any:
    """Accuracy by how many slots are rolled out at test time."""
    figure, axes = _plot(2.7)
    ks, lines = list(sweep), list(sweep.values())
    axes.errorbar(
        ks, [v.mean for v in lines], yerr=_errors(lines), marker="o", color=BLUE, capsize=2
    )
    axes.set(ylim=(0, 1), xticks=ks, xlabel="slots at test time (K)", ylabel="accuracy")
    return figure


def sensitivity_bars(part: Sensitivity) -> Any:
    """How far each slot moves with the clip, and with the question."""
    figure, axes = _plot(2.7)
    slots = np.arange(1, len(part.clip.slots) + 1)
    axes.bar(slots - 0.19, part.clip.slots, 0.36, color=BLUE, label="another clip")
    axes.bar(slots + 0.19, part.question.slots, 0.36, color=GREY, label="another question")
    axes.axhline(1, color=ORANGE, linestyle="--", linewidth=1)
    axes.set(xticks=slots, xlabel="slot", ylabel="moved, of the spread")
    _legend(axes)
    return figure


def probe_map(part: Probes) -> Any:
    """How often a probe at each position and layer names the answer."""
    figure, axes = _plot(0.8 + 0.3 * len(part.accuracy))
    shares = np.array(list(part.accuracy.values()))
    axes.imshow(shares, aspect="auto", cmap="Blues", vmin=0, vmax=1)
    for (row, column), value in np.ndenumerate(shares):
        shade = "white" if value > 0.5 else "#1c1c1c"
        axes.text(column, row, f"{100 * value:.0f}", ha="center", va="center", color=shade)
    axes.set(xticks=range(len(part.layers)), xticklabels=[layer + 1 for layer in part.layers])
    axes.set(yticks=range(len(shares)), yticklabels=list(part.accuracy), xlabel="decoder layer")
    return figure


def scatter(part: Projection) -> Any:
    """PCA and t-SNE of frames, keyframes and latents (Figure 5)."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    both = figure.subplots(1, 2)
    kinds = np.array([point.kind for point in part.points])
    for axes, title, points in zip(both, ("PCA", "t-SNE"), (part.pca, part.tsne), strict=True):
        at = np.array(points)
        for kind, colour in KIND_COLOURS.items():
            marker = "*" if kind == "keyframe" else "o"
            size = 70 if kind == "keyframe" else 14
            chosen = at[kinds == kind]
            axes.scatter(
                *chosen.T, s=size, marker=marker, c=colour, label=kind, alpha=0.75, linewidths=0
            )
        axes.set(xticks=[], yticks=[], title=title)
    _legend(both[1])
    return figure


def retrieval_bars(part: dict[str, dict[str, Estimate]]) -> Any:
    """Hit@1, Hit@5 and MRR of each representation (Figure 6)."""
    figure, axes = _plot(2.7)
    metrics = list(next(iter(part.values())))
    for shift, (name, colour) in enumerate(REPRESENTATIONS.items()):
        lines = list(part[name].values())
        places = np.arange(len(metrics)) + 0.27 * (shift - 1)
        means = [line.mean for line in lines]
        axes.bar(places, means, 0.25, yerr=_errors(lines), color=colour, label=name, capsize=2)
    axes.set(ylim=(0, 1.02), xticks=range(len(metrics)), xticklabels=["Hit@1", "Hit@5", "MRR"])
    _legend(axes)
    return figure


def per_query(part: dict[str, list[Any]]) -> Any:
    """Reciprocal rank of each query, each representation's sorted by itself (Figure 7)."""
    figure, axes = _plot(2.7)
    for name, colour in REPRESENTATIONS.items():
        ranks = sorted(part[name], reverse=True)
        share = (np.arange(len(ranks)) + 1) / len(ranks)
        axes.plot(share, ranks, color=colour, label=name, drawstyle="steps-post")
    axes.set(ylim=(0, 1.05), xlim=(0, 1), xlabel="share of queries", ylabel="reciprocal rank")
    _legend(axes)
    return figure

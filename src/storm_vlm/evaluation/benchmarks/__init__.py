"""Published benchmarks, each a file: their rows, their own prompt and their own rule beside ours."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, ClassVar

from storm_vlm.registry import Registry

if TYPE_CHECKING:
    from storm_vlm.data.row import Row
    from storm_vlm.evaluation.benchmarks.published import Entry, Hub, Videos
    from storm_vlm.evaluation.records import Record

GENERAL = "Table 1: general video understanding"
REASONING = "Table 2: video reasoning"


class Benchmark(ABC):
    """Where a benchmark differs from a file of rows. Made without arguments."""

    name: ClassVar[str]  #: in the registry, too
    title: ClassVar[str]  #: of its column in a report
    table: ClassVar[str | None] = None  #: of the paper, that its column belongs to
    groups: ClassVar[tuple[str, ...]] = ()  #: keys of `Row.meta` that accuracy is broken down by
    hub: ClassVar[Hub | None] = None  #: where its questions are published; None: not on the hub
    files: ClassVar[tuple[str, ...]] = ()  #: patterns; the first that any published file fits
    tasks: ClassVar[tuple[str, ...]] = ()  #: if named, only files called like one, or in its folder
    #: The official figure is the mean over the first of these groups, each the mean over the next; (): over all.
    averages: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls) -> None:
        for attribute in ("name", "title"):
            if not hasattr(cls, attribute):
                raise AttributeError(f"{cls.__name__} has no {attribute}")

    def read(self, folder: Path) -> list[Row]:
        """Rows (split "test", absolute video paths) from the published files in `folder`, at any depth.

        Raises:
            RowError: a published row that does not fit; names file, place and field.
            FileNotFoundError: the published file is not there; names what to download.
        """
        from storm_vlm.evaluation.benchmarks.published import read_published

        return read_published(self, folder)

    def entries(self, file: Path) -> Iterator[Entry]:
        """What a published file holds, question by question: here the places to make one layout of several."""
        from storm_vlm.evaluation.benchmarks.published import read_entries

        return read_entries(file)

    @abstractmethod
    def row(self, published: Entry, videos: Videos, task: str, number: int) -> Row | None:
        """The row of an entry, the how manieth of its file, from 1; None: not of this benchmark."""

    def official_prompt(self, row: Row) -> str:
        """The text that the benchmark's own harness asks with; without one, ours."""
        from storm_vlm.data.prompt import question_text

        return question_text(row.question, row.options)

    def official_score(self, text: str, row: Row) -> float | None:
        """0 to 1 by the first of its `RULES`, quirks included; None where there is none, or it needs a judge."""
        from storm_vlm.evaluation.scoring import RULES

        rules = list(RULES.get(self.name, {}).values())
        return rules[0](text, row) if rules else None

    def official_figure(self, scores: Sequence[float], records: Sequence[Record]) -> float:
        """What the scores of a run, or of a category of it, come to: their mean over `averages`."""
        return _average(list(zip(scores, records, strict=True)), self.averages)

    def judge_prompt(self, text: str, row: Row) -> str | None:
        """What a judge is asked about an answer, for JSON with "correct" or "scores"; None: it is not asked."""
        return None


def _average(rated: Sequence[tuple[float, Record]], keys: Sequence[str]) -> float:
    """The mean over the groups of the first key, each averaged by the others; over all without one."""
    if not keys:
        return mean(score for score, _ in rated)
    groups: dict[str | None, list[tuple[float, Record]]] = {}
    for score, record in rated:
        groups.setdefault(record.groups.get(keys[0]), []).append((score, record))
    return mean(_average(group, keys[1:]) for group in groups.values())


BENCHMARKS: Registry[type[Benchmark]] = Registry(
    "benchmarks",
    {
        "videomme": f"{__name__}.videomme:VideoMME",
        "mvbench": f"{__name__}.mvbench:MVBench",
        "tempcompass": f"{__name__}.tempcompass:TempCompass",
        "tempcompass_captioning": f"{__name__}.tempcompass:TempCompassCaptioning",
        "videoespresso": f"{__name__}.videoespresso:VideoEspresso",
        "video_holmes": f"{__name__}.video_holmes:VideoHolmes",
        "mmvu": f"{__name__}.mmvu:MMVU",
        "mmvu_open": f"{__name__}.mmvu:MMVUOpen",
        "tvbench": f"{__name__}.mvbench:TVBench",
        "tomato": f"{__name__}.tomato:Tomato",
        "vsibench": f"{__name__}.vsibench:VSIBench",
        "vsibench_debiased": f"{__name__}.vsibench:VSIBenchDebiased",
        "vsibench_pruned": f"{__name__}.vsibench:VSIBenchPruned",
        "videomme_v2": f"{__name__}.videomme_v2:VideoMMEv2",
        "lvbench": f"{__name__}.lvbench:LVBench",
        "futurebench": f"{__name__}.futurebench:FutureBench",
        "twiffbench": f"{__name__}.twiffbench:TwiFFBench",
        "charades_sta": f"{__name__}.charades_sta:CharadesSTA",
    },
)

"""Published benchmarks, each a file: their rows, their own prompt and their own rule beside ours."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from storm_vlm.data.row import Row
from storm_vlm.evaluation.benchmarks.mmvu import MMVU
from storm_vlm.evaluation.benchmarks.mvbench import MVBench, TVBench
from storm_vlm.evaluation.benchmarks.published import Hub
from storm_vlm.evaluation.benchmarks.tempcompass import TempCompass
from storm_vlm.evaluation.benchmarks.tomato import Tomato
from storm_vlm.evaluation.benchmarks.video_holmes import VideoHolmes
from storm_vlm.evaluation.benchmarks.videoespresso import VideoEspresso
from storm_vlm.evaluation.benchmarks.videomme import VideoMME
from storm_vlm.evaluation.benchmarks.vsibench import VSIBench
from storm_vlm.evaluation.run_folder import RunError


class Benchmark(Protocol):
    """Where a benchmark differs from a file of rows."""

    name: str
    groups: tuple[str, ...]  #: keys of `Row.meta` that accuracy is broken down by

    @property
    def hub(self) -> Hub:
        """Where its questions are published."""
        ...

    def read(self, folder: Path) -> list[Row]:
        """Rows (split "test", absolute video paths) from the published files in `folder`.

        Raises:
            RowError: a published row that does not fit; names file, place and field.
            FileNotFoundError: the published file is not there; names what to download.
        """
        ...

    def official_prompt(self, row: Row) -> str:
        """The text that the benchmark's own harness asks with."""
        ...

    def official_score(self, text: str, row: Row) -> float | None:
        """0 to 1 by the benchmark's own rule, quirks included; None where it needs a judge."""
        ...


_ALL: tuple[Benchmark, ...] = (
    VideoMME(),
    MVBench(),
    TempCompass(),
    TempCompass("tempcompass_captioning", ("captioning",)),
    VideoEspresso(),
    VideoHolmes(),
    MMVU(),
    MMVU("mmvu_open", "open-ended"),
    TVBench(),
    Tomato(),
    VSIBench(),
)
BENCHMARKS: dict[str, Benchmark] = {benchmark.name: benchmark for benchmark in _ALL}


def find_benchmark(name: str) -> Benchmark:
    """The published benchmark of that name. Raises RunError, which names those there are."""
    if name not in BENCHMARKS:
        raise RunError(
            f"no benchmark is called {name!r}: choose from {', '.join(sorted(BENCHMARKS))}"
        )
    return BENCHMARKS[name]

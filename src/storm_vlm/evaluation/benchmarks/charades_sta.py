"""Charades-STA: when in a film of half a minute something happens; 3,720 sentences."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from storm_vlm.data.row import Row
from storm_vlm.evaluation.benchmarks import Benchmark
from storm_vlm.evaluation.benchmarks.published import Entry, Hub, Videos, read_entries

_LINE = re.compile(r"(\S+) (\S+) (\S+)##(.*)")


class CharadesSTA(Benchmark):
    """The accuracy is R@0.5, the mean IoU (mIoU) stands beside it; the official figure is lmms-eval's mIoU."""

    name = "charades_sta"
    title = "Charades-STA"
    hub = Hub("lmms-eval/charades_sta")
    files = ("charades_sta_test.txt", "*charades*.json*", "test*.parquet")

    def entries(self, file: Path) -> Iterator[Entry]:
        """lmms-eval's rows; or the authors' lines, `3MSZA 24.3 30.4##person turn a light on.`, in the same form."""
        if file.suffix != ".txt":
            yield from read_entries(file)
            return
        for line in filter(None, file.read_text(encoding="utf-8").splitlines()):
            if not (parts := _LINE.fullmatch(line)):
                raise ValueError(f"not as the authors write a line: {line!r}")
            video, start, end, caption = parts.groups()
            times = [float(start), float(end)]
            yield {"video": f"{video}.mp4", "caption": caption, "timestamp": times}

    def row(self, published: Entry, videos: Videos, task: str, number: int) -> Row:
        (start, end), caption = published["timestamp"], published["caption"]
        return Row(
            id=f"charades-{number}",
            video=videos.find(published["video"], ("Charades_v1_480", "Charades_v1")),
            question=f"When does this happen: {caption.rstrip('.')}? Answer with its start and end in seconds, "
            "such as 2.0 - 3.5.",
            answer=f"{start} - {end}",
            split="test",
            meta={"caption": caption, "moment": [start, end]},
        )

    def official_prompt(self, row: Row) -> str:
        """lmms-eval's."""
        return (
            "Please find the visual event described by a sentence in the video, determining its starting and ending "
            "times. The format should be: 'The event happens in the start time - end time'. For example, The event "
            "'person turn a light on' happens in the 24.3 - 30.4 seonds. Now I will give you the textual sentence: "
            f"{row.meta['caption']}. Please return its start time and end time."
        )

"""Video-Holmes: 1,837 questions of seven types about 270 suspense films."""

from __future__ import annotations

from storm_vlm.data.row import Row
from storm_vlm.evaluation.benchmarks import REASONING, Benchmark
from storm_vlm.evaluation.benchmarks.published import Entry, Hub, Videos, bare, index_of


class VideoHolmes(Benchmark):
    name = "video_holmes"
    title = "Video-Holmes"
    table = REASONING
    groups = ("question_type",)
    hub = Hub("TencentARC/Video-Holmes", data_files="test_Video-Holmes.json", split="train")
    files = ("test_Video-Holmes.json", "test*.parquet")

    def row(self, published: Entry, videos: Videos, task: str, number: int) -> Row:
        """Rows whose absent options (None, or "", as tables of structs have them) are left out."""
        kept = {k: v for k, v in sorted(published["Options"].items()) if v}
        options = bare(list(kept.values()))
        if "".join(kept) != "ABCDEFGH"[: len(kept)]:
            raise ValueError(f"Options: letters {', '.join(kept)} have a gap")
        return Row(
            id=f"{published['video ID']}-{published['Question ID']}",
            video=videos.find(published["video ID"], ("videos_cropped", "videos", "video")),
            question=published["Question"],
            options=options,
            answer=options[index_of(published["Answer"], options)],
            split="test",
            meta={"question_type": published["Question Type"], "published_options": kept},
        )

    def official_prompt(self, row: Row) -> str:
        options = ", ".join(f"{k}: {v}" for k, v in row.meta["published_options"].items())
        return (
            "Based on the given video, reason and answer the single-choice question. Provide your reasoning "
            "between the <think> and </think> tags, and then give your final answer between the <answer> and "
            f"</answer> tags. The question is: {row.question}. The options are: {options}. Your answer:"
        )

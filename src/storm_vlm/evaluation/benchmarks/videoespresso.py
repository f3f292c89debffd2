"""VideoEspresso's hard test: about 1,400 questions of 14 tasks; a third are causal, so look at the macro average."""

from __future__ import annotations

from storm_vlm.data.row import Row
from storm_vlm.evaluation.benchmarks import REASONING, Benchmark
from storm_vlm.evaluation.benchmarks.published import Entry, Hub, Videos, bare, index_of, lettered


class VideoEspresso(Benchmark):
    name = "videoespresso"
    title = "VideoEspresso"
    table = REASONING
    groups = ("task",)
    hub = Hub("hshjerry0315/VideoEspresso-Test", data_files="bench_hard.json", split="train")
    files = ("bench_hard.json", "bench_final.json")

    def row(self, published: Entry, videos: Videos, task: str, number: int) -> Row:
        """Rows of bench_hard.json (bench_final.json in the README); evidence and captions stay behind."""
        options = bare(published["options"])
        return Row(
            id=f"espresso-{number}",
            video=videos.find(published["video_path"]),
            question=published["question"],
            options=options,
            answer=options[index_of(published["correct_answer"], options)],
            split="test",
            meta={"task": published["task"], "published_options": published["options"]},
        )

    def official_prompt(self, row: Row) -> str:
        texts = [option.split("):", 1)[-1].strip() for option in row.meta["published_options"]]
        return (
            f"Please finish the {row.meta['task']} task. Question: {row.question}. You have the following "
            f"options: \n{lettered(texts, '({}) {}')}. Select the answer and only give the option letters."
        )

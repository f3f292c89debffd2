"""VSI-Bench: spatial questions about rooms, with options or with a number for an answer.

Numbers are scored by mean relative accuracy, so the official column is the one to read: ours wants the very
number. Its figure is the mean over eight tasks, relative direction being the mean of easy, medium and hard.
"""

from __future__ import annotations

from storm_vlm.data.row import Row
from storm_vlm.evaluation.benchmarks import Benchmark
from storm_vlm.evaluation.benchmarks.published import Entry, Hub, Videos, bare, index_of


class VSIBench(Benchmark):
    name = "vsibench"
    title = "VSI-Bench"
    groups = ("kind", "question_type")
    averages = groups
    hub = Hub("nyu-visionx/VSI-Bench", ("full",))
    files = ("test.jsonl", "test-*.parquet", "test.parquet")

    def row(self, published: Entry, videos: Videos, task: str, number: int) -> Row:
        listed = published.get("options") or []
        options = bare(listed)
        truth = str(published["ground_truth"])
        task = published["question_type"]
        return Row(
            id=str(published["id"]),
            video=videos.find(f"{published['dataset']}/{published['scene_name']}"),
            question=published["question"],
            options=options,
            answer=options[index_of(truth, options)] if options else truth,
            split="test",
            meta={
                "kind": task if "rel_direction" not in task else task.rpartition("_")[0],
                "question_type": task,
                "published_options": listed,
            },
        )

    def official_prompt(self, row: Row) -> str:
        lines = ["These are frames of a video.", row.question]
        if row.options:
            lines.append("Options:\n" + "\n".join(row.meta["published_options"]))
            lines.append("Answer with the option's letter from the given choices directly.")
        else:
            lines.append("Please answer the question using a single word or phrase.")
        return "\n".join(lines)


class VSIBenchDebiased(VSIBench):
    """Without the questions that are guessed from the text alone."""

    name = "vsibench_debiased"
    title = "VSI-Bench, debiased"
    hub = Hub("nyu-visionx/VSI-Bench", ("debiased",))
    files = ("test_debiased*.jsonl", "test_debiased*.parquet")


class VSIBenchPruned(VSIBench):
    """The questions that the debiased set leaves out."""

    name = "vsibench_pruned"
    title = "VSI-Bench, pruned"
    hub = Hub("nyu-visionx/VSI-Bench", ("pruned",))
    files = ("test_pruned*.jsonl", "test_pruned*.parquet")

"""TwiFF-Bench: 1,078 open questions about what comes after the frames shown; its authors score them with a judge."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from storm_vlm.data.row import Row
from storm_vlm.data.video import write_video
from storm_vlm.datasets.parse import unwrapped
from storm_vlm.evaluation.benchmarks import Benchmark
from storm_vlm.evaluation.benchmarks.published import Entry, Hub, Videos, read_entries

CLIPS = "question_clips"  # the folder of the clips made here, beside the published files


class TwiFFBench(Benchmark):
    name = "twiffbench"
    title = "TwiFF-Bench"
    groups = ("classification",)
    hub = Hub("Liu-Junhua/TwiFF-Bench")
    files = ("test-*.parquet", "*.parquet")

    def entries(self, file: Path) -> Iterator[Entry]:
        for number, entry in enumerate(read_entries(file), start=1):
            yield {"id": f"{file.stem}-{number}", **entry}  # the file is one of four

    def row(self, published: Entry, videos: Videos, task: str, number: int) -> Row:
        """The question's pictures become a clip, two frames each at 4 fps.

        The pictures of the answer are the future: they are left alone. `published_answer`, the chain with the answer
        in it, is for a judge.
        """
        if "<ans>" not in published["answer"]:
            raise ValueError("answer: no <ans> in it")
        clip = videos.folder / CLIPS / f"{published['id']}.mp4"
        if not clip.exists():
            _write_slides(clip, [picture["bytes"] for picture in published["question_images"]])
        topic = (published.get("meta_data") or {}).get("classification")
        return Row(
            id=published["id"],
            video=str(clip),
            question=re.sub(r"(?:frame_\d+\s*)?<image>\s*", "", published["question"]).strip(),
            answer=unwrapped(published["answer"], "ans"),
            split="test",
            meta={
                **({"classification": str(topic)} if topic else {}),
                "published_question": published["question"],
                "published_answer": published["answer"],
            },
        )

    def official_prompt(self, row: Row) -> str:
        """Future-L1's, for models that write no pictures: TwiFF's system message, then the labelled frames."""
        question = re.sub(r"<image>\s*", "", row.meta["published_question"]).strip()
        return (
            "You are an AI assistant capable of reasoning with visual imagery. You should conduct a detailed "
            "analysis of the question. Consider different angles, potential solutions, and reason through the "
            "problem step-by-step with image. After fully reasoning through the problem\u2014potentially using "
            "image-based thinking\u2014provide only a clear, concise, and direct answer to the user's question.\n\n"
            f"{question}\n\nReason step by step about the question. After your reasoning, write the final answer "
            "wrapped in <answer>...</answer> tags."
        )

    def judge_prompt(self, text: str, row: Row) -> str:
        """Its authors show a judge the pictures of both chains, too; ours reads only the texts."""
        return (
            "Rate strictly how a model forecast what comes next in a video. Its chain of reasoning gets 0 to 5 for "
            "being sound, complete and to the point, which need not be as the reference is; its answer gets 0 to 5 "
            "for agreeing with the right one.\n\n"
            f"Question: {row.question}\n\nReference chain: {row.meta['published_answer']}\n\n"
            f"Right answer: {row.answer}\n\nThe model's text, its answer last: {text}\n\n"
            'Write only JSON: {"scores": [reasoning, answer]}'
        )


def _write_slides(clip: Path, pictures: list[bytes]) -> None:
    from PIL import Image

    images = [Image.open(io.BytesIO(picture)).convert("RGB") for picture in pictures]
    frames = np.stack([np.asarray(image.resize(images[0].size)) for image in images])
    clip.parent.mkdir(exist_ok=True)
    write_video(clip, frames.repeat(2, axis=0), 4.0, crf=12, pixel_format="yuv444p")

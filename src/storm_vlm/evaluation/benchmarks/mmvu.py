"""MMVU's validation set: 625 multiple-choice questions (`mmvu`), and 375 open ones apart (`mmvu_open`)."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from storm_vlm.data.row import Row
from storm_vlm.evaluation.benchmarks import REASONING, Benchmark
from storm_vlm.evaluation.benchmarks.published import Entry, Hub, Videos, bare, index_of, lettered
from storm_vlm.evaluation.judge import equality_prompt

DISCIPLINES = {
    "Science": "Biology, Chemistry, Modern Physics, Astronomy, Geography, Materials Science, Neurobiology, "
    "Electromagnetism, Thermodynamics, Mechanics",
    "Engineering": "Civil Engineering, Electrical Engineering, Mechanical Engineering, Biomedical Engineering, "
    "Electronics and Communication, Computer Science",
    "Healthcare": "Clinical Medicine, Basic Medicine, Preventive Medicine, Pharmacy, Dentistry",
    "Humanities and Social Science": "Art, Literature, History, Law, Economics, Management",
}
_OF_SUBJECT = {
    subject: d for d, subjects in DISCIPLINES.items() for subject in subjects.split(", ")
}


class MMVU(Benchmark):
    name = "mmvu"
    title = "MMVU"
    table: ClassVar[str | None] = REASONING
    groups = ("discipline", "subject")
    hub = Hub("yale-nlp/MMVU", split="validation")
    files = ("validation*.json*", "validation*.parquet")
    KIND: ClassVar[str] = "multiple-choice"

    def row(self, published: Entry, videos: Videos, task: str, number: int) -> Row | None:
        """None for the other kind. Rationale and textbook stay behind; the subject is the metadata's."""
        if published["question_type"] != self.KIND:
            return None
        url = published.get("video_path") or published["video"]
        options: tuple[str, ...] = ()
        answer = published["answer"]
        if self.KIND == "multiple-choice":
            options = bare([v for _, v in sorted(published["choices"].items()) if v])
            answer = options[index_of(answer, options)]
        subject = published["metadata"]["subject"].replace("_", " ")
        discipline = _OF_SUBJECT.get(subject, "other")
        return Row(
            id=published["id"],
            video=videos.find("/".join(Path(url).parts[-2:])),  # Art/0.mp4: numbers repeat
            question=published["question"],
            options=options,
            answer=answer,
            split="test",
            meta={"discipline": discipline, "subject": subject, "published_video": url},
        )

    def official_prompt(self, row: Row) -> str:
        ending = (
            "Answer directly with the option letter from the given choices."
            if row.options
            else "Directly output the final short answer."
        )
        reasoning = "Do not generate any intermediate reasoning process. "
        options = lettered(row.options, "{}: {}")
        return f"\nQuestion: {row.question}\n{options}\n{reasoning}{ending}\n"

    def judge_prompt(self, text: str, row: Row) -> str:
        """Its authors ask about every answer."""
        return equality_prompt(row, text, lettered(row.options, "{}: {}"))


class MMVUOpen(MMVU):
    """The open questions."""

    name = "mmvu_open"
    title = "MMVU, open"
    table = None
    KIND = "open-ended"

"""Files in the layouts that authors publish: keys as they were seen where each docstring says, words of our own."""

import json
from pathlib import Path
from typing import Any

import pytest

from storm_vlm.data.row import Row, RowError
from storm_vlm.evaluation.benchmarks import BENCHMARKS


def put(path: Path, data: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data), encoding="utf-8")
    return path


def touch(path: Path) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return str(path)


def read(name: str, folder: Path) -> dict[str, Row]:
    return {row.id: row for row in BENCHMARKS[name]().read(folder)}


def test_tvbench_cuts_two_of_its_tasks_out_of_whole_films(tmp_path) -> None:
    """daniel-cores/tvbench c354322: `infer.ipynb` marks these two "has start & end", `vqa_dataset.py` cuts by them.

    No row of these tasks was seen whole; the six fields of time are those of MVBench's sister tasks.
    """
    asked = {"question": "When does he wave?", "candidates": ["At the beginning.", "At the end."]}
    times = {"start": 11.6, "end": 24.1, "accurate_start": 20.0, "accurate_end": 24.1}
    row = {**asked, "video": "clip1.mp4", "answer": "At the end.", **times}
    row |= {"video_length": 30.1, "question_id": None, "fps": None}
    for task in ("action_localization", "action_sequence", "object_count"):
        put(tmp_path / f"json/{task}.json", [row])
    put(tmp_path / "json/action_count.json", [row | {"start": None, "end": None}])
    windows = {r.meta["task"]: (r.start, r.end) for r in read("tvbench", tmp_path).values()}
    assert windows == {
        "action_localization": (11.6, 24.1),
        "action_sequence": (11.6, 24.1),
        "action_count": (None, None),
        "object_count": (None, None),
    }


def test_mvbench_keeps_a_row_whose_window_is_empty(tmp_path, caplog) -> None:
    """OpenGVLab/Ask-Anything issue 191: until 2024-06-11 one row of `object_interaction` began and ended at 7.5."""
    row = {"video": "a.mp4", "question": "Which?", "candidates": ["bed", "bag"], "answer": "bag"}
    rows = [row | {"start": 7.5, "end": 7.5}, row | {"start": 2.7, "end": 30.3}]
    put(tmp_path / "json/object_interaction.json", rows)
    touch(tmp_path / "video/star/Charades_v1_480/a.mp4")
    made = read("mvbench", tmp_path)
    assert [(r.start, r.end) for r in made.values()] == [(None, None), (2.7, 30.3)]
    assert "object_interaction-1: start and end are both 7.5" in caplog.text
    put(tmp_path / "json/object_interaction.json", [row | {"start": 9.0, "end": 7.5}])
    with pytest.raises(RowError, match="must be less than end"):
        read("mvbench", tmp_path)


def test_tempcompass_captions_have_their_question_in_the_multiple_choice_file(tmp_path) -> None:
    """llyx97/TempCompass e1b4631: all 2,004 captions have `question` and `answer` only; `eval_captioning.py` asks
    the judge the first question of the same video and dimension in `multi-choice.json`."""
    asked = "Write a caption.\nInformation A: {'action': 'run'}\nInformation B: {'action': 'wave'}"
    first = {"question": "What does he do?\nA. wave\nB. run", "answer": "B. run"}
    other = {"question": "Name it.\nA. run\nB. wave", "answer": "A. run"}
    questions = tmp_path / "questions"
    put(
        questions / "captioning.json",
        {"7": {"action": [{"question": asked, "answer": "A. run"}] * 2}},
    )
    put(questions / "multi-choice.json", {"7": {"action": [first, other]}})
    captions = read("tempcompass_captioning", tmp_path)
    assert list(captions) == ["captioning-7-action-0", "captioning-7-action-1"]
    assert {(row.question, row.answer) for row in captions.values()} == {(asked, "B. run")}
    assert len(read("tempcompass", tmp_path)) == 2


def test_tomato_is_read_from_its_repository(tmp_path) -> None:
    """yale-nlp/TOMATO fe2025f: six files in `data`, numbered from 0 each; videos in `videos/{demonstration_type}`."""
    entry = {
        "question": "How many squares does he draw?",
        "options": ["2", "1", "3"],
        "answer": 2,
        "key": "0209-03",
        "video_source_url": "",
        "motion_type": "count",
        "variation": {"counterfactual": 0, "composite": 0, "zoom": 1, "first_person": 0},
        "demonstration_type": "human",
        "note": "",
    }
    put(tmp_path / "data/count.json", {"0": entry, "1": entry | {"answer": 0}})
    trend = entry | {"motion_type": "shape&trend", "demonstration_type": "object"}
    put(tmp_path / "data/shape&trend.json", {"0": trend})
    clip = touch(tmp_path / "videos/human/0209-03.mp4")
    touch(tmp_path / "videos/simulated/0209-03.mp4")
    rows = read("tomato", tmp_path)
    assert list(rows) == ["count-0", "count-1", "shape&trend-0"]
    assert [row.answer for row in rows.values()] == ["3", "2", "3"]
    assert rows["count-0"].video == clip
    assert rows["shape&trend-0"].video == str(tmp_path / "object/0209-03.mp4")  # is missing
    assert rows["shape&trend-0"].meta["reason_type"] == "shape&trend"


def test_videomme_is_read_from_the_authors_nested_file(tmp_path) -> None:
    """BradyFU/Video-MME: 6fb9300 (all 2,700 questions, with addresses) and e9f6a2d (the keys of today, without)."""
    asked = {"question_id": "001-1", "task_type": "Counting Problem", "question": "How many?"}
    said = {"answer": "C", "response": "C. 3."}
    options = ["A. 1.", "B. 2.", "C. 3.", "D. 4."]
    early = {
        "video_id": "001",
        "duration_category": "short",
        "video_category": "Knowledge",
        "video_subcategory": "Geography",
        "url": "https://www.youtube.com/watch?v=AGCHk5_2skY",
        "questions": [{**asked, "choices": options, **said}],
    }
    put(tmp_path / "early/output_test_template.json", [early])
    clip = touch(tmp_path / "early/data/AGCHk5_2skY.mp4")
    (row,) = read("videomme", tmp_path / "early").values()
    assert (row.id, row.video, row.answer) == ("001-1", clip, "3.")
    groups = {"duration": "short", "domain": "Knowledge", "sub_category": "Geography"}
    assert row.meta == {**groups, "task_type": "Counting Problem", "published_options": options}
    late = {"video_id": "001", **groups, "questions": [{**asked, "options": options, **said}] * 2}
    late["questions"][1] = late["questions"][1] | {"question_id": "001-2"}
    put(tmp_path / "late/Video-MME.json", [late])
    assert [r.video for r in read("videomme", tmp_path / "late").values()] == [
        str(tmp_path / "late/data/001.mp4")
    ] * 2


@pytest.mark.parametrize("layout", ["repository", "download"])
def test_vsibench_sets_lie_side_by_side(tmp_path, layout) -> None:
    """nyu-visionx/VSI-Bench has `test.jsonl`, `test_debiased.parquet` and `test_pruned.parquet`, as scripts of users
    name them; lmms-eval 75571cf knows the configs "full" and "debiased". The files themselves were not seen."""
    row = {"dataset": "scannet", "scene_name": "s", "question": "How many?", "ground_truth": "4"}
    row |= {"question_type": "object_counting", "options": None}
    ids = {"vsibench": [0, 1, 2], "vsibench_debiased": [0, 1], "vsibench_pruned": [2]}
    for name, kept in ids.items():
        file = name.replace("vsibench", "test") + ".jsonl"
        if layout == "download" and (hub := BENCHMARKS[name].hub):
            (file,) = hub.downloads
        lines = "".join(json.dumps(row | {"id": id}) + "\n" for id in kept)
        (tmp_path / file).write_text(lines)
    assert {name: [int(id) for id in read(name, tmp_path)] for name in ids} == ids

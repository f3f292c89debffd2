"""Files in the layouts that authors publish: keys as they were seen where each docstring says, words of our own."""

import io
import json
from pathlib import Path
from typing import Any

import pytest

from storm_vlm.data.answer import is_correct
from storm_vlm.data.moment import parse_moment
from storm_vlm.data.row import Row, RowError
from storm_vlm.datasets.parse import unwrapped
from storm_vlm.evaluation.benchmarks import BENCHMARKS
from storm_vlm.evaluation.records import Record
from storm_vlm.evaluation.shares import answer_shares


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


def test_futurebench_shows_the_first_part_and_never_the_whole_film(tmp_path) -> None:
    """sail-sg/Video-Next-Event-Prediction fb9b315 and OpenGVLab/Future-L1 a91add2, tasks/futurebench/utils.py.

    The loaders were seen, no row of `futurebench.json`.
    """
    options = {"A": "It rains", "B": "It stops", "C": "He falls", "D": "She sings"}
    asked = {"Question": "What happens next?", "Options": options, "Answer": "B"}
    listed = "What happens next? A) It rains B) It stops\nC) He falls D) She sings"
    row = {"id": "f1", "video_path": "./video_dataset/yt/x.mp4", "question_type": "hop2"}
    second = row | {"id": "f2", "qa": {**asked, "Question": listed}}
    put(tmp_path / "futurebench.json", [row | {"qa": asked}, second])
    touch(tmp_path / "video_dataset/yt/x.mp4")
    touch(tmp_path / "second_part_video/yt/x.mp4")
    first = tmp_path / "first_part_video/yt/x.mp4"
    assert {r.video for r in read("futurebench", tmp_path).values()} == {str(first)}  # missing
    touch(first)
    one, two = read("futurebench", tmp_path).values()
    assert one.video == two.video == str(first)
    assert one.question == two.question == "What happens next?" and one.answer == "It stops"
    (tmp_path / "elsewhere/yt").mkdir(parents=True)
    first.rename(tmp_path / "elsewhere/yt/x.mp4")  # of it nobody knows which part it is
    assert read("futurebench", tmp_path)["f1"].video == str(first)
    bench, ending = BENCHMARKS["futurebench"](), "Answer with the option's letter from the given "
    lines = "A. It rains\nB. It stops\nC. He falls\nD. She sings"
    assert (
        bench.official_prompt(one) == f"\nWhat happens next?\n{lines}\n\n{ending}choices directly."
    )
    assert bench.official_prompt(two) == f"\n{listed}\n\n{ending}choices directly."
    said = {"B": 1, "The answer is B": 1, "Based on it, C": 1, "A man stops": 0, "none": 0}
    assert {text: bench.official_score(text, one) for text in said} == said


def test_twiffbench_asks_with_its_pictures_and_not_with_the_future(tmp_path) -> None:
    """LiuJunhua02/TwiFF e25c415 and OpenGVLab/Future-L1 a91add2, tasks/twiffbench (columns, four files).

    The loaders were seen, no row.
    """
    parquet, arrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    from PIL import Image

    from storm_vlm.data.video import read_video

    def picture(colour: str) -> dict[str, Any]:
        file = io.BytesIO()
        Image.new("RGB", (64, 48), colour).save(file, "PNG")
        return {"bytes": file.getvalue(), "path": None}

    row = {
        "video": "clips/a.mp4",
        "question": "frame_1\n<image>\nframe_3\n<image>\nWhat next?",
        "answer": "It is hot.\n<rimage>\nOil.\n<ans>An egg\nis fried.</ans>",
        "question_images": [picture("red"), picture("blue")],
        "reasoning_images": [picture("lime")],
        "question_images_index": [1, 3],
        "reasoning_images_index": [6],
    }
    for shard in range(2):
        table = arrow.Table.from_pylist([row])
        parquet.write_table(table, tmp_path / f"test-0000{shard}-of-00002.parquet")
    rows = read("twiffbench", tmp_path)
    assert list(rows) == ["test-00000-of-00002-1", "test-00001-of-00002-1"]
    one = rows["test-00000-of-00002-1"]
    assert (one.question, one.answer) == ("What next?", "An egg\nis fried.")
    clip = read_video(one.video, 4)
    red, green, blue = clip.frames.mean((1, 2)).T > 200
    assert (red.tolist(), blue.tolist()) == ([True, True, False, False], [False, False, True, True])
    assert not green.any()
    written = Path(one.video).stat().st_mtime_ns
    assert read("twiffbench", tmp_path) == rows and Path(one.video).stat().st_mtime_ns == written
    bench = BENCHMARKS["twiffbench"]()
    assert "\n\nframe_1\nframe_3\nWhat next?\n\nReason step" in bench.official_prompt(one)
    assert bench.official_score("An egg is fried.", one) is None  # a judge's


LVBENCH = {
    "video_path": "Cm73ma6Ibcs.mp4",
    "uid": "55",
    "question": "What year is on the caption?\n(A) 1636\n(B) 1366\n(C) 1363\n(D) 1633",
    "question_type": ["key information retrieval"],
    "answer": "D",
    "time_reference": "00:15-00:19",
    "type": "cartoon",
    "key": "Cm73ma6Ibcs",
}


@pytest.mark.parametrize("layout", ["lmms-eval", "authors"])
def test_lvbench(tmp_path, layout) -> None:
    """THUDM/LVBench f998d95 (`scripts`, `lvbench/utils/answer_util.py`) and lmms-eval 75571cf tasks/lvbench.

    The keys are those of one real row, as Philip-2000/MyLm quotes it.
    """
    if layout == "authors":
        video = {name: LVBENCH[name] for name in ("key", "type")}
        asked = {name: v for name, v in LVBENCH.items() if name not in (*video, "video_path")}
        line = json.dumps({**video, "qa": [asked, asked | {"uid": "56"}], "video_info": {}})
        (tmp_path / "video_info.meta.jsonl").write_text(line + "\n")
    else:
        put(tmp_path / "lvbench.json", [LVBENCH, LVBENCH | {"uid": "56"}])
    clip = touch(tmp_path / "all_videos/Cm73ma6Ibcs.mp4")
    rows = read("lvbench", tmp_path)
    assert list(rows) == ["55", "56"] and "00:15" not in rows["55"].model_dump_json()
    row, bench = rows["55"], BENCHMARKS["lvbench"]()
    assert (row.video, row.options, row.answer) == (clip, ("1636", "1366", "1363", "1633"), "1633")
    assert bench.official_prompt(row).endswith(
        "\n(D) 1633\nAnswer the question with the option letter"
    )
    said = {"(D) 1633": 1, "The answer is (D)": 1, "D": 1, "Death": 1, "The answer is D": 0, "": 0}
    assert {text: bench.official_score(text, row) for text in said} == said


def test_videomme_v2(tmp_path) -> None:
    """MME-Benchmarks/Video-MME-v2 013b6c9 evaluation/test_video_mme_v2.py and lmms-eval 75571cf tasks/videomme_v2.

    The columns are those that both read, the question's form is the README's; no row was seen.
    """
    listed = "\n".join(f"{x}. {i}." for i, x in enumerate("ABCDEFGH"))
    row = {"video_id": "001", "question": "How many?", "options": listed, "answer": "H"}
    row |= {"group_type": "logic", "group_structure": "[1,[2,3],4]", "level": None}
    row |= {"second_head": "Order", "third_head": None}
    rows = [row | {"question_id": f"001-{i}"} for i in range(1, 5)]
    put(tmp_path / "Video-MME-v2.json", rows)
    clip = touch(tmp_path / "videos/001.mp4")
    one = read("videomme_v2", tmp_path)["001-1"]
    assert one.video == clip and one.answer == "7." and len(one.options) == 8
    assert {name: one.meta.get(name) for name in ("level", "second_head", "group_structure")} == {
        "level": None,
        "second_head": "Order",
        "group_structure": "[1,[2,3],4]",
    }
    bench = BENCHMARKS["videomme_v2"]()
    assert bench.official_prompt(one).startswith("Question: How many?\nA. 0.\nB. 1.")
    said = {"H": 1, "Final Answer: H": 1, "The best option is H": 1, "A man, so H": 0, "none": 0}
    assert {text: bench.official_score(text, one) for text in said} == said


@pytest.mark.parametrize(
    ("structure", "right", "sixteenths"),
    [
        ("4", "0101", 4),
        ("4", "1111", 16),
        ("[1,2,3,4]", "0111", 0),
        ("[1,2,3,4]", "1101", 4),
        ("[1, 2, 3, 4]", "1111", 16),
        ("[1,[2,3],4]", "1011", 16 * 4 / 12),
        ("[1,[2,3],4]", "1110", 16 * 7 / 12),
        ("[[1,2],3,4]", "0111", 16 * 1 / 10),
        ("[[1,2],3,4]", "1110", 16 * 5 / 10),
        ("[[1,2],3,4]", "0011", 0),
    ],
)
def test_four_answers_of_videomme_v2_earn_together(structure, right, sixteenths) -> None:
    """As `cal_relevance` and `cal_logic` of MME-Benchmarks/Video-MME-v2 013b6c9 gave, run on all 64 cases."""
    from storm_vlm.evaluation.benchmarks.videomme_v2 import group_score

    assert group_score([x == "1" for x in right], structure) == pytest.approx(sixteenths / 16)


def test_videomme_v2_has_the_mean_of_its_groups() -> None:
    def record(video: str, number: int, structure: str) -> Record:
        groups = {"group_structure": structure}
        return Record(f"{video}-{number}", video, groups, "", (), None, False, False)

    records = [record("001", i, "[1,2,3,4]") for i in (2, 1, 3, 4)]
    records += [record("002", i, "4") for i in (1, 2, 3, 4)]
    bench = BENCHMARKS["videomme_v2"]()
    assert bench.official_figure([1, 0, 1, 1, 1, 1, 0, 0], records) == (0 + 4 / 16) / 2
    assert bench.official_figure([0, 1, 1, 1, 1, 1, 1, 1], records) == (1 / 16 + 1) / 2
    assert bench.official_figure([1, 0, 1], records[:3]) == pytest.approx(2 / 3)


@pytest.mark.parametrize("layout", ["lmms-eval", "authors"])
def test_charades_sta(tmp_path, layout) -> None:
    """lmms-eval 75571cf tasks/charades_sta (video, caption, timestamp); the authors' lines, of which one was seen."""
    if layout == "authors":
        line = "3MSZA 24.3 30.4##person turn a light on.\n"
        (tmp_path / "charades_sta_test.txt").write_text(line)
    else:
        row = {
            "video": "3MSZA.mp4",
            "caption": "person turn a light on.",
            "timestamp": [24.3, 30.4],
        }
        put(tmp_path / "temporal_grounding_charades.json", [row])
    clip = touch(tmp_path / "Charades_v1_480/3MSZA.mp4")
    (row,) = read("charades_sta", tmp_path).values()
    assert (row.video, row.meta["moment"], row.answer) == (clip, [24.3, 30.4], "24.3 - 30.4")
    bench = BENCHMARKS["charades_sta"]()
    assert "sentence: person turn a light on.. Please return" in bench.official_prompt(row)
    assert is_correct("24.3 - 30.4", row) and is_correct("from 25 to 30 seconds", row)
    assert is_correct("3 - 9", row) is False and is_correct("at night", row) is None


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("The event happens in the 24.3 - 30.4 seconds.", 1),
        ("24.3 to 30.4", 1),
        ("The event happens in 30.4 - 24.3", 1),
        ("00:24 - 00:30", 5.7 / 6.4),
        ("It starts at 0:24\nand ends at 0:30", 5.7 / 6.4),
        ("Start time: 24.3 seconds.\nEnd time: 30.4 seconds.", 1),
        ("It starts at 24.3 and ends at 30.4.", 0),  # of a sentence the first number alone is read
        ("A light. 1 - 2\nIt happens in 24.3 - 30.4", 1),
        ("no", 0),
    ],
)
def test_lmms_evals_rule_for_moments(text, share) -> None:
    """As lmms-eval 75571cf's `extract_time` and `iou` gave on these texts."""
    row = Row(id="a", video="v", question="q", answer="24.3 - 30.4", split="test")
    assert BENCHMARKS["charades_sta"]().official_score(text, row) == pytest.approx(share)


@pytest.mark.parametrize(
    ("text", "moment"),
    [
        ("2.0 - 3.5", (2, 3.5)),
        ("From 2 s to 3.5 seconds.", (2, 3.5)),
        ("between 0:02 and 1:03.5", (2, 63.5)),
        ("1:00:02\u20131:00:04", (3602, 3604)),
        ("It starts at 2.0 and ends at 3.5.", (2, 3.5)),
        ("<think>1 - 2</think><answer>2 - 3.5</answer>", (2, 3.5)),
        ("3.5 - 2", None),
        ("at 2 seconds", None),
        ("at 2, at 3 and at 4", None),
        ("", None),
    ],
)
def test_a_moment_is_read_from_text(text, moment) -> None:
    gold = {"moment": [2, 3.5]}
    row = Row(id="a", video="v", question="q", answer="2 - 3.5", meta=gold, split="test")
    assert parse_moment(unwrapped(text)) == moment
    assert is_correct(text, row) == (None if moment is None else moment == (2, 3.5))


def test_open_answers_and_moments_have_shares() -> None:
    open_row = Row(id="a", video="v", question="q", answer="The red ball.", split="test")
    assert answer_shares("a red ball rolls", open_row) == {"F1": pytest.approx(0.8)}
    assert answer_shares("no idea", open_row) == {"F1": 0}
    found = open_row.model_copy(update={"meta": {"moment": [0.0, 4.0]}})
    assert answer_shares("2 - 6", found) == {"IoU": pytest.approx(1 / 3)}
    assert answer_shares("soon", found) == {"IoU": 0}
    chosen = open_row.model_copy(update={"options": ("The red ball.", "x")})
    assert answer_shares("A", chosen) == {}

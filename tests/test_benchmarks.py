"""Benchmarks in the form in which they are published, quirks included. All rows are ours."""

import json
import unicodedata
from pathlib import Path
from typing import Any

import pytest

from storm_vlm.data.answer import is_correct
from storm_vlm.data.json_objects import JSONError
from storm_vlm.data.prompt import answer_text, build_messages
from storm_vlm.data.row import RowError
from storm_vlm.datasets.leaks import names
from storm_vlm.errors import InputError
from storm_vlm.evaluation.benchmarks import BENCHMARKS
from storm_vlm.evaluation.benchmarks.published import Hub, Videos, bare

VIDEOMME = {
    "video_id": "001",
    "duration": "short",
    "domain": "Knowledge",
    "sub_category": "Humanity & History",
    "url": "https://example.org/watch?v=fFjv93ACGo8",
    "videoID": "fFjv93ACGo8",
    "question_id": "001-1",
    "task_type": "Counting Problem",
    "question": "Which of these hang on the tree?",
    "options": ["A. Apples.", "B. Candles.", "C. Berries.", "D. All three."],
    "answer": "C",
}
MMVU = {
    "id": "validation_0",
    "video": "https://example.org/resolve/main/videos/Art/0.mp4",
    "youtube_url": "https://example.org/0",
    "question_type": "multiple-choice",
    "metadata": {"subject": "Economics", "textbook": "T", "knowledge": ["K"], "rationale": "R"},
    "question": "Which market is drawn?",
    "choices": {"A": "Monopoly", "B": "Oligopoly", "C": "Perfect", "D": "Gift", "E": "None"},
    "answer": "B",
}
HOLMES = {
    "video ID": "dGS48Kcax5k",
    "Question ID": 1,
    "Question Type": "SR",
    "Question": "What are the two to each other?",
    "Options": {"A": "Colleagues", "B": "Twins", "C": "Rivals", "D": "Strangers", "E": "Friends"},
    "Answer": "D",
    "Explanation": "At 02:26 they meet.",
}


def put(path: Path, data: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        parquet.write_table(arrow.Table.from_pylist(data), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in data))
    else:
        path.write_text(json.dumps(data))
    return path


def touch(path: Path) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return str(path)


def official(name: str, row: Any, text: str) -> float | None:
    return BENCHMARKS[name]().official_score(text, row)


@pytest.mark.parametrize("file", ["videomme/test-00000-of-00001.parquet", "Video-MME.json"])
def test_videomme(tmp_path, file) -> None:
    put(tmp_path / file, [VIDEOMME, {**VIDEOMME, "question_id": "001-2", "answer": "D"}])
    clip = touch(tmp_path / "data" / "fFjv93ACGo8.MP4")
    rows = BENCHMARKS["videomme"]().read(tmp_path)
    assert [row.id for row in rows] == ["001-1", "001-2"]
    row = rows[0]
    assert row.video == clip
    assert row.options == ("Apples.", "Candles.", "Berries.", "All three.")
    assert row.answer == "Berries." and answer_text(row) == "C" and row.split == "test"
    assert {k: row.meta[k] for k in BENCHMARKS["videomme"]().groups} == {
        "duration": "short",
        "domain": "Knowledge",
        "task_type": "Counting Problem",
    }
    assert row.meta["published_options"][0] == "A. Apples."
    prompt = BENCHMARKS["videomme"]().official_prompt(row)
    assert "\nA. Apples.\nB. Candles.\n" in prompt and prompt.endswith("\nThe best answer is:")
    assert "subtitles" not in prompt
    assert "A. Apples." in build_messages(row.question, row.options)[0]["content"][-1]["text"]


def test_mvbench_tells_apart_sources_and_cut_clips(tmp_path) -> None:
    asked = {"question": "What moves?", "candidates": ["a cube", "a ball"], "answer": "a ball"}
    timed = {**asked, "video": "ZS9XR.mp4", "start": 11.1, "end": 18.6}
    put(tmp_path / "json/moving_count.json", [{**asked, "video": "video_1.mp4"}])
    put(tmp_path / "json/action_count.json", [{**asked, "video": "video_1.mp4"}])
    put(tmp_path / "json/action_sequence.json", [timed])
    put(tmp_path / "json/action_antonym.json", [{**asked, "video": "166.webm"}])
    put(tmp_path / "json/extra.json", [{"not": "a task"}])
    clevrer = touch(tmp_path / "video/clevrer/video_validation/video_1.mp4")
    antonym = touch(tmp_path / "video/ssv2_video_mp4/166.mp4")  # converted
    whole = touch(tmp_path / "video/star/Charades_v1_480/ZS9XR.mp4")
    mvbench = BENCHMARKS["mvbench"]()
    rows = {row.meta["task"]: row for row in mvbench.read(tmp_path)}
    assert rows["moving_count"].video == clevrer and rows["moving_count"].answer == "a ball"
    # The clip of the same name is another source's: missing, not mistaken.
    expected = tmp_path / "perception/videos/video_1.mp4"
    assert rows["action_count"].video == str(expected)
    assert rows["action_antonym"].video == antonym
    assert (rows["action_sequence"].video, rows["action_sequence"].start) == (whole, 11.1)
    cut = touch(tmp_path / "video/star/Charades_segment/ZS9XR.mp4")
    row = {row.meta["task"]: row for row in mvbench.read(tmp_path)}["action_sequence"]
    assert (row.video, row.start, row.end) == (cut, None, None)
    prompt = mvbench.official_prompt(row)
    assert prompt.startswith("Carefully watch the video") and "(A) a cube\n(B) a ball\n" in prompt


def test_configs_of_parquet_and_equal_candidates(tmp_path) -> None:
    row = {"video": "1.mp4", "question": "Q?", "candidates": ["2", "2", "3"], "answer": "3"}
    put(tmp_path / "object_shuffle/train-00000-of-00001.parquet", [row])
    put(tmp_path / "fetched/questions-action_count.jsonl", [row])
    (fetched,) = BENCHMARKS["mvbench"]().read(tmp_path / "fetched")
    assert fetched.id == "action_count-1"
    (tmp_path / "fetched/questions-action_count.jsonl").unlink()
    (read,) = BENCHMARKS["mvbench"]().read(tmp_path)
    assert read.meta["task"] == "object_shuffle" and read.id == "object_shuffle-1"
    assert read.options == ("2 [A]", "2 [B]", "3") and read.answer == "3"
    assert read.meta["published_options"] == ["2", "2", "3"]


def test_tvbench_finds_its_tasks_folder(tmp_path) -> None:
    row = {"video": "1.mp4", "question": "Q?", "candidates": ["No", "Yes"], "answer": "Yes"}
    put(tmp_path / "json/object_count.json", [row])
    touch(tmp_path / "video/scene_transition/1.mp4")
    clip = touch(tmp_path / "video/object_count/1.mp4")
    (read,) = BENCHMARKS["tvbench"]().read(tmp_path)
    assert read.video == clip and read.answer == "Yes"
    assert official("tvbench", read, "a yes") == 0 and official("tvbench", read, "B.") == 1


def tempcompass_files(folder: Path) -> None:
    what = "What is he doing?\nA. dunking\nB. sitting"
    put(
        folder / "questions/multi-choice.json",
        {"1034": {"action": [{"question": what, "answer": "A. dunking"}]}},
    )
    put(
        folder / "questions/yes_no.json",
        {"1034_reverse": {"order": [{"question": "Is he sitting?", "answer": "no"}] * 2}},
    )
    match = "Which caption matches?\nOption 1: He sits.\nOption 2: He jumps."
    put(
        folder / "questions/caption_matching.json",
        {"1034": {"speed": [{"question": match, "answer": "Option 2: He jumps."}]}},
    )
    caption = {"question": "Describe it.", "answer": "A. dunking"}
    put(folder / "questions/captioning.json", {"1034": {"action": [caption]}})


def test_tempcompass_has_four_tasks_of_which_three_are_matched(tmp_path) -> None:
    tempcompass_files(tmp_path)
    clip = touch(tmp_path / "videos/1034.mp4")
    tempcompass = BENCHMARKS["tempcompass"]()
    rows = {row.meta["task"]: row for row in tempcompass.read(tmp_path)}
    assert set(rows) == {"multi-choice", "yes_no", "caption_matching"}
    assert len(tempcompass.read(tmp_path)) == 4
    choice, yes_no, match = rows["multi-choice"], rows["yes_no"], rows["caption_matching"]
    assert (choice.question, choice.options) == ("What is he doing?", ("dunking", "sitting"))
    assert choice.video == clip and choice.meta["dim"] == "action"
    assert yes_no.options == ("yes", "no") and yes_no.answer == "no"
    assert yes_no.video == str(tmp_path / "videos/1034_reverse.mp4")
    assert match.options == ("He sits.", "He jumps.") and match.answer == "He jumps."
    assert tempcompass.official_prompt(yes_no) == "Is he sitting?\nPlease answer yes or no:"
    assert "\nOption 2: He jumps.\nPlease directly give the" in tempcompass.official_prompt(match)
    # One strict scorer, whichever prompt was used.
    assert (
        is_correct("A", choice) and is_correct("A. dunking", choice) and is_correct("No.", yes_no)
    )
    assert is_correct("Option 2: He jumps.", match) and is_correct("Option 2", match)
    assert is_correct("Option 1", match) is False and is_correct("Not sure", yes_no) is None


@pytest.mark.parametrize(
    ("task", "text", "score"),
    [
        ("yes_no", "Not sure", 1),
        ("yes_no", "None of these", 1),
        ("yes_no", "Now the man", 1),
        ("yes_no", "Yes.", 0),
        ("yes_no", "<answer>no</answer>", None),
        ("multi-choice", "A", 1),
        ("multi-choice", "A) because", 1),
        ("multi-choice", "B. sitting", 0),
        ("multi-choice", "A. dunking", 1),
        ("multi-choice", "(A)", None),
        ("multi-choice", "The answer is A", None),
        ("caption_matching", "Option 2", 1),
        ("caption_matching", "2.", 1),
        ("caption_matching", "He jumps.", 1),
        ("caption_matching", "1) He jumps.", 1),
        ("caption_matching", "Option 1: He sits.", 0),
        ("caption_matching", "(2)", None),
        ("caption_matching", "The best option is Option 2", None),
    ],
)
def test_tempcompass_rules(tmp_path, task, text, score) -> None:
    tempcompass_files(tmp_path)
    rows = {row.meta["task"]: row for row in BENCHMARKS["tempcompass"]().read(tmp_path)}
    assert official("tempcompass", rows[task], text) == score


def test_tempcompass_captions_need_a_judge_and_labels_may_be_letters(tmp_path) -> None:
    tempcompass_files(tmp_path)
    (caption,) = BENCHMARKS["tempcompass_captioning"]().read(tmp_path)
    assert caption.options == () and caption.answer == "A. dunking"
    assert official("tempcompass_captioning", caption, "A. dunking") is None
    hub = {"video_id": "7", "dim": "order", "answer": "Sentence B: It rises."}
    hub["question"] = "Which?\nSentence A: It falls.\nSentence B: It rises."
    put(tmp_path / "hub/caption_matching/test-0.parquet", [hub])
    (row,) = BENCHMARKS["tempcompass"]().read(tmp_path / "hub")
    assert row.options == ("It falls.", "It rises.") and is_correct("sentence b", row)
    assert official("tempcompass", row, "B") == 1 and official("tempcompass", row, "A") == 0


@pytest.mark.parametrize("file", ["bench_hard.json", "bench_final.json"])
def test_videoespresso(tmp_path, file) -> None:
    published = {
        "core_frames_paths": ["c.jpg"],
        "core_frames_captions": ["SECRET"],
        "question": "Why does he run?",
        "answer": "SECRET",
        "key items": {},
        "evidence": "SECRET",
        "task": "Causal Inference",
        "correct_answer": "(B)",
        "video_path": "sets/one/clip.mp4",
        "options": ["(A): Rain", "(B): A dog", "(C): Late", "(D): Fun"],
    }
    put(tmp_path / file, [published])
    clip = touch(tmp_path / "sets/one/clip.mkv")
    touch(tmp_path / "sets/two/clip.mkv")
    (row,) = BENCHMARKS["videoespresso"]().read(tmp_path)
    assert row.video == clip and row.answer == "A dog" and row.options[0] == "Rain"
    assert "SECRET" not in row.model_dump_json()
    prompt = BENCHMARKS["videoespresso"]().official_prompt(row)
    assert prompt.startswith("Please finish the Causal Inference task. Question: Why does he run?.")
    assert prompt.endswith(
        "options: \n(A) Rain\n(B) A dog\n(C) Late\n(D) Fun\n. Select the answer and only give the option letters."
    )
    assert official("videoespresso", row, "Based on the video, C") == 1  # its B, of "Based"
    assert is_correct("Based on the video, C", row) is False


def test_video_holmes_leaves_out_absent_options(tmp_path) -> None:
    struct = {**HOLMES, "Options": {**HOLMES["Options"], "F": None}, "Question ID": 2}
    put(tmp_path / "test_Video-Holmes.json", [HOLMES, struct])
    put(tmp_path / "train_Video-Holmes.json", [HOLMES] * 3)
    clip = touch(tmp_path / "Benchmark/videos/dGS48Kcax5k.mp4")
    rows = BENCHMARKS["video_holmes"]().read(tmp_path)
    assert [row.id for row in rows] == ["dGS48Kcax5k-1", "dGS48Kcax5k-2"]
    assert all(len(row.options) == 5 and row.answer == "Strangers" for row in rows)
    assert rows[0].video == clip and rows[0].meta["question_type"] == "SR"
    assert "Explanation" not in rows[0].model_dump_json()
    cropped = touch(tmp_path / "videos_cropped/dGS48Kcax5k.mp4")
    assert BENCHMARKS["video_holmes"]().read(tmp_path)[0].video == cropped
    prompt = BENCHMARKS["video_holmes"]().official_prompt(rows[1])
    assert "A: Colleagues, B: Twins" in prompt and "None" not in prompt
    gap = {**HOLMES, "Options": {"A": "x", "C": "y"}, "Answer": "C"}
    put(tmp_path / "test_Video-Holmes.json", [gap])
    with pytest.raises(RowError, match="row 1: Options: letters A, C have a gap"):
        BENCHMARKS["video_holmes"]().read(tmp_path)


def test_mmvu_keeps_open_questions_apart(tmp_path) -> None:
    open_ended = {
        **MMVU,
        "id": "validation_1",
        "question_type": "open-ended",
        "choices": dict.fromkeys("ABCDE", ""),
        "answer": "Dolly Zoom",
        "video_path": "videos/Art/0.mp4",
        "metadata": {"subject": "Computer_Science", "rationale": "SECRET"},
    }
    put(tmp_path / "validation.json", [MMVU, open_ended])
    clip = touch(tmp_path / "videos/Art/0.mp4")
    touch(tmp_path / "videos/Law/0.mp4")
    (choice,) = BENCHMARKS["mmvu"]().read(tmp_path)
    (free,) = BENCHMARKS["mmvu_open"]().read(tmp_path)
    assert choice.video == free.video == clip
    assert choice.answer == "Oligopoly" and free.options == () and free.answer == "Dolly Zoom"
    # By the metadata's subject, not by the folder.
    assert choice.meta["discipline"] == "Humanities and Social Science"
    assert free.meta["discipline"] == "Engineering" and "SECRET" not in free.model_dump_json()
    assert "A: Monopoly\nB: Oligopoly\n" in BENCHMARKS["mmvu"]().official_prompt(choice)
    assert BENCHMARKS["mmvu_open"]().official_prompt(free).endswith("the final short answer.\n")
    for text in ("", "o", "zoom", "not a Dolly Zoom"):
        assert official("mmvu_open", free, text) == 1 and not is_correct(text, free)
    assert official("mmvu_open", free, "a tracking shot") is None  # a judge's


def test_tomato_answers_are_indices_and_vsi_numbers_are_graded(tmp_path) -> None:
    tomato = {"id": 7, "question": "Which way?", "options": ["Left", "Right"], "answer": 1}
    tomato |= {"video_path": "object/1.mp4", "reason_type": "rotation", "demonstration_type": "o"}
    put(tmp_path / "t/test-0.parquet", [tomato])
    (row,) = BENCHMARKS["tomato"]().read(tmp_path / "t")
    assert row.answer == "Right" and row.id == "7"
    assert (
        official("tomato", row, "B") == 1 and official("tomato", row, "no idea") is None
    )  # a judge's
    assert "externel knowledge or commonsense. \n\n<question> \nWhich way? \n" in BENCHMARKS[
        "tomato"
    ]().official_prompt(row)
    vsi = {"id": 1, "dataset": "scannet", "scene_name": "scene0"}
    near = {"question": "Nearer?", "options": ["A. bed", "B. sofa"], "ground_truth": "B"}
    chairs = {"question": "How many?", "options": None, "ground_truth": "4"}
    put(
        tmp_path / "v/test.jsonl",
        [
            {**vsi, **near, "question_type": "object_rel_direction_easy"},
            {**vsi, **chairs, "question_type": "object_counting", "id": 2},
        ],
    )
    clip = touch(tmp_path / "v/scannet/scene0.mp4")
    choice, number = BENCHMARKS["vsibench"]().read(tmp_path / "v")
    assert choice.video == number.video == clip
    assert (choice.meta["kind"], choice.answer) == ("object_rel_direction", "sofa")
    assert official("vsibench", choice, "b. sofa") == 1 and official("vsibench", choice, "(B)") == 0
    scores = {"4": 1, "There are four chairs": 0, "3": 0.6, "24": 0, "many": 0}
    assert {text: official("vsibench", number, text) for text in scores} == scores


@pytest.mark.parametrize("name", list(BENCHMARKS))
def test_a_folder_without_the_files_says_what_to_download(tmp_path, name) -> None:
    hub = BENCHMARKS[name]().hub
    assert hub is not None
    with pytest.raises(OSError, match=f"download the data set {hub.repository}"):
        BENCHMARKS[name]().read(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer": "E"}, "row 2: answer: 'E' is none of the 4 options"),
        ({"answer": "Because"}, "none of the 4 options"),
        ({"question": " "}, "row 2: question: "),
        ({"question": None}, "row 2: question: "),
        ({"options": None}, "row 2: "),
        ({"question_id": "001-1"}, "row 2: id: '001-1' is taken"),
        ("videoID", "row 2: videoID: missing"),
    ],
)
def test_a_row_that_does_not_fit_is_named(tmp_path, change, message) -> None:
    broken: dict[str, Any] = {**VIDEOMME, "question_id": "001-2"}
    if isinstance(change, str):
        del broken[change]
    else:
        broken |= change
    file = put(tmp_path / "videomme.json", [VIDEOMME, broken])
    with pytest.raises(RowError, match=message) as caught:
        BENCHMARKS["videomme"]().read(tmp_path)
    assert str(file) in str(caught.value)
    for content, said in (
        (b"[{", "not JSON"),
        (b'["\xe9"]', "not UTF-8 text"),
        (b"[" * 200_000, "not JSON"),
    ):
        file.write_bytes(content)
        with pytest.raises(JSONError, match=rf"videomme\.json.*{said}"):
            BENCHMARKS["videomme"]().read(tmp_path)


def test_a_damaged_parquet_file_is_named(tmp_path) -> None:
    pytest.importorskip("pyarrow")
    file = put(tmp_path / "videomme/test-00000-of-00001.parquet", [VIDEOMME])
    for content in (b"", b"PAR1", file.read_bytes()[:-9]):
        file.write_bytes(content)
        with pytest.raises(InputError, match=r"test-00000-of-00001\.parquet: not whole parquet"):
            BENCHMARKS["videomme"]().read(tmp_path)


def test_a_name_is_found_in_either_form_of_its_accents(tmp_path) -> None:
    composed, apart = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    clip = touch(tmp_path / f"{apart}.mp4")
    assert Path(Videos(tmp_path).find(composed)).samefile(clip)
    assert names(f"a/{composed}.mp4") == names(f"b/{apart}.mkv")


def test_videos_are_found_at_any_depth_with_any_suffix(tmp_path) -> None:
    clip = touch(tmp_path / "a/b/one.webm")
    dotted = touch(tmp_path / "a/v1.5.take.mkv")
    touch(tmp_path / "a/one.txt")
    touch(tmp_path / "x/two.mp4")
    touch(tmp_path / "y/two.mp4")
    (tmp_path / "linked").symlink_to(tmp_path / "a", target_is_directory=True)
    (tmp_path / "a/b/round").symlink_to(tmp_path, target_is_directory=True)
    videos = Videos(tmp_path)
    assert Path(Videos(tmp_path / "linked").find("one", elsewhere=("linked",))).samefile(clip)
    for name in ("one", "one.mp4", "b/one.mp4", "./b/one.webm"):
        assert Path(videos.find(name)).samefile(clip)
    assert Path(videos.find("v1.5.take")).samefile(dotted)
    assert videos.find("gone/one") == str(tmp_path / "gone/one.mp4")  # another video, missing
    assert videos.find("y/two.mp4") == str(tmp_path / "y/two.mp4")
    assert videos.find("two", ("y", "x")) == str(tmp_path / "y/two.mp4")
    with pytest.raises(ValueError, match="is there twice"):
        videos.find("two")
    assert videos.find("none", ("data",)) == str(tmp_path / "data/none.mp4")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["A. red", "B. blue"], ("red", "blue")),
        (["(A) red", "(B) blue"], ("red", "blue")),
        (["(A): red", "(B): blue"], ("red", "blue")),
        (["A) red", "B) blue"], ("red", "blue")),
        (["A: red", "B: blue"], ("red", "blue")),
        (["A red car", "B-side"], ("A red car", "B-side")),
        (["B. red", "A. blue"], ("B. red", "A. blue")),
        (["A. red", "blue"], ("A. red", "blue")),
        (["A.", "B."], ("A.", "B.")),
        (["A. 3.5", "B. 3.5", "C. 4"], ("3.5 [A]", "3.5 [B]", "4")),
    ],
)
def test_letters_before_options_are_removed_only_if_they_are_letters(options, expected) -> None:
    assert bare(options) == expected


def test_download_writes_what_read_reads(tmp_path, monkeypatch) -> None:
    """The hub's place is taken by a local data set of the same layout, read by the same library."""
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    put(tmp_path / "hub/videomme/test-00000-of-00001.parquet", [VIDEOMME])
    hub = Hub(str(tmp_path / "hub/videomme"))
    (written,) = hub.download(tmp_path / "local")
    assert written.name == "questions-test.jsonl"
    (row,) = BENCHMARKS["videomme"]().read(tmp_path / "local")
    assert (row.answer, row.meta["domain"]) == ("Berries.", "Knowledge")

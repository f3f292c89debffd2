"""Importers on rows in the published layouts, written by us; export and back; the prompt is ours to the letter."""

import json
from pathlib import Path
from typing import Any

import pytest
from command_line import run_storm
from tiny import tiny_processor

from storm_vlm.data.prompt import answer_text, build_messages, render_prompt
from storm_vlm.data.row import Row, read_rows, write_rows
from storm_vlm.datasets import EXPORTERS
from storm_vlm.datasets.parse import bare_options, gold_option, listed_choice
from storm_vlm.datasets.transfer import export_rows, import_rows, rejects_file
from storm_vlm.errors import StormError

R1: dict[str, Any] = {
    "problem_id": 2,
    "problem": "What rises?",
    "data_type": "video",
    "problem_type": "multiple choice",
    "options": ["A. a kite", "B. a balloon", "C. smoke"],
    "process": "<think>Something round goes up.</think>",
    "solution": "<answer>B</answer>",
    "path": "./LLaVA-Video-178K/academic/ytb_abc.mp4",
    "data_source": "LLaVA-Video-178K/30_60_s_youtube_v0_1",
}
VIDEO = {"video": "a.mp4"}
MC = "What rises?\nA. a kite\nB. a balloon\nC. smoke\nPlease answer with the letter only."


def turns(*texts: str, role: str = "role", text: str = "content") -> list[dict[str, str]]:
    names = ("user", "assistant") if role == "role" else ("human", "gpt")
    return [{role: names[i % 2], text: said} for i, said in enumerate(texts)]


def imported(
    tmp_path: Path, name: str, *items: Any, **options: Any
) -> tuple[list[Row], Any, list[Any]]:
    """Rows, counts and rejects."""
    source, out = tmp_path / "source.json", tmp_path / "rows.jsonl"
    source.write_text(json.dumps(items, ensure_ascii=False), encoding="utf-8")
    counts = import_rows(name, source, out, tmp_path / "media", **options)
    rejects = [json.loads(line) for line in rejects_file(out).read_text().splitlines()]
    assert len(rejects) == counts.rejected.total()
    rows = read_rows(out) if counts.written else []
    assert len(rows) == counts.written
    return rows, counts, rejects


def test_video_r1_multiple_choice(tmp_path):
    (row,), counts, _ = imported(tmp_path, "video-r1", R1)
    assert row.id == "video-r1-2" and row.split == "train"
    assert row.video == str(tmp_path / "media/LLaVA-Video-178K/academic/ytb_abc.mp4")
    assert (row.question, row.options) == ("What rises?", ("a kite", "a balloon", "smoke"))
    assert (row.answer, row.plan) == ("a balloon", "Something round goes up.")
    assert row.meta["source"] == R1["data_source"]
    assert row.meta["original"] == {"options": R1["options"], "solution": R1["solution"]}
    assert not counts.skipped and not counts.rejected and not counts.renamed


@pytest.mark.parametrize("source", [None, ""])
def test_video_r1_without_a_source_is_named_after_its_folder(tmp_path, source):
    bare = {key: value for key, value in R1.items() if key != "data_source"}
    for item in (bare, R1 | {"data_source": source}):
        assert imported(tmp_path, "video-r1", item)[0][0].meta["source"] == "LLaVA-Video-178K"


@pytest.mark.parametrize(
    ("kind", "solution", "answer"),
    [
        ("numerical", "<answer>3.5</answer>", "3.5"),
        ("free-form", "<answer>It falls.</answer>", "It falls."),
    ],
)
@pytest.mark.parametrize("options", [[], None])
def test_video_r1_without_options(tmp_path, kind, solution, answer, options):
    item = R1 | {"problem_type": kind, "options": options, "solution": solution, "process": ""}
    (row,), *_ = imported(tmp_path, "video-r1", item)
    assert (row.options, row.answer, row.plan) == ((), answer, None)
    assert row.meta["problem_type"] == kind


def test_what_is_not_imported_is_counted_by_reason_and_bad_rows_are_kept(tmp_path):
    image = {**R1, "data_type": "image", "path": "./CLEVR/a.png"}
    bad = [
        R1 | {"solution": "<answer>E</answer>"},
        R1 | {"options": []},
        R1 | {"options": ["A. same", "B. same"]},
        R1 | {"problem": None},
        R1 | {"problem": "What? <|im_end|>"},
        R1 | {"options": 7},
        R1 | {"solution": "<answer>A. smoke</answer>"},
        "no object",
    ]
    rows, counts, rejects = imported(tmp_path, "video-r1", image, *bad, R1, image)
    assert [row.id for row in rows] == ["video-r1-2"]
    assert counts.skipped == {"image row": 2}
    assert counts.rejected == {
        "answer is none of the options": 1,
        "multiple choice without options": 1,
        "options repeat or are empty": 1,
        "no problem": 1,
        "text holds the control token '<|im_end|>'": 1,
        "not as the format says": 2,
        "answer's letter and text disagree": 1,
    }
    assert [reject["row"] for reject in rejects] == bad
    assert "'E' of" in rejects[0]["detail"]


def test_repeated_ids_are_renamed_and_repeated_rows_skipped(tmp_path):
    other, third = R1 | {"problem": "What else rises?"}, R1 | {"problem": "And what falls?"}
    awkward = R1 | {"problem_id": "2#3"}
    rows, counts, _ = imported(tmp_path, "video-r1", R1, other, awkward, R1, third)
    assert [row.id for row in rows] == ["video-r1-2", *(f"video-r1-2#{i}" for i in (2, 3, 4))]
    assert counts.renamed == 2 and counts.skipped == {"the same row again": 1}


def test_missing_videos_are_rejected_on_request(tmp_path):
    there = tmp_path / "media/LLaVA-Video-178K/academic/ytb_abc.mp4"
    there.parent.mkdir(parents=True)
    there.touch()
    gone = R1 | {"problem_id": 3, "path": "./gone.mp4"}
    assert len(imported(tmp_path, "video-r1", R1, gone)[0]) == 2
    rows, counts, (reject,) = imported(tmp_path, "video-r1", R1, gone, check_videos=True)
    assert [row.id for row in rows] == ["video-r1-2"]
    assert counts.rejected == {"video file missing": 1} and reject["row"] == gone


@pytest.mark.parametrize(
    ("options", "bare"),
    [
        (["A. x", "B. y"], ["x", "y"]),
        (["A) x", "B) y"], ["x", "y"]),
        (["(A) x", "(B) y"], ["x", "y"]),
        (["(A): x", "(B): y"], ["x", "y"]),
        (["A: x", "B:y"], ["x", "y"]),
        (["A.M.", "P.M."], ["A.M.", "P.M."]),
        (["A cat", "B movie"], ["A cat", "B movie"]),
        (["B. x", "A. y"], ["B. x", "A. y"]),
        ([], []),
    ],
)
def test_labels_come_off_only_where_all_are_labels(options, bare):
    assert bare_options(options) == bare


@pytest.mark.parametrize(
    ("answer", "options", "gold"),
    [
        ("B", ["A. x", "B. y"], "y"),
        ("(B)", ["A. x", "B. y"], "y"),
        ("B. y", ["A. x", "B. y"], "y"),
        ("B) Y.", ["A. x", "B. y"], "y"),
        ("B. y\nBecause it is.", ["A. x", "B. y"], "y"),
        ("<answer> b </answer>", ["A. x", "B. y"], "y"),
        ("3", ["A. 5", "B. 3"], "3"),
        ("A", ["A. B", "B. A"], "B"),
        ("A", ["B", "A"], "A"),
        ("The answer is B.", ["x", "y"], "y"),
    ],
)
def test_a_gold_letter_becomes_the_options_text(answer, options, gold):
    assert gold_option(answer, bare_options(options), options) == gold


def test_a_question_is_parted_from_the_options_in_its_text():
    assert listed_choice(MC, "B. a balloon") == {
        "question": "What rises?",
        "options": ["a kite", "a balloon", "smoke"],
        "answer": "a balloon",
    }
    assert listed_choice("Which?Options:\n(A) x\n(B) y", "A")["question"] == "Which?"
    # lists that are not options: they start the text, or more than a line follows
    for text in ("A. x\nB. y", "Given\nA. x\nB. y\nsay\nwhy.", "Is\nA. it?", "Is\nA it\nB so?"):
        assert listed_choice(text, "so") == {"question": text, "options": [], "answer": "so"}


def test_videoespresso(tmp_path):
    item = {
        "core_frames_paths": ["frames/a_1.jpg"],
        "question": "Why?",
        "answer": "Because it is hot.",
        "evidence": "steam",
        "task": "Causal",
        "video_path": "videos/a.mp4",
    }
    test = item | {"options": ["(A): hot", "(B): cold"], "correct_answer": "(A)"}
    (opened, chosen), *_ = imported(tmp_path, "videoespresso", item, test)
    assert (opened.options, opened.answer) == ((), "Because it is hot.")
    assert (chosen.options, chosen.answer) == (("hot", "cold"), "hot")
    assert chosen.meta["core_frames"] == item["core_frames_paths"] and chosen.keyframes == ()
    assert "steam" not in chosen.question and chosen.meta["evidence"] == "steam"


def test_core_frames_are_found_in_the_video(tmp_path, reasoning_rows):
    from PIL import Image

    from storm_vlm.data.video import read_video

    first, other = reasoning_rows[:2]
    clip = read_video(first.video, 16)
    for index in (4, 1):
        Image.fromarray(clip.frames[index]).resize((160, 160)).save(tmp_path / f"{index}.jpg")
    item = {"question": "Why?", "answer": "so", "task": "t", "video_path": first.video}
    item["core_frames_paths"] = ["4.jpg", "1.jpg"]
    (row,), *_ = imported(tmp_path, "videoespresso", item, core_frames=tmp_path)
    assert row.keyframes == (clip.timestamps[1], clip.timestamps[4])
    wrong = [item | {"video_path": other.video}, item | {"core_frames_paths": ["gone.jpg"]}]
    _, counts, _ = imported(tmp_path, "videoespresso", *wrong, core_frames=tmp_path)
    assert counts.rejected == {"core frame is not in the video": 1, "core frame missing": 1}


CONVERSATIONS = {
    "llava-video": ("conversations", "from", "value", {"video": "a.mp4"}, "<image>\n"),
    "llama-factory": ("messages", "role", "content", {"videos": ["a.mp4"]}, "<video>"),
    "ms-swift": ("messages", "role", "content", {"videos": ["a.mp4"]}, ""),
}


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_conversations_give_a_row_for_each_pair(tmp_path, name):
    key, role, text, media, mark = CONVERSATIONS[name]
    said = turns(mark + MC, "B.", "And why?", "It is light.", role=role, text=text)
    (first, second), *_ = imported(tmp_path, name, {"id": "v", key: said, **media})
    assert (first.id, second.id) == ("v", "v/1")
    assert (first.question, first.answer) == ("What rises?", "a balloon")
    assert first.meta["original"] == {"question": mark + MC, "answer": "B."}
    assert (second.question, second.options, second.answer) == ("And why?", (), "It is light.")
    assert second.meta["turn"] == 1 and second.meta["turns"] == 2
    assert {row.video for row in (first, second)} == {str(tmp_path / "media/a.mp4")}


def test_openai_messages(tmp_path):
    parts = [
        {"type": "video_url", "video_url": {"url": "file://localhost/a%20b.mp4"}},
        {"type": "text", "text": MC},
    ]
    said = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": parts},
        {"role": "assistant", "content": "<think>round</think><answer>B</answer>"},
    ]
    image = [{"type": "image_url", "image_url": {"url": "a.png"}}]
    (row,), counts, _ = imported(
        tmp_path, "openai", {"messages": said}, {"messages": [{"role": "user", "content": image}]}
    )
    assert (row.id, row.video, row.answer, row.plan) == (
        "openai-0",
        "/a b.mp4",
        "a balloon",
        "round",
    )
    assert row.meta["system"] == "Be brief." and counts.skipped == {"image row": 1}


def test_conversations_that_are_not_about_one_video(tmp_path):
    good, bad = turns("<video>Why?", "so"), turns("Why?", "so")
    items = [
        {"messages": bad, "videos": ["a.mp4"]},
        {"messages": turns("<video><video>Why?", "so"), "videos": ["a.mp4"]},
        {"messages": turns("<video>Why?", "so", "And?"), "videos": ["a.mp4"]},
        {"messages": [{"role": "tool", "content": "x"}], "videos": ["a.mp4"]},
        {"messages": good, "videos": ["a.mp4", "b.mp4"]},
        {"messages": good, "videos": [["1.jpg", "2.jpg"]]},
        {"messages": bad, "images": ["a.png"]},
        {"messages": bad},
    ]
    rows, counts, _ = imported(tmp_path, "llama-factory", *items)
    assert not rows
    assert counts.rejected == {
        "placeholders do not match the videos": 2,
        "turns are not question and reply": 1,
        "turn by 'tool' or without text": 1,
    }
    assert counts.skipped == {
        "several videos or images": 1,
        "video given as frames": 1,
        "image row": 1,
        "text row": 1,
    }


@pytest.mark.parametrize("name", EXPORTERS)
def test_export_and_import_give_the_same_rows(tmp_path, name, reasoning_rows):
    chosen = Row(
        id="mc", video="/a.mp4", question=" Which? ", options=("A. x", "two\nlines"), answer="A. x",
        split="test", meta={"n": 1},
    )  # fmt: skip
    rows = [*reasoning_rows, chosen]
    write_rows(tmp_path / "rows.jsonl", rows)
    export_rows(name, tmp_path / "rows.jsonl", tmp_path / "out.jsonl")
    import_rows(name, tmp_path / "out.jsonl", tmp_path / "again.jsonl", tmp_path / "elsewhere")
    assert read_rows(tmp_path / "again.jsonl") == rows

    # edited beside its record: neither is believed; without the record, the text is
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    lines[0]["messages"][1]["content"] = "edited"
    for line in lines[1:]:
        del line["storm"]
    again, counts, _ = imported(tmp_path, name, *lines[:-1])
    assert counts.rejected == {"edited beside its `storm` record": 1}
    said = [(r.video, r.question, r.options, r.answer) for r in rows[1:-1]]
    assert [(r.video, r.question, r.options, r.answer) for r in again] == said


def test_a_multiple_choice_row_survives_as_mere_text(tmp_path):
    row = Row(
        id="a",
        video="/a.mp4",
        question="Which?\nLook well.",
        options=("x", "y"),
        answer="y",
        split="test",
    )
    item = EXPORTERS["ms-swift"](row)
    del item["storm"]
    (again,), *_ = imported(tmp_path, "ms-swift", item)
    assert (again.question, again.options, again.answer) == (row.question, row.options, row.answer)


@pytest.mark.parametrize("name", EXPORTERS)
@pytest.mark.parametrize("options", [(), ("x", "y")])
def test_an_exported_question_is_our_own_prompt_to_the_letter(name, options):
    row = Row(id="a", video="/a.mp4", question=" Why? ", options=options, answer="y", split="test")
    user, assistant = EXPORTERS[name](row)["messages"]
    # how both trainers write Qwen2.5-VL's turns and its video
    prompt = (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        f"<|im_start|>user\n{user['content']}<|im_end|>\n<|im_start|>assistant\n"
    ).replace("<video>", "<|vision_start|><|video_pad|><|vision_end|>")
    ours = render_prompt(tiny_processor(), build_messages(row.question, row.options), "off")
    assert prompt == ours
    assert assistant["content"] == answer_text(row) == ("B" if options else "y")


def test_rows_that_a_layout_cannot_say_are_kept_apart(tmp_path):
    row = Row(id="a", video="/a.mp4", question="Why?", answer="so", split="test")
    cut = row.model_copy(update={"id": "b", "start": 1.0})
    marked = row.model_copy(update={"id": "c", "question": "What is <video>?"})
    write_rows(tmp_path / "rows.jsonl", [row, cut, marked])
    counts = export_rows("ms-swift", tmp_path / "rows.jsonl", tmp_path / "out.jsonl")
    assert counts.written == 1
    assert counts.rejected == {"no window in this format": 1, "a placeholder in the text": 1}
    rejects = [json.loads(line) for line in rejects_file(tmp_path / "out.jsonl").open()]
    assert [reject["row"]["id"] for reject in rejects] == ["b", "c"]


def test_json_lines_are_read_too_and_broken_files_leave_the_old_ones(tmp_path):
    source, out = tmp_path / "source.jsonl", tmp_path / "rows.jsonl"
    source.write_text("\n".join(json.dumps(R1 | {"problem_id": i}) for i in range(3)) + "\n\n")
    assert import_rows("video-r1", source, out, tmp_path).written == 3
    before = sorted((path.name, path.read_bytes()) for path in tmp_path.iterdir() if path != source)
    for broken, message in (
        ("[" + json.dumps(R1) + ", {", "not JSON"),
        ('{"a": ', ":1: not JSON"),
    ):
        source.write_text(broken)
        with pytest.raises(StormError, match=rf"source\.jsonl.*{message}"):
            import_rows("video-r1", source, out, tmp_path)
        after = sorted(
            (path.name, path.read_bytes()) for path in tmp_path.iterdir() if path != source
        )
        assert after == before


@pytest.mark.parametrize("as_list", [True, False])
def test_marks_nan_and_addresses_in_a_source(tmp_path, as_list):
    items = [R1 | {"data_source": float("nan")}, R1 | {"path": "https://example.org/a.mp4"}]
    text = json.dumps(items) if as_list else "\n".join(map(json.dumps, items))
    source, out = tmp_path / "source.json", tmp_path / "rows.jsonl"
    source.write_text(text, encoding="utf-8-sig")
    counts = import_rows("video-r1", source, out, tmp_path)
    assert counts.written == 1 and read_rows(out)[0].meta["source"] == "LLaVA-Video-178K"
    assert counts.rejected == {"video is an address": 1}


def test_the_command_prints_what_became_of_the_rows(tmp_path):
    source, out = tmp_path / "r1.json", tmp_path / "out/rows.jsonl"
    source.write_text(json.dumps([R1, R1 | {"options": []}, R1 | {"data_type": "image"}]))
    arguments = ["import", "video-r1", str(source), str(out), "--videos", str(tmp_path)]
    result = run_storm(*arguments)
    assert result.exit_code == 0
    for said in ("image row", "multiple choice without options", "rows.rejects.jsonl"):
        assert said in result.output
    assert len(read_rows(out)) == 1
    source.write_text(json.dumps([R1 | {"data_type": "image"}]))
    result = run_storm(*arguments)
    assert result.exit_code != 0 and "no row was written" in result.stderr


def pair(row: Row) -> tuple[str, str]:
    return row.question, row.answer


SWIFT = {  # modelscope/ms-swift 025fc6b, docs/source_en/Customization/Custom-dataset.md
    "messages": {"messages": [{"role": "system", "content": "S"}, *turns("Q", "A", "R", "B")]},
    "sharegpt": {
        "system": "S",
        "conversation": [{"human": "Q", "assistant": "A"}, {"human": "R", "assistant": "B"}],
    },
    "query": {"system": "S", "query": "R", "response": "B", "history": [["Q", "A"]]},
}


@pytest.mark.parametrize("layout", SWIFT)
def test_swift_documents_four_layouts(tmp_path, layout):
    rows, *_ = imported(tmp_path, "ms-swift", {**SWIFT[layout], "videos": ["/v/a.mp4"]})
    assert [pair(row) for row in rows] == [("Q", "A"), ("R", "B")]
    assert {row.meta["system"] for row in rows} == {"S"} and rows[1].meta["turn"] == 1


@pytest.mark.parametrize("name", ["ms-swift", "llama-factory"])
def test_alpaca_and_the_system_column(tmp_path, name):
    """hiyouga/LLaMA-Factory ff6d4d1 data/README.md: `instruction\\ninput` is the prompt; `system` is optional."""
    alpaca = {"instruction": "<video>Look.", "input": "What is it?", "output": "A dog."}
    alpaca |= {"history": [], "videos": ["a.mp4"]}
    said = turns("<video>What is it?", "A dog.", role="from", text="value")
    sharegpt = {"conversations": said, "system": "Be brief.", "videos": ["a.mp4"]}
    (first, second), *_ = imported(tmp_path, name, alpaca, sharegpt)
    assert pair(first) == ("Look.\nWhat is it?", "A dog.") and "system" not in first.meta
    assert pair(second) == ("What is it?", "A dog.") and second.meta["system"] == "Be brief."


def test_rows_with_sound_are_skipped(tmp_path):
    """hiyouga/LLaMA-Factory ff6d4d1 data/mllm_video_audio_demo.json."""
    both = {"messages": turns("<video><audio>What is the video describing?", "A girl who draws.")}
    both |= {"videos": ["mllm_demo_data/4.mp4"], "audios": ["mllm_demo_data/4.mp3"]}
    sound = {"messages": turns("<audio>What is said?", "Hello."), "audios": ["1.mp3"]}
    for name in ("llama-factory", "ms-swift"):
        rows, counts, _ = imported(tmp_path, name, both, sound)
        assert not rows and counts.skipped == {"audio row": 2} and not counts.rejected
    parts = [{"type": "audio", "path": "1.mp3"}, {"type": "text", "text": "What?"}]
    item = {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "x"}]}
    assert imported(tmp_path, "openai", item)[1].skipped == {"audio row": 1}


@pytest.mark.parametrize("key", ["video", "path", "url"])
def test_chat_parts_of_transformers(tmp_path, key):
    """huggingface/transformers 5.x docs, chat_templating_multimodal: a video part has `video`, `path` or `url`."""
    parts = [{"type": "video", key: "a.mp4"}, {"type": "text", "text": "What?"}]
    item = {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "x"}]}
    (row,), *_ = imported(tmp_path, "openai", item)
    assert row.video == str(tmp_path / "media/a.mp4") and pair(row) == ("What?", "x")
    parts[0][key] = [f"{i}.jpg" for i in range(4)]
    assert imported(tmp_path, "openai", item)[1].skipped == {"video given as frames": 1}


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_a_video_must_be_a_file(tmp_path, name):
    key, role, text, media, mark = CONVERSATIONS[name]
    said = {key: turns(mark + "What?", "x", role=role, text=text)}
    videos = ["https://example.org/a.mp4", "data:video/mp4;base64,AAAA", "AAAA" * 2000]
    field = next(iter(media))
    items = [said | {field: video if field == "video" else [video]} for video in videos]
    rows, counts, (address, *encoded) = imported(tmp_path, name, *items)
    assert not rows
    assert counts.rejected == {"video is an address": 1, "video is base64": 2}
    assert address["detail"] == "download it first: https://example.org/a.mp4"
    assert all(len(reject["detail"]) < 100 for reject in encoded)


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_pictures_in_a_reply_are_another_format(tmp_path, name):
    """LiuJunhua02/TwiFF e25c415 README.md; OpenGVLab/Future-L1 a91add2 (`<image>` in both turns)."""
    asked = "frame_1\n<image>\nWhat next?"
    twiff = turns(asked, "It is hot.\n<rimage>\nOil.\n<ans>Egg.</ans>", role="from", text="value")
    twiff = {"frames": [1], "recon_frames": [3], "conversations": twiff}
    future = turns(asked, "THOUGHT 1: hot\n<image>\nTHOUGHT 2: oil", role="from", text="value")
    future = {"id": "x1", "reasoning_image": [3], "conversations": future, "answer": "Egg."}
    rows, counts, rejects = imported(tmp_path, name, twiff | VIDEO, future | VIDEO)
    assert not rows and counts.rejected == {"pictures in a reply": 2}
    assert rejects[0]["detail"].startswith("<rimage>, as TwiFF and Future-L1")

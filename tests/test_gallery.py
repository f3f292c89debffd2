"""The gallery's page: what it shows, that its files exist, and that it needs nothing from elsewhere."""

import base64
import io
import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pytest
from command_line import run_storm
from PIL import Image

from storm_vlm.data.row import Row, ThoughtVideo, write_rows
from storm_vlm.data.video import read_video
from storm_vlm.datasets.gallery import write_gallery
from storm_vlm.errors import StormError


class Page(HTMLParser):
    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, Any]]] = []
        self.text = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, Any]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str, attribute: str) -> list[str]:
        return [attrs[attribute] for name, attrs in self.tags if name == tag and attribute in attrs]


@pytest.fixture
def folder(tmp_path: Path, reasoning_rows: list[Row]) -> Path:
    """Six rows as a user has them, in a folder with an awkward name."""
    provenance = {"prompt": "It rolls <on>.", "seed": 3, "filters": {"motion": 0.43219}}
    thought = reasoning_rows[0].thought_video
    assert thought is not None
    changed = reasoning_rows[0].model_copy(
        update={
            "options": ("<b>left</b>", "right"),
            "answer": "<b>left</b>",
            "keyframes": (0.0, 0.6, 99.0),
            "thought_video": ThoughtVideo(
                path=thought.path, source="generated", generator="g", provenance=provenance
            ),
        }
    )
    folder = tmp_path / "a set, #1"
    folder.mkdir()
    write_rows(folder / "rows.jsonl", [changed, *reasoning_rows[1:6]])
    return folder


def test_the_page_shows_the_rows_and_needs_nothing_else(folder, reasoning_rows):
    path = write_gallery(folder)
    page = Page(path)
    assert path == folder / "rows.html" and page.text.count("thought video") == 6
    videos = page.all("video", "src")
    wanted = [name for row in reasoning_rows[:6] for name in (row.video, row.thought_video.path)]
    assert [str((folder / unquote(src)).resolve()) for src in videos] == wanted
    linked = [
        *page.all("img", "src"),
        *page.all("a", "href"),
        *page.all("script", "src"),
        *page.all("link", "href"),
    ]
    assert all(link.startswith(("data:image/jpeg;base64,", "#")) for link in linked)
    assert "http" not in path.read_text(encoding="utf-8")
    for text in ("<b>left</b> ✓", "It rolls <on>.", "motion 0.432", "generated", "only in a dream"):
        assert (text in page.text) == (text != "only in a dream")
    for row in reasoning_rows[1:6]:
        assert row.question in page.text and row.plan in page.text
    assert "99 s but the video ends" in page.text.replace("99.0", "99")


def test_keyframes_are_the_frames_at_their_times(folder, reasoning_rows):
    images = Page(write_gallery(folder)).all("img", "src")
    clip = read_video(reasoning_rows[0].video, 32)
    for image, time in zip(images[:2], (0.0, 0.6), strict=True):
        shown = Image.open(io.BytesIO(base64.b64decode(image.partition(",")[2])))
        apart = np.abs(clip.frames.astype(int) - np.asarray(shown)).mean((1, 2, 3))
        assert (
            apart.argmin() == np.searchsorted(clip.timestamps, time, "right") - 1
            and apart.min() < 5
        )


def test_a_limit_says_what_it_leaves_out_and_rejects_are_shown(folder):
    for name, reason in (("rejects.jsonl", "static clip"), ("rows.rejects.jsonl", "image row")):
        line = {"reason": reason, "detail": "0.01 < 0.02", "row": {"question": "Why not?"}}
        (folder / name).write_text(json.dumps(line) + "\n")
    page = Page(write_gallery(folder / "rows.jsonl", folder / "page.html", limit=2))
    assert page.text.count("thought video") == 2 and "4 are left out" in page.text
    for text in ("static clip", "image row", "0.01 < 0.02", "Why not?"):
        assert text in page.text


def test_a_window_plays_alone_and_a_missing_video_is_named(tmp_path):
    row = Row(
        id="a", video="gone.mp4", question="Why?", answer="so", split="test", start=1, end=2.5, keyframes=(1,)
    )  # fmt: skip
    write_rows(tmp_path / "some.jsonl", [row])
    page = Page(write_gallery(tmp_path))
    assert page.all("video", "data-start") == ["1.0"] and page.all("video", "data-end") == ["2.5"]
    assert page.text.count("no such video file") == 2  # the clip, and its keyframe


def test_the_command(folder, tmp_path):
    result = run_storm("gallery", folder, "--limit", 1, "--out", tmp_path / "p.html")
    assert result.exit_code == 0 and Page(tmp_path / "p.html").text.count("thought video") == 1
    (folder / "rows.jsonl").rename(folder / "x.jsonl")
    (folder / "y.jsonl").touch()
    with pytest.raises(
        StormError, match=r"name one file of rows in it; there is x\.jsonl, y\.jsonl"
    ):
        write_gallery(folder)

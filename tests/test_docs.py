"""What README and docs point to is there, and the commands that they show work."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from storm_vlm.cli.main import app

ROOT = Path(__file__).parents[1]
DOCS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
FOLDERS = ("", "src", "src/storm_vlm", "docs")  # that source files are named from
SOURCE = re.compile(r"`([\w./-]+\.(?:py|md|sh))`")
LINK = re.compile(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)")
SHELL = re.compile(r"^```sh( title=.*)?\n(.*?)^```", re.MULTILINE | re.DOTALL)


def commands(text: str, titled: bool) -> list[str]:
    """Lines of the shell blocks. A block with a title needs what a test has not: a GPU, a key, a file."""
    blocks = (block for title, block in SHELL.findall(text) if titled or not title)
    return [line for block in blocks for line in block.splitlines() if line.startswith("storm ")]


@pytest.mark.parametrize("doc", DOCS, ids=lambda doc: str(doc.relative_to(ROOT)))
def test_named_files_exist_and_commands_have_their_options(doc: Path) -> None:
    text = doc.read_text()
    missing = [link for link in LINK.findall(text) if not (doc.parent / link).exists()]
    for name in SOURCE.findall(text):
        if not any((ROOT / folder / name).exists() for folder in FOLDERS):
            missing.append(name)
    assert not missing
    for line in commands(text, titled=True):
        app.parse_args(shlex.split(line, comments=True)[1:], exit_on_error=False, print_error=False)


RUN = [doc for doc in DOCS if commands(doc.read_text(), titled=False)]


@pytest.mark.parametrize("doc", RUN, ids=lambda doc: str(doc.relative_to(ROOT)))
def test_commands_run(doc: Path, tmp_path: Path) -> None:
    """In the order of the page, in an empty folder with the checkout's `src`."""
    (tmp_path / "src").symlink_to(ROOT / "src")
    for line in commands(doc.read_text(), titled=False):
        script = f'storm() {{ {sys.executable} -m storm_vlm "$@"; }}; {line}'
        done = subprocess.run(
            ["bash", "-c", script],
            cwd=tmp_path,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, f"{line}\n{done.stderr}"

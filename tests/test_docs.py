"""What README and docs point to is there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]
FOLDERS = ("", "src", "src/storm_vlm", "docs")  # that source files are named from
SOURCE = re.compile(r"`([\w./-]+\.(?:py|md|sh))`")
LINK = re.compile(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)")


@pytest.mark.parametrize("doc", DOCS, ids=lambda doc: str(doc.relative_to(ROOT)))
def test_named_files_exist(doc: Path) -> None:
    text = doc.read_text()
    missing = [link for link in LINK.findall(text) if not (doc.parent / link).exists()]
    for name in SOURCE.findall(text):
        if not any((ROOT / folder / name).exists() for folder in FOLDERS):
            missing.append(name)
    assert not missing

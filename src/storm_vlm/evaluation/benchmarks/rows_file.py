"""A file of our own rows, as the micro world's: no prompt or rule but ours."""

from __future__ import annotations

from pathlib import Path

from storm_vlm.data.prompt import build_messages, is_correct
from storm_vlm.data.schema import Row, read_rows


class RowsFile:
    name = "micro"
    groups: tuple[str, ...] = ("family",)
    hub = None

    def read(self, folder: Path) -> list[Row]:
        """The rows of a JSONL file, or of the only one in a folder."""
        folder = Path(folder)
        files = [folder] if folder.is_file() else sorted(folder.glob("*.jsonl"))
        if len(files) != 1:
            raise FileNotFoundError(f"{folder} has {len(files)} row files: name one *.jsonl")
        return read_rows(files[0])

    def official_prompt(self, row: Row) -> str:
        return build_messages(row.question, row.options)[0]["content"][-1]["text"]

    def official_score(self, text: str, row: Row) -> float:
        return float(bool(is_correct(text, row)))

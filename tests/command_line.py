"""The `storm` command, run in this process."""

from __future__ import annotations

import io
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass

from storm_vlm.cli.main import main


@dataclass(frozen=True)
class Result:
    """What a shell would see."""

    exit_code: int
    stdout: str
    stderr: str

    @property
    def output(self) -> str:
        return self.stdout + self.stderr


def run_storm(*arguments: object) -> Result:
    """Run a verb; its errors are printed, as they are for a user."""
    out, errors = io.StringIO(), io.StringIO()
    code = 0
    with redirect_stdout(out), redirect_stderr(errors):
        try:
            main([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = int(stop.code or 0)
    return Result(code, out.getvalue(), errors.getvalue())

"""The `storm` command. Each verb imports what it needs when it runs, so that help is quick."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Sequence
from typing import Any

from cyclopts import App, CycloptsError, UnusedCliTokensError
from pydantic import ValidationError

from storm_vlm.cli import (
    answer,
    bench,
    build,
    controls,
    datasets,
    doctor,
    evaluate,
    judge,
    lab,
    report,
    serve,
    train,
    validate,
)
from storm_vlm.cli.terminal import (
    DATA,
    EVALUATION,
    LAB,
    TRAINING,
    USE,
    Messages,
    errors,
    show,
    stop_bars,
)
from storm_vlm.data.atomic_write import discard_half_files
from storm_vlm.errors import StormError
from storm_vlm.versions import versions

EXTRAS = {  # packages that some verbs need
    "matplotlib": "analysis",
    **dict.fromkeys(("fastapi", "prometheus_client", "uvicorn"), "serve"),
}
FAILED, MISUSED, INTERRUPTED, TERMINATED = 1, 2, 130, 143  # exit codes; `storm build` has more


app = App(
    name="storm",
    help="Latent video reasoning with STORM.",
    version=lambda: versions()["storm-vlm"],
    result_action="return_value",
    suppress_keyboard_interrupt=False,
)
app.command(answer.answer, group=USE)
app.command(serve.serve, group=USE)
app.command(serve.play, group=USE)
app.command(lab.quickstart, group=USE)
app.command(doctor.doctor, group=USE)
app.command(datasets.import_command, name="import", group=DATA)
app.command(datasets.export_command, name="export", group=DATA)
app.command(datasets.leaks, group=DATA)
app.command(build.app)
app.command(datasets.gallery, group=DATA)
app.command(train.init, group=TRAINING)
app.command(train.plan, group=TRAINING)
app.command(train.train, group=TRAINING)
app.command(evaluate.download, group=EVALUATION)
app.command(evaluate.evaluate, group=EVALUATION)
app.command(judge.judge, group=EVALUATION)
app.command(report.compare_runs, name="compare", group=EVALUATION)
app.command(report.report_runs, name="report", group=EVALUATION)
app.command(train.card, group=EVALUATION)
app.command(evaluate.lmms_task, group=EVALUATION)
app.command(validate.validate, group=EVALUATION)
app.command(controls.controls, group=TRAINING)
app.command(lab.world, group=LAB)
app.command(lab.pretrain, group=LAB)
app.command(lab.reproduce, group=LAB)
app.command(bench.app)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point: what a user can mend becomes one line, anything else a traceback and how to report it.

    Ctrl-C and SIGTERM end it within seconds: no half file is left, and no thread waited for.
    """
    # OpenMP's threads are not to spin while they wait: on a busy machine that takes the cores from the work itself.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # read when torch is imported
    os.environ.setdefault("TQDM_DELAY", "1")  # seconds: no bar for what takes less
    # What transformers tells programmers: other libraries and our configs use the names that all its versions know.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    logger = logging.getLogger("storm_vlm")
    logger.handlers, logger.propagate = [Messages()], False
    logger.setLevel(logging.INFO)  # what was chosen, and why
    listen()
    try:
        code = _run(arguments)
    except CycloptsError as error:
        show(f"storm: {_usage_error(error)}", to=errors)
        code = MISUSED
    except KeyboardInterrupt as signalled:
        show(f"storm: {str(signalled) or 'interrupted'}", to=errors)
        _end(TERMINATED if isinstance(signalled, Terminated) else INTERRUPTED)
        return
    except BrokenPipeError:  # e.g. `storm report … | head`
        sys.stderr.close()
        code = FAILED
    except (StormError, OSError) as error:  # the hub's and the disk's, too
        show(f"storm: {' '.join(_told(error).splitlines())}", to=errors)
        code = FAILED
    except Exception as error:
        package = (getattr(error, "name", None) or "").partition(".")[0]
        if isinstance(error, ImportError) and package in EXTRAS:
            show(
                f"storm: this needs {package}: pip install 'storm-vlm[{EXTRAS[package]}]'",
                to=errors,
            )
            raise SystemExit(FAILED) from error
        traceback.print_exc()
        made_with = ", ".join(f"{name} {version}" for name, version in versions().items())
        show(
            "storm: this is a bug of ours. Please report it with the lines above, the command and "
            f"these versions: {made_with}",
            to=errors,
        )
        code = FAILED
    raise SystemExit(code)


def _run(arguments: Sequence[str] | None) -> Any:
    try:
        return app(arguments, exit_on_error=False, print_error=False)
    finally:
        stop_bars()  # a message is no part of their line


class Terminated(KeyboardInterrupt):
    """SIGTERM."""


def listen() -> None:
    """Take SIGTERM as Ctrl-C is taken; of several processes, their launcher sees to it."""
    if threading.current_thread() is threading.main_thread() and "RANK" not in os.environ:
        signal.signal(signal.SIGTERM, _terminate)


def _terminate(*_: object) -> None:
    raise Terminated("terminated")


def _end(code: int) -> None:
    """End without those threads that are still at work."""
    if all(
        thread.daemon for thread in threading.enumerate() if thread is not threading.main_thread()
    ):
        raise SystemExit(code)
    discard_half_files()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _told(error: Exception) -> str:
    """The message; of the operating system's, the file first and no number."""
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror[:1].lower()}{error.strerror[1:]}"
    return str(error)


def _usage_error(error: CycloptsError) -> str:
    """One line, the fields of a config under the names of their options."""
    if isinstance(error.__cause__, ValidationError):
        faults = [
            f"{'.'.join(map(str, fault['loc'])).replace('_', '-')}: {fault['msg']}"
            for fault in error.__cause__.errors()
        ]
        return f"--{'; --'.join(faults)}"
    if isinstance(error, UnusedCliTokensError):
        return (
            f"too many arguments: {' '.join(error.unused_tokens or ())} (see the command's --help)"
        )
    return str(error)

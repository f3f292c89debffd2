"""What a result says that it was made with."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from storm_vlm.versions import CHECKOUT, versions

SHOW = "from storm_vlm.versions import commit; print(commit())"


def git(folder: Path, *arguments: str) -> str:
    name = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
    command = ("git", *name, *arguments)
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout


def commit_of(package: Path, stand: Path) -> str:
    """What the package in that folder says, called from another folder."""
    environment = {"PYTHONPATH": str(package), "PATH": "/usr/bin:/bin:/usr/local/bin"}
    command = (sys.executable, "-c", SHOW)
    done = subprocess.run(command, cwd=stand, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """Somebody's repository, whose settings start a program when git looks at its files."""
    folder = tmp_path / "foreign"
    folder.mkdir()
    git(folder, "init", "-q")
    (folder / "file").write_text("1")
    git(folder, "add", "file")
    git(folder, "commit", "-q", "-m", "theirs")
    hook = folder / "hook"
    hook.write_text("#!/bin/sh\ntouch started\n")
    hook.chmod(0o755)
    git(folder, "config", "core.fsmonitor", str(hook))
    return folder


def test_an_installed_package_has_no_commit(tmp_path: Path, foreign: Path) -> None:
    """Neither the user's repository is taken for ours, nor that in which a virtual environment lies."""
    ours = Path(CHECKOUT / "src" / "storm_vlm")
    for site in (tmp_path / "lib" / "site-packages", foreign / ".venv" / "lib", foreign / "src"):
        for name in ("__init__.py", "versions.py"):
            site.joinpath("storm_vlm").mkdir(parents=True, exist_ok=True)
            shutil.copy(ours / name, site / "storm_vlm")
        assert commit_of(site, foreign) == "unknown"
    assert not (foreign / "started").exists()


def test_a_checkout_says_its_own_commit(tmp_path: Path, foreign: Path) -> None:
    package = tmp_path / "checkout" / "src" / "storm_vlm"
    package.mkdir(parents=True)
    for name in ("__init__.py", "versions.py"):
        shutil.copy(CHECKOUT / "src" / "storm_vlm" / name, package)
    (tmp_path / "checkout" / ".gitignore").write_text("__pycache__\n")
    shutil.copy(CHECKOUT / "pyproject.toml", tmp_path / "checkout")
    git(tmp_path / "checkout", "init", "-q")
    git(tmp_path / "checkout", "add", ".")
    git(tmp_path / "checkout", "commit", "-q", "-m", "ours")
    head = git(tmp_path / "checkout", "rev-parse", "--short=12", "HEAD").strip()
    assert commit_of(package.parent, foreign) == head
    with (package / "versions.py").open("a") as file:
        file.write("# changed\n")
    assert commit_of(package.parent, foreign) == head + "+"
    assert not (foreign / "started").exists()


def test_versions_of_what_decides_a_result() -> None:
    assert versions()["torch"] != "unknown" and versions()["python"].startswith("3.")

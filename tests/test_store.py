"""The one store: what its keys are made of, files that are whole, and what processes share."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from storm_vlm.data.store import Ledger, Store, key_of


def read_json(path: Path) -> Any:
    return json.loads(path.read_bytes())


def test_a_key_is_what_its_parts_say_in_any_order() -> None:
    assert key_of(a=1, b=[None, 0.5]) == key_of(b=[None, 0.5], a=1)
    keys = {key_of(a=1), key_of(a="1"), key_of(a=1.5), key_of(b=1), key_of(a=None), key_of()}
    assert len(keys) == 6
    with pytest.raises(ValueError, match="Out of range"):
        key_of(a=float("nan"))  # would not equal itself
    with pytest.raises(TypeError):
        key_of(a=object())  # would be written with its address
    # Answers that were paid are found again under this key.
    assert key_of(é="ü", a=1)[:16] == "b298a95876e15ae9"


def test_a_file_is_hashed_again_only_if_it_may_have_changed(tmp_path: Path) -> None:
    clip, store = tmp_path / "clip", Store(tmp_path / "store")
    clip.write_bytes(b"one")
    first = store.content(clip)
    assert first == "7692c3ad3540bb803c020b3aee66cd8887123234ea0c6e7143c0add73ff431ed"
    state = clip.stat()

    def overwrite(data: bytes, time: int) -> None:
        with clip.open("r+b") as file:  # the same inode
            file.write(data)
        os.utime(clip, ns=(state.st_atime_ns, time))

    overwrite(b"two", state.st_mtime_ns)
    assert store.content(clip) == Store(tmp_path / "store").content(clip) == first
    again = pickle.loads(pickle.dumps(store))  # as a spawned worker has it
    assert again.content(clip) == first
    overwrite(b"two", state.st_mtime_ns + 1)
    second = store.content(clip)
    assert second != first
    overwrite(b"six!", state.st_mtime_ns + 1)
    third = store.content(clip)
    assert third not in (first, second)
    other = tmp_path / "other"
    other.write_bytes(b"five")
    os.utime(other, ns=(state.st_atime_ns, state.st_mtime_ns + 1))
    os.replace(other, clip)  # another inode, and nothing else
    assert store.content(clip) not in (first, second, third)
    link = tmp_path / "link"
    link.symlink_to(clip)
    assert store.content(link) == store.content(str(clip))


def test_hashes_are_shared_whatever_is_left_of_a_line(tmp_path: Path) -> None:
    ours, theirs = Store(tmp_path / "store"), Store(tmp_path / "store")
    for name in "ab":
        (tmp_path / name).write_text(name)
    ours.content(tmp_path / "a")
    log = tmp_path / "store" / "hashes.log"
    whole = log.read_bytes()
    log.write_bytes(b"\xff\xfe\n" + whole[:-30])  # a kill, in the middle of a line
    ours.content(tmp_path / "b")
    before = log.stat().st_size
    theirs.content(tmp_path / "b")
    assert log.stat().st_size == before  # known from the other process
    theirs.content(tmp_path / "a")
    assert log.stat().st_size > before


def test_a_ledger_tells_each_reader_what_is_new(tmp_path: Path) -> None:
    one, other = (Ledger(tmp_path / "deep" / "log") for _ in range(2))
    assert one.news() == {}
    other.add("a" * 64, "10 2")
    assert one.news() == {"a" * 64: "10 2"} and one.news() == {}
    with open(tmp_path / "deep" / "log", "ab") as file:
        file.write(b"\n" + b"b" * 64 + b" 10 2")  # of " 10 25"
    assert one.news() == {}
    other.add("c" * 64, "5 6")
    assert one.news() == {"c" * 64: "5 6"}
    assert len(other.news()) == 2


@pytest.mark.parametrize("damage", [b"", b'{"a": ', b"\xff\x00" * 50])
def test_a_damaged_file_is_absent_and_can_be_written_again(tmp_path: Path, damage: bytes) -> None:
    store = Store(tmp_path)
    assert store.read("rows", "ab12", read_json) is None
    store.write("rows", "ab12", b'{"a": 1}')
    assert store.read("rows", "ab12", read_json) == {"a": 1}
    assert store.read("teacher", "ab12", read_json) is None
    assert list(store.files("rows")) == [tmp_path / "rows" / "ab" / "ab12.json"]
    assert not list(store.files("rows", ".mp4"))
    store.path("rows", "ab12").write_bytes(damage)
    assert store.read("rows", "ab12", read_json) is None
    store.write("rows", "ab12", b"2")
    assert store.read("rows", "ab12", read_json) == 2


@pytest.mark.parametrize("durable", [False, True])
def test_a_file_is_in_the_store_whole_or_not_at_all(tmp_path: Path, durable: bool) -> None:
    store = Store(tmp_path, durable)
    with pytest.raises(KeyboardInterrupt), store.place("thoughts", "ab", ".mp4") as unfinished:
        unfinished.write_bytes(b"half of")
        assert not list(store.files("thoughts", ".mp4"))
        raise KeyboardInterrupt
    assert not list(store.files("thoughts", ".mp4")) and not list(
        (tmp_path / "unfinished").iterdir()
    )
    with store.place("thoughts", "ab", ".mp4") as unfinished:
        unfinished.write_bytes(b"whole")
    assert store.path("thoughts", "ab", ".mp4").read_bytes() == b"whole"


def test_processes_write_the_same_folder(tmp_path: Path) -> None:
    for number in range(40):
        (tmp_path / f"{number}.clip").write_text(str(number))
    code = (
        "import sys; from pathlib import Path; from storm_vlm.data.store import Store\n"
        "folder = Path(sys.argv[1]); store = Store(folder / 'store')\n"
        "for clip in sorted(folder.glob('*.clip')):\n"
        "    key = store.content(clip); store.write('rows', key, clip.read_bytes())\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    running = [subprocess.Popen(command) for _ in range(3)]
    assert [process.wait() for process in running] == [0, 0, 0]
    store = Store(tmp_path / "store")
    assert len(list(store.files("rows"))) == 40 and not list(
        (tmp_path / "store/unfinished").iterdir()
    )
    for number in range(40):
        key = store.content(tmp_path / f"{number}.clip")
        assert store.read("rows", key, read_json) == number

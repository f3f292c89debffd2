"""`storm reproduce`, in small: counting, saying, writing, and going on where it stopped."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from storm_vlm.reproduce.findings import findings
from storm_vlm.reproduce.page import markdown, table_rows
from storm_vlm.reproduce.run import Plan, _belongs, reproduce
from storm_vlm.reproduce.tables import TAMPERED, table
from storm_vlm.world.arms import COMPARISONS
from storm_vlm.world.experiment import Size

ROOT = Path(__file__).resolve().parent.parent
TINY = Plan(Size(train_rows=16, test_rows=8, ood_rows=2, steps=7), 1, probed=3, drawn=6, rounds=1)


def run(
    arm: str, seed: int, right: list[bool], swapped: list[bool | None] | None = None
) -> dict[str, Any]:
    outcomes = [{"correct": hit, "tokens": 2, "slots_used": 8} for hit in right]
    result = {"arm": arm, "seed": seed, "test": outcomes, "ood": outcomes[:2]}
    if swapped is not None:
        kinds = {kind: swapped if kind.startswith("swap") else right for kind in TAMPERED}
        result["tampered"] = {"right": kinds, "follows": [hit is False for hit in swapped]}
    return result


RESULTS = {
    "full": [
        run("full", 0, [True, True, True, False], [False, None, False, False]),
        run("full", 1, [True, True, False, False], [True, None, False, False]),
    ],
    "sft": [run("sft", 1, [False, True, False, False])],
    "base": [run("base", 0, [False, False, False, False])],
}


def test_a_table_counts_over_seeds_and_pairs_what_seeds_share() -> None:
    found = table(COMPARISONS["main"], RESULTS)
    lines = {line["arm"]: line for line in found["lines"]}
    assert lines["full"]["accuracy"]["mean"] == 5 / 8 and lines["full"]["by_seed"] == [0.75, 0.5]
    assert lines["full"]["accuracy"]["low"] < 5 / 8 < lines["full"]["accuracy"]["high"]
    assert lines["full"]["behind"] is None and lines["cot"]["accuracy"] is None
    assert lines["sft"]["behind"]["mean"] == 0.25  # of seed 1 alone, which both have
    assert lines["base"]["behind"]["mean"] == 5 / 8  # its one run stands for both seeds
    tampered = lines["full"]["tampered"]
    assert tampered["swap_other_answer"]["mean"] == 1 / 6  # rows without a donor do not count
    assert tampered["own"]["mean"] == 5 / 8 and lines["sft"]["tampered"] is None
    cells = dict(zip(lines, table_rows(found), strict=True))
    assert cells["cot"][1] == "not measured" and cells["full"][1].startswith("62.5% (")
    assert {len(row) for row in cells.values()} == {9}


@pytest.fixture(scope="module")
def reproduced(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("reproduce")
    latency = (ROOT / "docs" / "results" / "latency.json").read_text()
    (folder / "latency.json").write_text(latency)  # measured by a test of its own
    return folder, reproduce(folder, folder / "docs", TINY, ["stages"], jobs=1)


def test_reproduce_trains_the_chosen_tables_and_writes_down_all(
    reproduced: tuple[Path, dict[str, Any]],
) -> None:
    folder, found = reproduced
    record = json.loads((folder / "docs/results/reproduce.json").read_text())
    assert record == json.loads(json.dumps(found))
    assert set(record["tables"]) == set(COMPARISONS)
    lines = {line["arm"]: line for line in record["tables"]["stages"]["lines"]}
    assert all(line["seeds"] == [0] and line["tampered"] for line in lines.values())
    text = (folder / "docs/results.md").read_text()
    assert text == markdown(record)
    for comparison in COMPARISONS.values():
        assert f"## {comparison.title} ({comparison.paper})" in text
    assert "not measured" in text  # SFT, say
    for name in ("micro", "targets", "reliance"):
        assert json.loads((folder / f"docs/results/{name}.json").read_text())["command"]
    page = (folder / "report.html").read_text()
    assert page.count("data:image/svg+xml") >= len(COMPARISONS) + 5
    assert "Does the answer depend on the latents?" in page and "Watch the thought" in page
    assert not re.search(r'(src|href)="(?!data:|#)', page)  # no request leaves the page


def test_a_second_call_trains_and_probes_nothing_again(
    reproduced: tuple[Path, dict[str, Any]],
) -> None:
    folder, found = reproduced
    made = [*folder.rglob("model.safetensors"), *folder.rglob("states.safetensors")]
    before = {file: file.stat().st_mtime_ns for file in made}
    again = reproduce(folder, folder / "docs", TINY, ["stages"], jobs=1)
    assert before and before == {file: file.stat().st_mtime_ns for file in made}
    assert again["tables"] == found["tables"] and again["reliance"] == found["reliance"]


def test_a_table_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no comparison is called tables.*latent_sizes"):
        reproduce(tmp_path, tmp_path, TINY, ["tables"])


def test_a_folder_holds_runs_of_one_plan_but_seeds_can_be_added(tmp_path: Path) -> None:
    _belongs(tmp_path, TINY)
    _belongs(tmp_path, replace(TINY, seeds=3))
    longer = replace(TINY, size=replace(TINY.size, steps=70))
    with pytest.raises(ValueError, match=r"holds runs of other settings.*'steps': 7"):
        reproduce(tmp_path, tmp_path, longer, ["stages"])


def test_what_is_said_follows_the_figures(reproduced: tuple[Path, dict[str, Any]]) -> None:
    """The same sentence must come out the other way round when the figures do."""
    found = dict(reproduced[1])
    many = [True] * 60
    strong = {"full": [run("full", 0, many, [False] * 60)], "sft": [run("sft", 0, [False] * 60)]}
    weak = {"full": [run("full", 0, [False] * 60, [False] * 60)], "sft": [run("sft", 0, many)]}
    said = []
    for results in (strong, weak):
        found["tables"] = {name: table(of, results) for name, of in COMPARISONS.items()}
        said.append(findings(found)["main"][0])
    assert "+100.0 points" in said[0] and "as in Tables 1 and 2" in said[0]
    assert "-100.0 points" in said[1] and "unlike Tables 1 and 2" in said[1]

"""`storm reproduce`, in small: counting, saying, writing, and going on where it stopped."""

import json
import re
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from command_line import run_storm

from storm_vlm.analysis.reliance import KINDS
from storm_vlm.lab.arms import ARMS, COMPARISONS, STUDIES
from storm_vlm.lab.experiment import Size, read_results
from storm_vlm.lab.reproduce.comparison_table import comparison_table
from storm_vlm.lab.reproduce.evidence import FAST, FULL, Plan, _belongs, _cost, reproduce, study
from storm_vlm.lab.reproduce.evidence_page import markdown, table_rows
from storm_vlm.lab.reproduce.evidence_page import verdicts as verdicts_of

ROOT = Path(__file__).resolve().parent.parent
TINY = Plan(Size(train_rows=16, test_rows=8, ood_rows=2, steps=7), 1, probed=3, drawn=6, rounds=1)


def run(
    arm: str, seed: int, right: list[bool], swapped: list[bool | None] | None = None
) -> dict[str, Any]:
    """An arm's outcomes; `swapped`: whether it is right with another clip's latents, None without a donor."""
    outcomes = [{"correct": hit, "tokens": 2, "slots_used": 8} for hit in right]
    result: dict[str, Any] = {"arm": arm, "seed": seed, "test": outcomes, "ood": outcomes[:2]}
    if ARMS[arm].latent:
        swapped = swapped or [not hit for hit in right]
        kinds = {kind: swapped if kind.startswith("swap") else right for kind in KINDS}
        follows = [None if hit is None else not hit for hit in swapped]
        never = [None if hit is None else False for hit in swapped]
        result["tampered"] = {"right": kinds, "follows": follows, "follows_own": never}
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
    found = comparison_table(COMPARISONS["main"], RESULTS)
    lines = {line["arm"]: line for line in found["lines"]}
    assert lines["full"]["accuracy"].mean == 5 / 8 and lines["full"]["by_seed"] == [0.75, 0.5]
    assert lines["full"]["accuracy"].low < 5 / 8 < lines["full"]["accuracy"].high
    assert lines["full"]["behind"] is None and lines["cot"]["accuracy"] is None
    assert lines["sft"]["behind"].mean == 0.25  # of seed 1 alone, which both have
    assert lines["base"]["behind"].mean == 5 / 8  # its one run stands for both seeds
    tampered = lines["full"]["tampered"]
    assert tampered["swap_other_answer"].mean == 1 / 6  # rows without a donor do not count
    assert tampered["follows"].mean == 5 / 6 and tampered["follows_own"].mean == 0
    assert tampered["own"].mean == 5 / 8 and lines["sft"]["tampered"] is None
    cells = dict(zip(lines, table_rows(found), strict=True))
    assert cells["cot"][1] == "not measured" and cells["full"][1].startswith("62.5% (")
    assert {len(row) for row in cells.values()} == {10}
    assert cells["sft"][3] == lines["sft"]["paper_agrees"]


def test_an_arm_of_another_size_is_set_against_its_own_storm() -> None:
    results = {arm: [run(arm, 0, [arm == "deep_full"] * 4)] for arm in COMPARISONS["sizes"].arms}
    table = comparison_table(COMPARISONS["sizes"], results)
    lines = {line["arm"]: line for line in table["lines"]}
    assert lines["deep_sft"]["behind"].mean == 1 and lines["sft"]["behind"].mean == 0


def verdicts(name: str, ours: float, theirs: float) -> dict[str, str]:
    """By arm: the references are right with a share of `ours`, the other arms of `theirs`."""
    comparison = COMPARISONS[name]
    results = {}
    for arm in comparison.arms:
        leads = arm == comparison.reference or arm in comparison.rivals.values()
        share = ours if leads else theirs
        results[arm] = [run(arm, s, [i < 40 * share for i in range(40)]) for s in (0, 1)]
    lines = comparison_table(comparison, results)["lines"]
    return {
        line["arm"]: line["paper_agrees"] for line in lines if line["arm"] in comparison.claimed
    }


@pytest.mark.parametrize("name", ["main", "stages", "sizes", "latent_sizes"])
def test_the_paper_agrees_where_the_interval_says_so(name: str) -> None:
    for ours, theirs, verdict in (
        (1.0, 0.25, "yes"),
        (0.25, 1.0, "no"),
        (0.5, 0.5, "no difference shown"),
    ):
        found = verdicts(name, ours, theirs)
        assert len(found) >= 3 and set(found.values()) == {verdict}


@pytest.mark.parametrize("name", COMPARISONS)
def test_nothing_is_concluded_of_what_is_not_measured_or_not_learned(name: str) -> None:
    comparison = COMPARISONS[name]
    assert set(comparison.claimed) <= set(comparison.arms) - {comparison.reference}
    whole = {arm: [run(arm, 0, [True, False])] for arm in comparison.arms}
    for gone in comparison.arms:
        results = {arm: runs for arm, runs in whole.items() if arm != gone}
        lines = {line["arm"]: line for line in comparison_table(comparison, results)["lines"]}
        assert lines[gone]["paper_agrees"] == "" and lines[gone]["accuracy"] is None
        if gone == comparison.reference and not comparison.rivals:
            assert not any(line["paper_agrees"] for line in lines.values())
    rehearsed = comparison_table(comparison, whole, rehearsal=True)["lines"]
    assert not any(line["paper_agrees"] for line in rehearsed)
    said = {line["paper_agrees"] for line in comparison_table(comparison, whole)["lines"]}
    assert said - {"", "not in the paper"} == (
        {"no difference shown"} if comparison.claimed else set()
    )


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
    assert record == json.loads(json.dumps(found, default=asdict))
    assert set(record["tables"]) == set(COMPARISONS)
    lines = {line["arm"]: line for line in record["tables"]["stages"]["lines"]}
    assert all(line["seeds"] == [0] and line["tampered"] for line in lines.values())
    text = (folder / "docs/results.md").read_text()
    assert text == markdown(found)
    for comparison in COMPARISONS.values():
        assert f"## {comparison.title} ({comparison.paper})" in text
    assert "not measured" in text and "A rehearsal" in text  # SFT, say; and seven steps
    reliance = (folder / "docs/results/reliance.json").read_text()
    assert json.loads(reliance)["command"] and "NaN" not in reliance
    assert {"shortcuts", "chance", "perception"} == set(record["references"])
    page = (folder / "report.html").read_text()
    assert page.count("data:image/svg+xml") >= len(COMPARISONS) + 5
    assert "A rehearsal" in page and not re.search("as in the paper|unlike", page + text)
    assert [line for line in verdicts_of(found) if "rehearsal" not in line] == []
    assert "Does the answer depend on the latents?" in page and "Watch the thought" in page
    assert not re.search(r'(src|href)="(?!data:|#)', page)  # no request leaves the page


def test_a_second_call_does_nothing_again(reproduced: tuple[Path, dict[str, Any]]) -> None:
    folder, found = reproduced
    patterns = (
        "model.safetensors",
        "*.json.gz",
        "latency.json",
        "examples.json",
        "states/*/*.safetensors",
    )
    made = {file: file.stat().st_mtime_ns for name in patterns for file in folder.rglob(name)}
    again = reproduce(folder, folder / "docs", TINY, ["stages"], jobs=1)
    assert len(made) >= 12 and made == {file: file.stat().st_mtime_ns for file in made}
    assert again["tables"] == found["tables"] and again["reliance"] == found["reliance"]


def test_outcomes_are_enough_to_go_on_with_on_another_machine(
    reproduced: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    """Nothing is trained again where the outcomes lie, and tables and intervals are the same."""
    folder, found = reproduced
    shutil.copytree(folder / "docs", tmp_path / "docs")
    shutil.copy(folder / "latency.json", tmp_path)
    again = reproduce(tmp_path, tmp_path / "docs", TINY, ["stages"], jobs=1)
    assert again["tables"] == found["tables"] and again["cost"] == found["cost"]
    assert not list(tmp_path.glob("*-0"))
    # Only the model that is looked into has to be there; without it, the shipped one is.
    assert found["analysed"] == "STORM of seed 0" and again["analysed"] == "the shipped STORM"


def test_the_shipped_tables_are_made_of_the_shipped_outcomes() -> None:
    """Which the shipped configs gave: after a change of one, the runs that it concerns are to be done again."""
    docs = ROOT / "docs" / "results"
    recorded = read_results(docs / "outcomes", FULL.size)
    studied = read_results(docs / "method", FULL.size)
    for file, comparisons, made in (
        ("reproduce.json", COMPARISONS, recorded),
        ("method.json", STUDIES, studied),
    ):
        record = json.loads((docs / file).read_text())
        assert record["cost"] == _cost(made) and set(record["tables"]) == set(comparisons)
        for name, comparison in comparisons.items():
            assert record["tables"][name] == json.loads(
                json.dumps(comparison_table(comparison, studied | recorded), default=asdict)
            )


def test_a_study_leaves_the_record_alone_and_takes_its_runs(
    reproduced: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, out = reproduced[0], tmp_path / "docs"
    shutil.copytree(folder / "docs", out)
    before = {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}
    arms = ("stage1_only", "third_first", "answers_anchored_fast")
    comparison = replace(STUDIES["answers"], arms=arms, reference="stage1_only", rivals={})
    monkeypatch.setitem(STUDIES, "answers", comparison)
    monkeypatch.setattr("storm_vlm.lab.reproduce.evidence.STUDIES", {"answers": comparison})
    found = study(tmp_path, out, TINY, ["answers"], 1, "storm reproduce --table answers")
    assert all(line["seeds"] == [0] for line in found["tables"]["answers"]["lines"])
    made = {file.name for file in (out / "results" / "method").glob("*.gz")}
    assert made == {"third_first-0.json.gz", "answers_anchored_fast-0.json.gz"}
    assert before == {file: file.read_bytes() for file in before}
    assert "(seed 0)" in (out / "results" / "method.md").read_text()
    (run_made,) = read_results(out / "results" / "method", TINY.size)["answers_anchored_fast"]
    assert run_made["recipe"]["start"]["share_of_rows"] == 1 / 3  # of the arm that it starts from


def test_an_arm_that_others_start_from_is_in_their_table() -> None:
    """Or two of them would train it at the same time."""
    for comparison in (COMPARISONS | STUDIES).values():
        assert {ARMS[arm].after for arm in comparison.arms} <= {None, *comparison.arms}


def test_a_table_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no comparison is called tables.*latent_sizes"):
        reproduce(tmp_path, tmp_path, TINY, ["tables"])


def test_a_folder_holds_runs_of_one_plan_but_seeds_can_be_added(tmp_path: Path) -> None:
    outcomes = tmp_path / "results" / "outcomes"
    _belongs(outcomes, TINY)
    _belongs(outcomes, replace(TINY, seeds=3))
    (outcomes / "sft-0.json.gz").touch()
    longer = replace(TINY, size=replace(TINY.size, steps=70))
    with pytest.raises(ValueError, match=r"holds runs of other settings.*'steps': 7"):
        reproduce(tmp_path / "new", tmp_path, longer, ["stages"])
    with pytest.raises(ValueError, match=r"holds runs of other settings.*'steps': 7"):
        reproduce(outcomes, tmp_path / "new", longer, ["stages"])  # in place of checkpoints


def test_the_verb_hands_its_options_on(tmp_path: Path) -> None:
    """A folder of another plan is refused before anything is done, and the refusal shows what was asked for."""
    _belongs(tmp_path / "results" / "outcomes", TINY)
    (tmp_path / "results" / "outcomes" / "sft-0.json.gz").touch()
    for options, plan in (([], FULL), (["--fast"], FAST), (["--steps", "70"], FULL)):
        size = replace(plan.size, steps=70 if "--steps" in options else plan.size.steps)
        result = run_storm("reproduce", tmp_path, *options)
        assert result.exit_code == 1 and str(tmp_path) in result.stderr
        assert f"steps={size.steps}" in result.stderr

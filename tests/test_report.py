"""Runs read back, compared and laid out; through the command line, too."""

import csv
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from command_line import run_storm
from runs_on_disk import chance, make_records, write_reliance, write_run

from storm_vlm.evaluation.compare import compare, differences, overall, survives_shuffling
from storm_vlm.evaluation.report import write_report
from storm_vlm.evaluation.result_tables import PAPER_FILE, build_tables, measure
from storm_vlm.evaluation.run_folder import RunError, find_runs, read_run
from storm_vlm.evaluation.statistics import Estimate
from storm_vlm.evaluation.summary import Score, summarize


def test_a_run_is_read_as_it_was_written_in_one_file_or_in_shards(tmp_path) -> None:
    records = make_records(chance(0.5, 0))
    whole = read_run(write_run(tmp_path / "whole", records))
    assert list(whole.records) == records
    assert (whole.benchmark, whole.system, whole.control) == ("videomme", "storm · 7b", "")
    sharded = read_run(write_run(tmp_path / "sharded", records, shards=3, control="one_frame"))
    assert {r.id: r for r in sharded.records} == {r.id: r for r in records}
    assert sharded.control == "one_frame"
    assert [run.folder for run in find_runs([tmp_path])] == [sharded.folder, whole.folder]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda lines: [*lines[:-1], lines[-1][:40]],
            r"answers-0.jsonl:12: torn or malformed line",
        ),
        (
            lambda lines: [*lines, lines[3]],
            r"answers-0.jsonl:13: id: 'q3' is at .*answers-0.jsonl:4",
        ),
        (lambda lines: ["{}", *lines], r"answers-0.jsonl:1: id: Field required"),
        (
            lambda lines: [lines[0].replace('"correct": ', '"correct": "maybe", "x": ')],
            r":1: correct",
        ),
        (lambda lines: ["[1]"], r"answers-0.jsonl:1: "),
    ],
)
def test_what_is_not_a_whole_run_is_refused_by_line(tmp_path, spoil, message) -> None:
    folder = write_run(tmp_path / "run", make_records(lambda i: True, 12))
    file = folder / "answers-0.jsonl"
    file.write_text("\n".join(spoil(file.read_text().splitlines())))
    with pytest.raises(RunError, match=message):
        read_run(folder)


def test_a_folder_that_is_no_run_says_what_is_missing(tmp_path) -> None:
    with pytest.raises(OSError, match=r"no run\.json"):
        find_runs([tmp_path])
    folder = write_run(tmp_path / "run", make_records(lambda i: True, 3))
    (folder / "answers-0.jsonl").unlink()
    with pytest.raises(OSError, match=r"no answers-"):
        read_run(folder)
    (folder / "run.json").write_text("{}")
    with pytest.raises(RunError, match="benchmark: missing"):
        read_run(folder)


def test_summary_counts_what_went_wrong_in_the_denominator(tmp_path) -> None:
    records = make_records(lambda i: i % 2 == 0, 12)
    records[0] = replace(records[0], correct=False, parsed=False, official=None)
    records[1] = replace(records[1], reply=None, parsed=False, official=None, error="no such video")
    found = summarize(read_run(write_run(tmp_path / "run", records, n_expected=20)))
    assert found.n == 12 and found.n_expected == 20 and found.videos == 4
    assert found.accuracy.mean == pytest.approx(5 / 12)
    assert found.unparsed == found.errors == pytest.approx(1 / 12)
    # By Video-MME's rule: one without a verdict and one that could not be asked are not left out.
    source = "github.com/BradyFU/Video-MME: evaluation/eval_your_results.py at 49a2e67^"
    assert found.official == Score(5 / 12, 11, "authors", source)
    assert found.accuracy.low <= found.accuracy.mean <= found.accuracy.high
    # By duration: every fourth is long, all even: q0 unparsed, q4 and q8 right.
    duration = found.groups["duration"]
    assert duration.categories["long"].accuracy.mean == pytest.approx(2 / 3)
    assert duration.categories["short"].accuracy.mean == pytest.approx(3 / 9)
    assert duration.macro.mean == pytest.approx((2 / 3 + 3 / 9) / 2)
    # Rules look at the raw text again: q0 said its letter after all; the video that failed said none.
    lmms = found.rules["lmms-eval"]
    assert (lmms.accuracy, lmms.scored) == (0.5, 12) and "lmms-eval 0.7.3" in lmms.source
    assert found.seconds and found.seconds.total.n == 11 and found.slots_used == 8
    assert found.seconds.phases["decode"] == pytest.approx(0.1)


def test_an_error_is_wrong_by_every_rule(tmp_path) -> None:
    """MVBench's own rule takes "" for right; a video that could not be read is not that."""
    failed = [
        replace(record, reply=None, correct=False, parsed=False, error="no such video")
        for record in make_records(lambda i: True, 6)
    ]
    found = summarize(read_run(write_run(tmp_path / "run", failed, benchmark="mvbench")))
    assert found.rules["authors"].accuracy == 0 and found.seconds is None


def test_compare_pairs_by_question_whatever_the_order(tmp_path) -> None:
    ours, theirs = chance(0.7, 1), chance(0.4, 2)
    a = read_run(write_run(tmp_path / "a", make_records(ours), shards=2))
    b = read_run(write_run(tmp_path / "b", make_records(theirs), frames={"n": 16}))
    found = compare([a], [b])
    hits = [(ours(i), theirs(i)) for i in range(120)]
    assert found.only_ours == sum(x and not y for x, y in hits)
    assert found.only_theirs == sum(y and not x for x, y in hits)
    assert found.difference.mean == pytest.approx(found.ours - found.theirs)
    assert found.difference.mean * 120 == pytest.approx(found.only_ours - found.only_theirs)
    assert found.difference.low > 0
    assert found.groups["duration"]["long"].n == 30
    assert found.differs == {"frames.n": (32, 16)}
    assert compare([b], [a]).difference.mean == -found.difference.mean
    same = compare([a], [a])
    assert same.difference == Estimate(0, 0, 0, 120)
    assert same.differs == {} and same.only_ours == same.only_theirs == 0


def test_compare_takes_seeds_on_either_side(tmp_path) -> None:
    for seed in range(3):
        write_run(tmp_path / f"ours/{seed}", make_records(chance(0.6, seed)), seed=seed)
    one = [read_run(write_run(tmp_path / "theirs", make_records(chance(0.4, 9))))]
    ours = find_runs([tmp_path / "ours"])
    found = compare(ours, one)
    assert found.seeds == 3
    singles = [compare([run], one).difference.mean for run in ours]
    assert found.difference.mean == pytest.approx(sum(singles) / 3)
    with pytest.raises(ValueError, match="3 runs cannot be paired with 2"):
        compare(ours, ours[:2])


def test_compare_refuses_runs_on_other_questions(tmp_path) -> None:
    records = make_records(lambda i: True, 12)
    a = read_run(write_run(tmp_path / "a", records))
    fewer = read_run(write_run(tmp_path / "fewer", records[:-2]))
    with pytest.raises(ValueError, match="different questions: 2 are in one only, as 'q10'"):
        compare([a], [fewer])
    other = read_run(write_run(tmp_path / "other", records, benchmark="mvbench"))
    with pytest.raises(ValueError, match="compare like with like"):
        compare([a], [other])
    changed = [*records[:-1], replace(records[-1], answer="red")]
    with pytest.raises(ValueError, match="differ in the answer of 'q11'"):
        compare([a], [read_run(write_run(tmp_path / "changed", changed))])


def test_differences_are_found_at_any_depth() -> None:
    ours = {"model": "a", "frames": {"n": 32, "px": [1, 2]}, "new": 1}
    theirs = {"model": "b", "frames": {"n": 32, "px": [1, 3]}}
    assert differences(ours, theirs) == {
        "model": ("a", "b"),
        "frames.px": ([1, 2], [1, 3]),
        "new": (1, None),
    }


def suite(folder: Path, gain_survives: bool) -> list[Path]:
    """A baseline and STORM, as asked and with shuffled frames: STORM's gain is about order, or it is not."""
    base, storm = chance(0.4, 1), chance(0.8, 2)
    lost = storm if gain_survives else base
    return [
        write_run(folder / "base", make_records(base, seconds=1.0), reasoner="direct"),
        write_run(folder / "storm", make_records(storm)),
        write_run(
            folder / "base-s", make_records(base), reasoner="direct", control="shuffled_frames"
        ),
        write_run(folder / "storm-s", make_records(lost), control="shuffled_frames"),
    ]


@pytest.mark.parametrize("survives", [True, False])
def test_a_gain_that_survives_shuffling_is_not_temporal(tmp_path, survives) -> None:
    base, storm, base_s, storm_s = find_runs(suite(tmp_path, survives))
    found = survives_shuffling(storm, base, storm_s, base_s)
    assert found.gain.low > 0 and found.not_temporal is survives
    assert (found.loss.low > 0) is not survives
    tables = {table.title: table for table in build_tables(measure([base, storm, base_s, storm_s]))}
    cell = tables["Gain over direct · 7b, points"].lines[0].cells[1]
    assert cell.warning is survives and ("not temporal" in cell.small) is survives
    assert survives_shuffling(base, storm, base_s, storm_s).not_temporal is None  # no gain


def test_report_writes_what_the_runs_say(tmp_path) -> None:
    runs = find_runs(suite(tmp_path / "runs", True))
    tables = {table.title: table for table in write_report(runs, tmp_path / "out")}
    assert list(tables) == [
        "Table 1: general video understanding",
        "Gain over direct · 7b, points",
        "Controls",
        "Table 4: latency",
        "VideoMME by duration",
        "VideoMME by task type",
    ]
    main = tables["Table 1: general video understanding"]
    assert main.columns == ("system", "VideoMME", "MVBench", "TempCompass")
    storm = summarize(runs[1])
    assert main.lines[1].cells[1].text.startswith(f"{100 * storm.accuracy.mean:.1f} [")
    assert "n 120 · unparsed 0.0% · official" in main.lines[1].cells[1].small
    assert [cell.text for cell in main.lines[1].cells[2:]] == ["-", "-"]
    latency = tables["Table 4: latency"].lines
    assert latency[0].cells[3].text == "1.00x" and latency[1].cells[3].text == "0.51x"
    rows = list(csv.DictReader((tmp_path / "out/report.csv").open()))
    overall = {(r["system"], r["control"]): r for r in rows if r["category"] == "all"}
    assert float(overall["storm · 7b", ""]["accuracy"]) == pytest.approx(storm.accuracy.mean)
    assert len(overall) == 4
    text = (tmp_path / "out/report.md").read_text()
    for line in text.splitlines():
        if line.startswith("|"):
            assert line.count("|") in {3, 4, 5, 9}, line
    page = (tmp_path / "out/report.html").read_text()
    assert not re.findall(r'(?:src|href)="[^#]|url\(|@import', page)
    assert "not temporal" in page and "prefers-color-scheme: dark" in page


def test_latent_reliance_stands_beside_the_accuracy(tmp_path) -> None:
    base, storm, *_ = suite(tmp_path / "runs", True)
    other = write_run(tmp_path / "other", make_records(chance(0.5, 3)), model="m/3b")
    write_reliance(storm)
    write_reliance(other, loss=0.02, low=-0.01, n=120)
    runs = find_runs([base, storm, other])
    table = {t.title: t for t in write_report(runs, tmp_path / "out")}["Latent reliance"]
    assert [line.cells[0].small for line in table.lines] == ["7b", "3b"]  # the first has no latents
    ours, theirs = (line.cells[1:] for line in table.lines)
    assert [cell.text for cell in ours] == [
        *("VideoMME", "80.0 [70.0, 90.0]", "30.0 [20.0, 40.0]", "-50.0 [-60.0, -40.0]"),
        *("45.0 [35.0, 55.0]", "20.0 [10.0, 30.0]", "60"),
    ]
    assert [cell.small for cell in ours] == ["", "", "n 55", "", "10.0 with own", "", "of 120"]
    assert theirs[3].small == "not shown to matter" and theirs[-1].small == ""
    assert [cell.warning for cell in (ours[3], theirs[3])] == [False, True]
    for file in ("report.md", "report.html"):
        assert "-50.0 [-60.0, -40.0]" in (tmp_path / "out" / file).read_text(), file
    lines = csv.DictReader((tmp_path / "out/report.csv").open())
    fed = {r["category"]: r for r in lines if r["group"] == "latents fed" and "7b" in r["system"]}
    assert list(fed) == ["own", "swap_same_answer", "swap_other_answer", "removed"]
    assert (fed["own"]["accuracy"], fed["swap_other_answer"]["n"]) == ("0.8", "55")
    assert fed["swap_same_answer"]["accuracy"] == ""


@pytest.mark.parametrize("text", ["{", '{"reliance": {}}', "[]"])
def test_another_file_in_the_place_of_reliance_is_refused(tmp_path, text) -> None:
    folder = write_run(tmp_path / "run", make_records(lambda i: True, 3))
    (folder / "reliance.json").write_text(text)
    with pytest.raises(RunError, match=r"reliance\.json: not "):
        read_run(folder)


def test_text_of_a_run_cannot_break_the_page(tmp_path) -> None:
    odd = "<script>x</script>|*"
    run = read_run(write_run(tmp_path / "r", make_records(chance(0.5, 0)), reasoner=odd))
    write_report([run], tmp_path / "out")
    assert "<script>" not in (tmp_path / "out/report.html").read_text()
    text = (tmp_path / "out/report.md").read_text()
    assert "script>\\|\\*" in text and "script>|" not in text


def test_an_unfinished_run_is_marked(tmp_path) -> None:
    run = read_run(write_run(tmp_path / "r", make_records(chance(0.5, 0)), n_expected=2700))
    cell = build_tables(measure([run]))[0].lines[0].cells[1]
    assert cell.warning and "only 120 of 2,700" in cell.small
    with pytest.raises(ValueError, match="is given twice"):
        measure([run, run, run])


def test_the_papers_figures_stand_with_their_corrections(tmp_path) -> None:
    run = read_run(write_run(tmp_path / "r", make_records(chance(0.5, 0))))
    tables = {table.title[:7]: table for table in build_tables(measure([run]), with_paper=True)}
    assert not any(line.paper for table in build_tables(measure([run])) for line in table.lines)
    table = tables["Table 1"]
    video_r1 = [line for line in table.lines if line.cells[0].text == "Video-R1-7B *"]
    assert [line.cells[0].small for line in video_r1] == [
        "16 frames, not 32 as printed; paper",
        "32 frames; not in the paper",
    ]
    assert [line.cells[1].text for line in video_r1] == ["57.4", "59.3"]
    notes = "\n".join(table.notes)
    for correction in (
        "16-frame figures",
        "digit for digit",
        "without subtitles",
        "could not be parsed",
    ):
        assert correction in notes
    assert "128 frames" in "\n".join(tables["Table 2"].notes)
    assert [line.cells[2].text for line in tables["Table 4"].lines[1:]] == ["15.44", "17.2", "0.47"]
    assert "compare only what was timed on one machine" in "\n".join(tables["Table 4"].notes)
    for row in yaml.safe_load(PAPER_FILE.read_text())["rows"]:
        assert ("notes" in row) == ("source" in row), row["model"]
        assert set(row.get("notes", ())) <= set(row), row["model"]  # shown only beside a figure


def test_commands(tmp_path) -> None:
    suite(tmp_path / "runs", False)
    storm, base = str(tmp_path / "runs/storm"), str(tmp_path / "runs/base")
    said = run_storm("compare", storm, base, "--json")
    assert json.loads(said.output)["differs"] == {"reasoner": ["storm", "direct"]}
    said = run_storm("compare", storm, base)
    assert said.exit_code == 0 and "differ in: reasoner: storm / direct" in said.output
    assert "by duration" in said.output and "40 videos" in said.output
    out = tmp_path / "out"
    said = run_storm("report", base, storm, "--out", str(out), "--paper")
    assert said.exit_code == 0, said.output
    assert sorted(file.name for file in out.iterdir()) == ["report.csv", "report.html", "report.md"]
    assert "STORM (7B)" in said.output and "Gain over direct" in said.output
    assert "…" not in said.stdout and "s per item      1.02 [1.02, 1.02]" in said.stdout
    tables = [line for line in said.stdout.splitlines() if not line.startswith(("- ", "wrote"))]
    assert max(map(len, tables)) <= 80
    said = run_storm("download", "imagenet", str(tmp_path))
    assert said.exit_code == 2 and "choose from videomme" in said.stderr


def test_a_long_setting_is_cut_where_runs_are_compared(tmp_path) -> None:
    suite(tmp_path, False)
    description = json.loads((tmp_path / "base/run.json").read_text())
    changed = description | {"first_prompt": "Where?\n" * 99}
    (tmp_path / "base/run.json").write_text(json.dumps(changed))
    said = run_storm("compare", tmp_path / "storm", tmp_path / "base")
    assert "first_prompt: " in said.stdout and max(map(len, said.stdout.splitlines())) < 130


def test_intervals_of_runs_are_over_videos(tmp_path) -> None:
    """Three questions of a video that are right or wrong together tell as much as one."""
    by_video, theirs = chance(0.5, 4), make_records(lambda i: False)
    ours = make_records(lambda i: by_video(i // 3))
    apart = [[replace(r, video=r.id) for r in records] for records in (ours, theirs)]
    a, b, c, d = (
        read_run(write_run(tmp_path / str(i), records))
        for i, records in enumerate((ours, theirs, *apart))
    )

    def ratio(videos: Estimate, questions: Estimate) -> float:
        return (videos.high - videos.low) / (questions.high - questions.low)

    together, single = summarize(a), summarize(c)
    assert ratio(together.accuracy, single.accuracy) > 1.4
    kinds = [s.groups["task_type"].macro for s in (together, single)]
    assert ratio(*kinds) > 1.4
    for way in (overall, compare):
        widths = [way([x], [y]).difference for x, y in ((a, b), (c, d))]
        assert ratio(*widths) > 1.4


def test_a_loss_within_its_interval_is_no_loss(tmp_path) -> None:
    base, storm = chance(0.4, 1), chance(0.8, 2)
    lucky = next(i for i in range(120) if storm(i))
    shuffled = make_records(lambda i: storm(i) and i != lucky)
    runs = [make_records(storm), make_records(base), shuffled, make_records(base)]
    found = survives_shuffling(
        *(read_run(write_run(tmp_path / str(i), r)) for i, r in enumerate(runs))
    )
    assert found.loss.mean > 0 and found.not_temporal is True

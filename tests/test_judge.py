"""Official figures where no rule decides: a lower bound without a judge, and what a judge makes of it."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from runs_on_disk import make_records, write_run
from scripted_endpoint import serving

from storm_vlm.cli.main import app
from storm_vlm.evaluation.benchmarks import BENCHMARKS
from storm_vlm.evaluation.controls import CONTROLS
from storm_vlm.evaluation.judge import verdict
from storm_vlm.evaluation.report import write_report
from storm_vlm.evaluation.run_folder import read_run
from storm_vlm.evaluation.summary import summarize
from storm_vlm.inference.reply import Reply

ANSWERS = {"v0": "Dolly zoom", "v1": "Panning", "v2": "Fresco"}


@pytest.fixture
def mmvu(tmp_path: Path) -> tuple[Path, Path]:
    """Three open questions, and a run that answers each with "a pan shot" """
    published = [
        {
            "id": id,
            "video": f"https://h/videos/Art/{id}.mp4",
            "question_type": "open-ended",
            "metadata": {"subject": "Art"},
            "question": "Which technique?",
            "choices": dict.fromkeys("ABCDE", ""),
            "answer": answer,
        }
        for id, answer in ANSWERS.items()
    ]
    folder = tmp_path / "mmvu"
    folder.mkdir()
    (folder / "validation.json").write_text(json.dumps(published))
    benchmark = BENCHMARKS["mmvu_open"]()
    records = [
        replace(
            record,
            id=row.id,
            options=(),
            answer=row.answer,
            reply=Reply(said),
            correct=False,
            official=benchmark.official_score(said, row),
        )
        for record, row, said in zip(
            make_records(bool, 3), benchmark.read(folder), ("o", "a pan shot", "oil"), strict=True
        )
    ]
    return write_run(tmp_path / "run", records, benchmark="mmvu_open"), folder


def test_without_a_judge_the_figure_is_over_all_answers_and_says_that_it_is_a_lower_bound(
    mmvu, tmp_path
) -> None:
    run, _ = mmvu
    official = summarize(read_run(run)).official
    assert official.accuracy == pytest.approx(1 / 3) and official.scored == 1
    assert official.rule == "lmms-eval"
    write_report([read_run(run)], tmp_path / "report")
    said = (tmp_path / "report/report.md").read_text()
    assert "official (lmms-eval) at least 33.3, no verdict on 2" in said
    line = (tmp_path / "report/report.csv").read_text().splitlines()[1]
    assert ",lmms-eval,lmms-eval 0.7.3: lmms_eval/tasks/mmvu/utils.py," in line


def test_a_judge_is_asked_once_about_each_answer(mmvu, tmp_path, capsys) -> None:
    run, folder = mmvu

    def right(messages) -> str:
        return json.dumps({"answer": "x", "correct": "a pan shot" in messages[-1]["content"]})

    with serving(right) as (url, requests):
        command = ["judge", str(run), str(folder), "--model", "j", "--base-url", url, "--json"]
        app(command, result_action="return_value")
        assert json.loads(capsys.readouterr().out)["accuracy"] == pytest.approx(1 / 3)
        assert len(requests) == 3 and "Right answer: Panning" in str(requests)
        app(command, result_action="return_value")
        assert len(requests) == 3
    judged = read_run(run).judged
    assert judged and judged.verdicts == {"v0": 0, "v1": 1, "v2": 0} and judged.cached == 3
    official = summarize(read_run(run)).official
    assert (official.scored, official.rule) == (3, "authors, judged by j")


def test_what_a_judge_does_not_decide_stays_undecided(mmvu) -> None:
    run, folder = mmvu
    with serving(lambda messages: "I would rather not say.") as (url, _):
        command = ["judge", str(run), str(folder), "--model", "j", "--base-url", url]
        app(command, result_action="return_value")
    judged = read_run(run).judged
    assert judged and judged.verdicts == {} and judged.unread == 3
    assert summarize(read_run(run)).official.accuracy == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("reply", "score"),
    [
        ('{"correct": true}', 1),
        ('Well.\n```json\n{"answer": "a", "correct": false}\n```', 0),
        ('{"scores": [5, 0]}', 0.5),
        ('{"scores": [6, 0]}', None),
        ('{"scores": []}', None),
        ('{"correct": "yes"}', None),
        ('{"choice": "B"}', 1),
        ('{"choice": ""}', 0),
        ("correct", None),
    ],
)
def test_a_verdict_is_json(reply, score) -> None:
    assert verdict(reply, "B. it rises") == score


def test_vsi_bench_is_the_mean_over_its_tasks_with_the_directions_averaged_first(tmp_path) -> None:
    kinds = [("easy", 1.0), *[("medium", 1.0), ("medium", 0.0)], *[("hard", 0.0)] * 3]
    records = [
        replace(
            record,
            groups={
                "kind": "object_rel_direction" if kind else "object_counting",
                "question_type": f"object_rel_direction_{kind}" if kind else "object_counting",
            },
            official=score,
        )
        for record, (kind, score) in zip(make_records(bool, 7), [*kinds, ("", 0.8)], strict=True)
    ]
    found = summarize(read_run(write_run(tmp_path / "run", records, benchmark="vsibench")))
    assert found.official.accuracy == pytest.approx(((1 + 0.5 + 0) / 3 + 0.8) / 2)
    direction = found.groups["kind"].categories["object_rel_direction"]
    assert direction.official.accuracy == pytest.approx(0.5)


@pytest.mark.parametrize("task", ["multi-choice", "yes_no", "caption_matching"])
def test_tempcompass_knows_the_letters_of_our_prompt_permuted_or_not(tmp_path, task) -> None:
    asked = {
        "multi-choice": ("What is he doing?\nA. passing\nB. dribbling\nC. dunking", "C. dunking"),
        "yes_no": ("Is he sitting?", "no"),
        "caption_matching": (
            "Which fits?\nOption 1: He sits.\nOption 2: He runs.",
            "Option 2: He runs.",
        ),
    }
    question, answer = asked[task]
    entry = {"video_id": "1", "dim": "action", "question": question, "answer": answer}
    folder = tmp_path / task
    folder.mkdir()
    (folder / f"{task}.json").write_text(json.dumps([entry]))
    benchmark = BENCHMARKS["tempcompass"]()
    (row,) = benchmark.read(folder)
    for number in range(8):
        permuted = CONTROLS["permuted_options"]().row(row.model_copy(update={"id": str(number)}))
        for index, option in enumerate(permuted.options):
            said = benchmark.official_score("ABC"[index], permuted)
            assert said == float(option == row.answer)
    assert benchmark.official_score(answer, row) == 1

"""The control arms of a user's own Stage I and II: what differs, what is searched, and one study in small."""

import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml
from command_line import run_storm

from storm_vlm.analysis.controls import (
    ARMS,
    Command,
    Processes,
    Study,
    Trial,
    chain,
    check,
    controls,
    flops_ratio,
    longer,
)
from storm_vlm.data.answer import is_correct
from storm_vlm.data.row import Row
from storm_vlm.errors import StormError
from storm_vlm.lab.checkpoints import shipped
from storm_vlm.lab.micro_config import MICRO_CONFIGS
from storm_vlm.training.config import load_config
from storm_vlm.training.plan_request import PlanRequest
from storm_vlm.training.planning import plan


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory, reasoning_file: Path) -> Study:
    folder = tmp_path_factory.mktemp("study")
    for name in ("stage1", "stage2"):
        changes = {"model": str(shipped("backbone")), "data": str(reasoning_file)}
        changes |= {"training.max_steps": 1, "training.per_device_train_batch_size": 2}  # type: ignore[dict-item]
        config = load_config(MICRO_CONFIGS / f"{name}.yaml", changes)
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    files = (folder / "stage1.yaml", folder / "stage2.yaml", reasoning_file, reasoning_file)
    return Study(*files, folder / "out")


def test_arms_differ_in_what_they_are_named_for_alone(study: Study) -> None:
    check(study)
    ours = study.configs(Trial("storm", 1.0, 2))
    assert [c.training["learning_rate"] for c in ours] == [8e-3, 1e-4]
    assert ours[1].model == ours[0].output_dir and ours[0].training["seed"] == 2
    seen = {}
    for arm in ARMS:
        stages = study.configs(Trial(arm, 3.0, 0))
        assert [c.training["learning_rate"] for c in stages] == pytest.approx([24e-3, 3e-4])
        seen[arm] = [config.method for config in stages]
        for mine, theirs in zip(stages, ours, strict=True):
            assert mine.num_frames == theirs.num_frames and mine.muon == theirs.muon
            same = {k: v for k, v in mine.training.items() if k not in ("learning_rate", "seed")}
            if arm != "sft_compute":
                assert same.items() <= theirs.training.items()
            assert (mine.data == theirs.data) == (arm != "cot")
    for arm in ("sft", "sft_compute", "cot"):
        assert [m.latent_budget for m in seen[arm]] == [0, 0]
    assert {m.slot_input for m in seen["pause"]} == {"pause"} and seen["pause"][
        0
    ].latent_budget == 8
    assert seen["markers"][0].latent_budget == 1 and seen["markers"][0].slot_input == "pause"
    assert [m.target_source for m in seen["shuffled"]] == ["shuffled", "thought_video"]
    assert {m.bottleneck for m in seen["bottleneck"]} == {"answer"}


def test_the_compute_matched_arm_takes_as_many_flops(study: Study) -> None:
    model = str(shipped("backbone"))
    ratio = flops_ratio(study.stage2, model)
    config = load_config(study.stage2)
    costs = plan(model, PlanRequest(num_frames=6, width=112, height=112)).steps
    assert ratio == pytest.approx(costs["Stage II"].flops / costs["SFT"].flops, rel=0.1)
    assert flops_ratio(study.stage1, model) > ratio > 1  # targets are encoded, too
    config = config.model_copy(update={"training": {"max_steps": 1000}})
    assert longer(config, 1.25) == {"training.max_steps": 1250}
    config = config.model_copy(update={"training": {"num_train_epochs": 2}})
    assert longer(config, 1.25) == {"training.num_train_epochs": 2.5}


def test_a_chain_is_the_plan_and_its_answer_is_found(reasoning_rows: list[Row]) -> None:
    changes = {"options": ("a1", "b2"), "answer": "b2", "plan": "It turns. The answer is b2."}
    row = reasoning_rows[0].model_copy(update=changes)
    taught = chain(row)
    assert taught.answer == "<think>It turns.</think><answer>B</answer>" and not taught.options
    assert "A. a1\nB. b2" in taught.question and is_correct(taught.answer, row)
    assert chain(row.model_copy(update={"plan": None})).answer == "<answer>B</answer>"


def test_a_study_searches_chooses_and_goes_on(study: Study) -> None:
    ran: list[Command] = []

    def launch(command: Command, file: Path) -> None:
        ran.append(command)
        done = run_storm(*command)
        if done.exit_code:
            raise StormError(done.stderr)

    small = Study(**{**vars(study), "arms": ("storm", "cot"), "factors": (0.1, 1.0), "seeds": 1})
    found = controls(small, launch)
    assert [command[0] for command in ran].count("train") == 8  # two arms, two factors, two stages
    answered = [command[command.index("--out") + 1] for command in ran if command[0] == "evaluate"]
    assert [Path(folder).name for folder in answered] == ["validation"] * 4 + ["test"] * 2
    for arm in ("storm", "cot"):
        best = max(found[arm].validation.values())
        assert found[arm].validation[found[arm].factor] == best and set(found[arm].validation) == {
            0.1,
            1.0,
        }
    assert found["cot"].gain and found["storm"].gain is None and len(found["storm"].verdicts) == 1
    said = (small.out / "controls.md").read_text()
    assert "against the best of them (text chain of thought" in said and "latents matter" in said
    assert json.loads((small.out / "controls.json").read_text())["cot"]["tokens"] > 3
    assert len(found["storm"].by_seed) == len(found["storm"].swapped) == 1
    assert not found["cot"].swapped
    ran.clear()
    assert controls(small, launch) == found
    assert {command[0] for command in ran} == {"evaluate"}  # which finds its answers there


def test_what_cannot_be_compared_is_refused_before_anything_runs(
    study: Study, tmp_path: Path
) -> None:
    arguments = ["controls", study.stage1, study.stage2, "--validation", study.validation]
    arguments += ["--test", study.test, "--out", tmp_path / "out"]
    unknown = run_storm(*arguments, "--arm", "coconut")
    assert unknown.exit_code == 1 and "choose from storm, sft" in unknown.stderr
    shown = run_storm(
        *arguments, "--arm", "pause", "--rate", 2, "--dry-run", "--launch", "torchrun x"
    )
    assert shown.exit_code == 0 and shown.stdout.count("torchrun x train") == 2
    assert not list((tmp_path / "out").rglob("*.safetensors"))


def test_a_failure_is_named_and_nothing_more_is_begun(study: Study, tmp_path: Path) -> None:
    small = Study(**{**vars(study), "out": tmp_path / "out", "arms": ("storm", "sft", "pause")})
    with (
        Processes(("sh", "-c", "echo; exit 3")) as processes,
        pytest.raises(StormError, match="train failed: see"),
    ):
        controls(small, processes)
    assert len(list((tmp_path / "out").rglob("*.log"))) <= 2  # of nine trials


def test_processes_end_with_their_block(tmp_path: Path) -> None:
    with Processes(("sleep", "60")) as processes:
        pool = ThreadPoolExecutor(1)
        running = pool.submit(processes, ("60",), tmp_path / "log")
        while not processes._running:
            time.sleep(0.01)
    with pytest.raises(StormError, match="storm 60 failed"):
        running.result(5)

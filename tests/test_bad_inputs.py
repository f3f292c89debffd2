"""What people type by mistake, over the verbs: one line that names the thing and the mend."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command_line import Result, run_storm

from storm_vlm.data.row import Row, RowError, read_rows, scan_rows
from storm_vlm.evaluation.benchmarks import BENCHMARKS
from storm_vlm.evaluation.run_folder import read_records
from storm_vlm.inference.client import Endpoint
from storm_vlm.lab.checkpoints import shipped
from storm_vlm.model.device import torch_device
from storm_vlm.training.arguments import training_arguments
from storm_vlm.training.checkpoints import fault
from storm_vlm.training.config import ConfigError, TrainConfig
from storm_vlm.training.train import sound_rows

Change = Callable[[dict[str, Any]], object]


def refused(*verb: object, code: int = 1) -> str:
    """The one line that a verb ends with."""
    done = run_storm(*verb)
    assert done.exit_code == code and "Traceback" not in done.output, done.output
    *_, line = done.stderr.replace("\r", "\n").splitlines()
    assert line.startswith("storm: "), done.stderr
    return line


@pytest.fixture
def clip(reasoning_rows: list[Row]) -> str:
    return reasoning_rows[0].video


def text(file: str, content: str) -> Callable[[Path], object]:
    return lambda folder: (folder / file).write_text(content)


def fields(file: str, change: Change) -> Callable[[Path], object]:
    def write(folder: Path) -> None:
        content = json.loads((folder / file).read_text())
        change(content)
        (folder / file).write_text(json.dumps(content))

    return write


def config(change: Change) -> Callable[[Path], object]:
    return fields("config.json", change)


CHECKPOINTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no budget": (config(lambda c: c.pop("latent_budget")), "latent_budget is None"),
    "a word": (config(lambda c: c.update(latent_budget="eight")), "latent_budget is 'eight'"),
    "too many": (config(lambda c: c.update(latent_budget=10**9)), "latent_budget is 1000000000"),
    "no end": (config(lambda c: c.pop("latent_end_token_id")), "latent_end_token_id is None"),
    "frames": (config(lambda c: c.update(num_frames=-6)), "num_frames is -6"),
    "swapped": (config(lambda c: c.update(latent_start_token_id=477)), "the tokenizer"),
    "vocabulary": (config(lambda c: c["text_config"].update(vocab_size=1)), "cannot be loaded"),
    "layers": (config(lambda c: c["text_config"].update(num_hidden_layers=1)), "num_hidden_layers"),
    "video": (config(lambda c: c.update(video_token_id=3)), "video_token_id"),
    "null": (text("config.json", "null"), "cannot be loaded"),
    "null text": (config(lambda c: c.update(text_config=None)), "says nothing of the text model"),
    "tokenizer": (text("tokenizer.json", "{"), "the processor of"),
    "template": (text("chat_template.jinja", "{% for m in messages %}{{ m"), "chat template"),
    "mute": (text("chat_template.jinja", "{{ messages[0]['role'] }}<|video_pad|>"), "leaves out"),
    "generation": (text("generation_config.json", "{"), "cannot be loaded"),
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_checkpoint_s_odd_file_is_named(name: str, clip: str, tmp_path: Path) -> None:
    spoil, said = CHECKPOINTS[name]
    folder = tmp_path / "checkpoint"
    shutil.copytree(shipped("storm"), folder)
    spoil(folder)
    line = refused("answer", clip, "Where?", "--checkpoint", folder)
    assert str(folder) in line and said in line


@pytest.mark.parametrize(
    "name", ["a b", "$MODEL", "org/a b", "org/a--b", "ünï/x", "a/b/c", "org/.."]
)
def test_no_name_that_the_hub_would_not_take(name: str, clip: str) -> None:
    assert "no such folder" in refused("answer", clip, "Where?", "--checkpoint", name)


@pytest.mark.parametrize("name", ["banana", "cuda:99", "meta", ""])
def test_a_device_that_is_not_there(name: str) -> None:
    if not name:
        assert torch_device(name).type in ("cpu", "cuda")
        return
    for verb in ("train", "infer"):
        assert "device" in refused("bench", verb, "--device", name)


@pytest.mark.parametrize("address", ["ftp://host/v1", "localhost:8000", "host", "http://", "/v1"])
def test_an_address_of_no_server(address: str, reasoning_file: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no address of a server"):
        Endpoint(address, "KEY", 0, 1)
    if address.startswith("ftp"):
        line = refused("evaluate", "m", reasoning_file, "--base-url", address)
        assert "no address of a server" in line


@pytest.mark.parametrize(
    "setting",
    [
        {"adam_beta1": 2.0},
        {"adam_beta2": 1.0},
        {"weight_decay": -1.0},
        {"learning_rate": float("inf")},
        {"learning_rate": float("nan")},
        {"max_grad_norm": -1.0},
        {"seed": 2**33},
        {"save_total_limit": 0},
        {"logging_steps": 0},
        {"warmup_steps": -3},
        {"num_train_epochs": float("inf")},
        {"deepspeed": "gone.json"},
        {"train_sampling_strategy": "longest"},
        {"load_best_model_at_end": True},
        {"fp16": True, "use_cpu": True},
        {"dataloader_prefetch_factor": 0, "dataloader_num_workers": 1},
    ],
)
def test_numbers_of_training_that_cannot_be(setting: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"training"):
        training_arguments(
            TrainConfig.model_validate(
                {"model": "m", "data": "d", "output_dir": str(tmp_path), "training": setting}
            )
        )


@pytest.mark.parametrize("content", ["", "{", "- a", "text"])
def test_a_training_s_damaged_folder_is_named(
    content: str, reasoning_file: Path, tmp_path: Path
) -> None:
    (tmp_path / "train_config.yaml").write_text(content)
    (tmp_path / "versions.json").write_text("{}")
    settings = (f"model={shipped('backbone')}", f"data={reasoning_file}", f"output_dir={tmp_path}")
    line = refused("train", "sft", *settings, "training.report_to=none")
    assert f"{tmp_path / 'train_config.yaml'} is damaged" in line


@pytest.mark.parametrize("content", ["", "null", "[]", "5", '["a"]'])
def test_a_checkpoint_with_a_damaged_seal_is_not_whole(content: str, tmp_path: Path) -> None:
    (tmp_path / "complete.json").write_text(content)
    assert fault(tmp_path)


def test_a_missing_file_is_named_with_its_setting(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    assert "data=rows.jsonl: no such file" in refused("train", "stage1")
    assert refused("leaks", "a.jsonl", "b.jsonl").startswith("storm: a.jsonl: no such file")


@pytest.fixture
def malformed(reasoning_rows: list[Row], tmp_path: Path) -> Path:
    """Two rows, and between them lines that hold none."""
    good, other = (json.loads(row.model_dump_json()) for row in reasoning_rows[:2])
    lines: list[Any] = [
        good,
        {**good, "id": "x", "start": float("inf")},
        {**good, "id": "y", "question": " "},
        {**good, "id": "z", "options": ["red", "red"], "answer": "red"},
        good,
        "{",
        other,
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join((x if x == "{" else json.dumps(x)) + "\n" for x in lines))
    return file


def test_lines_that_hold_no_row_do_not_end_an_evaluation(malformed: Path, tmp_path: Path) -> None:
    """Named, counted, left out; what bounds them does so when the others are answered."""
    flags = ("--out", tmp_path / "run", "--reliance-rows", 0)
    done = run_storm("evaluate", shipped("storm"), malformed, *flags, "--max-errors", 0.8)
    assert done.exit_code == 0, done.output
    assert "5 of 7 rows cannot be asked, and are skipped:" in done.stderr
    for line, reason in {2: "start", 3: "question", 4: "distinct", 5: "taken", 6: "JSON"}.items():
        assert any(f"{malformed}:{line}: " in s and reason in s for s in done.stderr.splitlines())
    assert len(read_records(tmp_path / "run")) == 2
    assert json.loads((tmp_path / "run" / "run.json").read_text())["n_expected"] == 7
    line = refused("evaluate", shipped("storm"), malformed, *flags)
    assert "5 of 7 rows could not be asked" in line
    assert "only 2 of 7" in run_storm("report", tmp_path / "run").stdout


def test_lines_that_hold_no_row_are_left_out_of_leaks_and_gallery(
    malformed: Path, reasoning_file: Path, tmp_path: Path
) -> None:
    kept, cache = tmp_path / "kept.jsonl", tmp_path / "cache"
    flags = ("--num-frames", 0, "--cache", cache)
    done = run_storm("leaks", malformed, reasoning_file, "--remove", kept, *flags)
    assert done.exit_code == 0 and "5 of 7 rows cannot be worked on" in done.stderr
    bounded = ("leaks", malformed, reasoning_file, *flags, "--max-errors", 0.1)
    assert "more than --max-errors 0.1 allows" in refused(*bounded)
    shown: Result = run_storm("gallery", malformed)
    assert shown.exit_code == 0 and "5 of 7 rows cannot" in shown.stderr


def test_lines_that_hold_no_row_are_rejects_of_a_build(malformed: Path, tmp_path: Path) -> None:
    build = ("build", "--source", malformed, "--out", tmp_path / "out", "generator=keyframes")
    done = run_storm(*build, "filters.frozen=null", "filters.blank=null", "filters.flicker=null")
    assert done.exit_code == 0, done.output
    rejects = [json.loads(x) for x in (tmp_path / "out" / "rejects.jsonl").read_text().splitlines()]
    told = {r["id"]: r["reason"] for r in rejects if r["reason"] == "malformed"}
    assert list(told) == [f"{malformed}:{line}" for line in range(2, 7)]
    assert "more than --max-errors 0.5" in refused(*build, "--max-errors", 0.5)
    assert run_storm("gallery", tmp_path / "out").exit_code == 0


def test_lines_that_hold_no_row_refuse_a_training_or_are_skipped(malformed: Path) -> None:
    settings = TrainConfig.model_validate(
        {"model": "m", "data": str(malformed), "output_dir": "out"}
    )
    with pytest.raises(RowError, match=r"5 of 7 rows (.|\n)*rows.jsonl:2: start"):
        sound_rows(settings, *scan_rows(malformed))
    skipping = settings.model_copy(update={"skip_bad_rows": True})
    assert len(sound_rows(skipping, *scan_rows(malformed))) == 2


@pytest.mark.parametrize("verb", ["evaluate", "leaks", "gallery", "build", "validate", "train"])
def test_a_picture_is_no_file_of_rows(verb: str, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 9)
    arguments: dict[str, tuple[object, ...]] = {
        "evaluate": (shipped("storm"), file),
        "leaks": (file, file),
        "gallery": (file,),
        "build": ("--source", file, "--out", tmp_path / "out"),
        "validate": (shipped("storm"), file, "--out", tmp_path / "out"),
        "train": ("sft", f"data={file}", f"output_dir={tmp_path / 'out'}"),
    }
    line = refused(verb, *arguments[verb])
    assert "not UTF-8" in line and str(file) in line and len(line) < 600


def test_a_clip_that_cannot_be_shown_is_said_in_a_gallery(
    reasoning_file: Path, tmp_path: Path
) -> None:
    row = json.loads(read_rows(reasoning_file)[0].model_dump_json())
    picture = tmp_path / "a.mp4"
    picture.write_bytes(b"\x00" * 99)
    rows = [{**row, "id": "a", "video": str(picture)}, {**row, "id": "b", "start": 1e18}]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = run_storm("gallery", file)
    page = (tmp_path / "rows.html").read_text()
    assert done.exit_code == 0 and "2 of 2 rows have a clip that cannot be shown" in done.stderr
    assert "cannot be read as a video" in page and "the window starts at" in page


@pytest.mark.parametrize("benchmark", ["videomme", "tomato", "lvbench", "twiffbench"])
@pytest.mark.parametrize("content", ["[{}]", "{}", "[1]", '{"a": [{"b": null}]}'])
def test_files_that_a_benchmark_did_not_publish(
    benchmark: str, content: str, tmp_path: Path
) -> None:
    for pattern in BENCHMARKS[benchmark].files:
        file = tmp_path / pattern.replace("[mM]", "m").replace("*", "x")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)
    (tmp_path / "questions-test.jsonl").write_text(content)
    assert str(tmp_path) in refused("evaluate", "m", tmp_path, "--benchmark", benchmark)


def test_nothing_is_written_into_a_model_s_folder(reasoning_file: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(shipped("storm"), model)
    before = sorted(model.iterdir())
    for verb in (
        ("lmms-task", reasoning_file, model),
        ("evaluate", shipped("storm"), reasoning_file, "--out", model),
        ("build", "--source", reasoning_file, "--out", model),
        ("world", model, "--count", 1),
        ("pretrain", model, "--data", tmp_path / "data"),
    ):
        assert "holds a model" in refused(*verb)
    assert sorted(model.iterdir()) == before


def test_a_collection_of_nothing_is_refused(reasoning_file: Path, tmp_path: Path) -> None:
    collect = ("build", "collect", "--source", reasoning_file, "--out", tmp_path / "out")
    assert "no finished row" in refused(*collect)
    assert not (tmp_path / "out" / "rows.jsonl").exists()

"""A run that was killed ends as if it had not been."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from storm_vlm.training.arguments import training_arguments
from storm_vlm.training.checkpoints import SEAL, last_whole_checkpoint, seal
from storm_vlm.training.config import ConfigError, Method, TrainConfig
from storm_vlm.training.train import train
from storm_vlm.training.trainer import DivergedError, StormTrainer

STEPS = 6
# No file may grow beyond 1 MiB: how a full disk looks to a process.
FULL_DISK = """
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))
"""


def config(output: Path, backbone: str, data: Path, **training: Any) -> TrainConfig:
    """Draws at random (whose states are fed), accumulates, and has an optimizer with states."""
    return TrainConfig(
        model=backbone,
        data=str(data),
        output_dir=str(output),
        num_frames=6,
        method=Method(latent_budget=3, slot_input="scheduled"),
        training={
            "max_steps": STEPS,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "learning_rate": 1e-3,
            "save_steps": 2,
            "train_sampling_strategy": "group_by_length",
            "logging_steps": 1,
            "disable_tqdm": True,
            "use_cpu": True,
            **training,
        },
    )


def in_a_process(run: TrainConfig, before: str = "") -> subprocess.Popen[str]:
    """`storm train`, after the lines of Python that `before` holds."""
    file = Path(run.output_dir).with_suffix(".yaml")
    file.write_text(yaml.safe_dump(run.model_dump(mode="json")))
    code = "import sys; from storm_vlm.cli.main import main; sys.argv = sys.argv[1:]; main()"
    return subprocess.Popen(
        [sys.executable, "-c", f"{before}\n{code}", "storm", "train", str(file)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "1000"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def kill_as_it_opens(file: str, run: TrainConfig) -> None:
    """The process kills itself: killed from outside, it may have gone on by then."""
    process = in_a_process(
        run,
        "import os, signal, sys\n"
        "sys.addaudithook(lambda event, args: event == 'open' "
        f"and str(args[0]).endswith({file!r}) and os.kill(os.getpid(), signal.SIGKILL))",
    )
    printed, _ = process.communicate(timeout=200)
    assert process.returncode == -signal.SIGKILL, printed


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, backbone: str, reasoning_file: Path) -> bytes:
    run = config(tmp_path_factory.mktemp("whole") / "run", backbone, reasoning_file)
    process = in_a_process(run)
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 0, output
    return (Path(run.output_dir) / "model.safetensors").read_bytes()


def test_killed_and_started_again_it_ends_with_the_same_weights(
    uninterrupted, tmp_path, backbone, reasoning_file
) -> None:
    run = config(tmp_path / "run", backbone, reasoning_file)
    output = Path(run.output_dir)
    kill_as_it_opens("checkpoint-4/trainer_state.json", run)  # its weights are written
    assert last_whole_checkpoint(output) == output / "checkpoint-2"
    again = in_a_process(run)
    printed, _ = again.communicate(timeout=200)
    assert again.returncode == 0, printed
    assert (output / "model.safetensors").read_bytes() == uninterrupted


def test_a_torn_checkpoint_is_skipped_and_named(
    uninterrupted, tmp_path, backbone, reasoning_file, caplog
) -> None:
    run = config(tmp_path / "run", backbone, reasoning_file, max_steps=STEPS)
    train(run)
    output = Path(run.output_dir)
    (output / "versions.json").unlink()  # not finished
    (output / "model.safetensors").unlink()
    assert last_whole_checkpoint(output) == output / f"checkpoint-{STEPS}"
    weights = output / f"checkpoint-{STEPS}" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert last_whole_checkpoint(output) == output / f"checkpoint-{STEPS - 2}"
    (output / f"checkpoint-{STEPS - 2}" / SEAL).unlink()
    assert last_whole_checkpoint(output) is None
    train(run)  # from the start
    assert f"checkpoint-{STEPS}: model.safetensors is damaged" in caplog.text
    assert f"checkpoint-{STEPS - 2}: it was never finished" in caplog.text
    assert (output / "model.safetensors").read_bytes() == uninterrupted


def test_the_last_whole_checkpoint_goes_when_the_next_is_whole(
    tmp_path, backbone, reasoning_file, monkeypatch
) -> None:
    """With room for one: whatever happens before the seal, there is one."""
    run = config(tmp_path / "run", backbone, reasoning_file, save_total_limit=1, max_steps=4)
    whole = []

    def sealed(folder: Path) -> None:
        whole.append(last_whole_checkpoint(folder.parent))
        seal(folder)

    monkeypatch.setattr("storm_vlm.training.trainer.seal", sealed)
    output = train(run)
    assert whole == [None, output / "checkpoint-2"]
    assert list(output.glob("checkpoint-*")) == [output / "checkpoint-4"]


def test_a_full_disk_leaves_the_last_checkpoint_and_says_so(
    uninterrupted, tmp_path, backbone, reasoning_file
) -> None:
    run = config(tmp_path / "run", backbone, reasoning_file)
    output = Path(run.output_dir)
    kill_as_it_opens("checkpoint-4/config.json", run)
    full = in_a_process(run, FULL_DISK)
    printed, _ = full.communicate(timeout=200)
    assert full.returncode == 1
    assert "checkpoint-4 could not be written" in printed
    assert "start the same command again to go on from checkpoint-2" in printed
    assert not (output / "checkpoint-4").exists()
    assert last_whole_checkpoint(output) == output / "checkpoint-2"
    again = in_a_process(run)
    printed, _ = again.communicate(timeout=200)
    assert again.returncode == 0, printed
    assert (output / "model.safetensors").read_bytes() == uninterrupted


def test_adapters_go_on_where_they_stopped(tmp_path, backbone, reasoning_file) -> None:
    run = config(tmp_path / "run", backbone, reasoning_file, save_total_limit=9)
    run = run.model_copy(update={"lora": {"r": 4}})
    weights = train(run) / "adapter_model.safetensors"
    expected = weights.read_bytes()
    weights.unlink()
    (Path(run.output_dir) / "versions.json").unlink()  # not finished
    for step in range(4, STEPS + 1, 2):
        shutil.rmtree(Path(run.output_dir) / f"checkpoint-{step}")
    train(run)
    assert weights.read_bytes() == expected


def test_another_run_s_folder_is_refused(tmp_path, backbone, reasoning_file) -> None:
    run = config(tmp_path / "run", backbone, reasoning_file, max_steps=1)
    train(run)
    with pytest.raises(ConfigError, match=r"other settings \(num_frames\)"):
        train(run.model_copy(update={"num_frames": 4}))


def test_a_full_disk_at_the_last_save_loses_nothing(
    uninterrupted, tmp_path, backbone, reasoning_file
) -> None:
    run = config(tmp_path / "run", backbone, reasoning_file)
    output = Path(run.output_dir)
    kill_as_it_opens(".unfinished/config.json", run)
    full = in_a_process(run, FULL_DISK)
    printed, _ = full.communicate(timeout=200)
    assert full.returncode == 1 and "Traceback" not in printed
    assert f"{output} could not be written" in printed and "to go on from checkpoint-6" in printed
    assert not list(output.glob("*.safetensors")) and not (output / ".unfinished").exists()
    again = in_a_process(run)
    printed, _ = again.communicate(timeout=200)
    assert again.returncode == 0, printed
    assert (output / "model.safetensors").read_bytes() == uninterrupted


def test_a_disk_without_room_for_the_weights_is_named_before_the_first_step(
    tmp_path, backbone, reasoning_file, monkeypatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=600_000)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    monkeypatch.setattr(StormTrainer, "training_step", None)
    run = config(tmp_path / "run", backbone, reasoning_file)
    with pytest.raises(
        ConfigError, match=r"room for 0\.6 MiB, and the weights alone take 4\.\d MiB"
    ):
        train(run)


@pytest.mark.parametrize(("steps", "save_steps"), [(1, 1), (6, 100)])
def test_a_run_that_diverges_is_no_result(
    steps: int, save_steps: int, tmp_path, backbone, reasoning_file
) -> None:
    """With one step, its loss is a number and its weights are not."""
    run = config(
        tmp_path / "run",
        backbone,
        reasoning_file,
        max_steps=steps,
        save_steps=save_steps,
        learning_rate=1e300 if steps == 1 else 1e30,
    )
    with pytest.raises(DivergedError, match=r"step [12].*Lower"):
        train(run)
    output = Path(run.output_dir)
    assert not (output / "versions.json").exists()
    assert not list(output.rglob("*.safetensors"))


def test_adapters_that_diverge_are_no_result(tmp_path, backbone, reasoning_file) -> None:
    run = config(tmp_path / "run", backbone, reasoning_file, learning_rate=1e300)
    with pytest.raises(DivergedError):
        train(run.model_copy(update={"lora": {"r": 4}}))
    assert not list(Path(run.output_dir).rglob("*.safetensors"))


def test_without_its_optimizer_a_run_does_not_go_on(tmp_path, backbone, reasoning_file) -> None:
    run = config(tmp_path / "run", backbone, reasoning_file, save_only_model=True)
    output = train(run)
    assert train(run) == output  # finished
    (output / "versions.json").unlink()
    with pytest.raises(ConfigError, match=r"checkpoint-6 has no optimizer .*save_only_model"):
        train(run)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("resume_from_checkpoint", "a/checkpoint-4"),
        ("label_smoothing_factor", 0.1),
        ("torch_compile", True),
        ("torch_compile_backend", "inductor"),
        ("num_train_epochs", 3),
        ("learning_rate", float("nan")),
    ],
)
def test_settings_without_effect_are_refused_by_name(name, value, tmp_path) -> None:
    run = config(tmp_path / "run", "model", tmp_path, **{name: value})
    with pytest.raises(ConfigError, match=f"training.{name.removesuffix('_backend')}"):
        training_arguments(run)


def test_epochs_count_where_steps_do_not(tmp_path) -> None:
    run = config(tmp_path / "run", "model", tmp_path, max_steps=-1, num_train_epochs=3)
    assert training_arguments(run).num_train_epochs == 3


def test_a_setting_that_differs_is_named(tmp_path, backbone, reasoning_file) -> None:
    run = config(tmp_path / "run", backbone, reasoning_file, max_steps=1)
    train(run)
    other = config(tmp_path / "run", backbone, reasoning_file, max_steps=2, seed=1)
    other = other.model_copy(update={"method": other.method.model_copy(update={"ema_decay": 0.5})})
    named = r"settings \(method\.ema_decay, training\.max_steps, training\.seed\)"
    with pytest.raises(ConfigError, match=named):
        train(other)

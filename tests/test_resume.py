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

from storm_vlm.training.checkpoints import SEAL, last_whole_checkpoint, seal
from storm_vlm.training.config import ConfigError, Method, TrainConfig
from storm_vlm.training.train import train

STEPS = 6


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
    full = in_a_process(  # no file may grow beyond 1 MiB: how a full disk looks to a process
        run,
        "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))",
    )
    printed, _ = full.communicate(timeout=200)
    assert full.returncode == 1
    assert "checkpoint-4 could not be written" in printed and "start the same" in printed
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

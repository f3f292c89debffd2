"""Two processes (or four small batches) train as one process with the same rows at once."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoProcessor

from storm_vlm.data.collator import StormCollator
from storm_vlm.data.row import read_rows, write_rows
from storm_vlm.model.modeling import StormForConditionalGeneration
from storm_vlm.model.tokens import add_latent_tokens
from storm_vlm.training.arguments import training_arguments
from storm_vlm.training.config import Method, TrainConfig
from storm_vlm.training.targets import alignment_targets
from storm_vlm.training.train import train
from storm_vlm.training.trainer import StormTrainer, batch_counts

K = 3
RECIPES = Path(__file__).parent.parent / "recipes" / "accelerate"


@pytest.fixture(scope="module")
def rows_file(reasoning_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve rows, answers of unequal length; one row has no thought video."""
    rows = read_rows(reasoning_file)
    rows[3] = rows[3].model_copy(update={"thought_video": None})
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    write_rows(path, rows)
    return path


def config(output: Path, backbone: str, data: Path, batch: int, **training: Any) -> TrainConfig:
    return TrainConfig(
        model=backbone,
        data=str(data),
        output_dir=str(output),
        num_frames=6,
        method=Method(latent_budget=K, slot_input="rollout"),
        training={
            "max_steps": 3,
            "per_device_train_batch_size": batch,
            "optim": "sgd",  # Adam would turn the rounding of tiny gradients into steps
            "learning_rate": 0.05,
            "logging_steps": 1,
            "save_strategy": "no",
            "disable_tqdm": True,
            "use_cpu": True,
            **training,
        },
    )


def outcome(run: Path) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    history = json.loads((run / "log_history.json").read_text())
    return [entry for entry in history if "grad_norm" in entry], load_file(
        run / "model.safetensors"
    )


def assert_same(run: Path, expected: Path) -> None:
    (history, weights), (wanted_history, wanted) = outcome(run), outcome(expected)
    assert len(history) == len(wanted_history) == 3
    for entry, other in zip(history, wanted_history, strict=True):
        for name in ("loss", "grad_norm"):
            assert entry[name] == pytest.approx(other[name], rel=1e-3), name
    assert weights.keys() == wanted.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(weight, wanted[name], atol=2e-6, rtol=1e-4, msg=name)


@pytest.fixture(scope="module")
def at_once(tmp_path_factory: pytest.TempPathFactory, backbone: str, rows_file: Path) -> Path:
    return train(config(tmp_path_factory.mktemp("one") / "run", backbone, rows_file, batch=4))


def test_four_accumulated_rows_are_one_batch_of_four(at_once, tmp_path, backbone, rows_file):
    run = config(tmp_path / "run", backbone, rows_file, batch=1, gradient_accumulation_steps=4)
    assert_same(train(run), at_once)


def in_two_processes(run: TrainConfig, **environment: str) -> dict[str, Any]:
    """Train, and say what launched it. (For CPU processes `accelerate launch` wants MPI; so torchrun starts them.)"""
    file = Path(run.output_dir).with_suffix(".yaml")
    file.write_text(yaml.safe_dump(run.model_dump(mode="json")))
    command = ["torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [sys.executable, "-m", *command, "-m", "storm_vlm", "train", str(file)],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((Path(run.output_dir) / "versions.json").read_text())


def test_two_processes_are_one(at_once, tmp_path, backbone, rows_file) -> None:
    """Under DDP."""
    launched = in_two_processes(config(tmp_path / "run", backbone, rows_file, batch=2))
    assert (launched["processes"], launched["distributed"]) == (2, "MULTI_CPU")
    assert_same(tmp_path / "run", at_once)


def test_two_processes_of_deepspeed_are_one(at_once, tmp_path, backbone, rows_file) -> None:
    """ZeRO-2, with the recipe's settings. Needs deepspeed, and a C++ compiler for its CPU communication."""
    pytest.importorskip("deepspeed")
    recipe = yaml.safe_load((RECIPES / "zero2.yaml").read_text())["deepspeed_config"]
    settings = {
        "zero_optimization": {"stage": recipe["zero_stage"]},
        "gradient_accumulation_steps": recipe["gradient_accumulation_steps"],
        "gradient_clipping": recipe["gradient_clipping"],
        "train_micro_batch_size_per_gpu": "auto",
        "zero_allow_untested_optimizer": True,  # SGD
    }
    run = config(tmp_path / "run", backbone, rows_file, batch=2, deepspeed=settings)
    launched = in_two_processes(run, DS_ACCELERATOR="cpu")
    assert (launched["processes"], launched["distributed"]) == (2, "DEEPSPEED")
    assert_same(tmp_path / "run", at_once)


def gradients_of_sharded_model(
    rank: int, rendezvous: str, backbone: str, data: str, checkpointing: bool, out: str
) -> None:
    """One of two processes: shard as the recipe does, and take the gradients of one step."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": rendezvous}
    trainer, batches = one_step(backbone, data, 2, checkpointing)
    reshard = yaml.safe_load((RECIPES / "fsdp2.yaml").read_text())["fsdp_config"]
    kwargs = {"reshard_after_forward": reshard["fsdp_reshard_after_forward"]}
    model: Any = trainer.model
    mesh = init_device_mesh("cpu", (2,))
    for layer in [*model.model.language_model.layers, *model.model.visual.blocks]:
        fully_shard(layer, mesh=mesh, **kwargs)
    fully_shard(model, mesh=mesh, **kwargs)
    counts = torch.stack([batch_counts(batch) for batch in batches]).sum(0)
    loss = trainer.compute_loss(model, batches[rank], num_items_in_batch=counts)
    loss.backward()
    grads = {name: p.grad.full_tensor() for name, p in model.named_parameters() if p.requires_grad}
    if rank == 0:
        torch.save((loss.detach(), grads), out)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    os._exit(0)  # threads of gloo's, left to torch's end, have aborted a process that was done


def one_step(
    backbone: str, data: str, parts: int, checkpointing: bool
) -> tuple[StormTrainer, list[dict[str, torch.Tensor]]]:
    """A trainer, and four rows in `parts` batches."""
    rows = read_rows(data)[:4]
    model = StormForConditionalGeneration.from_pretrained(backbone)
    processor = AutoProcessor.from_pretrained(backbone)
    add_latent_tokens(model, processor, K)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    plain = Method(latent_budget=K, target_normalization="none")
    pairs = list(zip(rows, alignment_targets(model, processor, rows, plain), strict=True))
    arguments = training_arguments(config(Path("unused"), backbone, Path(data), 2))
    method = Method(latent_budget=K, slot_input="rollout")
    trainer = StormTrainer(model=model.train(), method=method, args=arguments)
    collate, size = StormCollator(processor, 6, K), 4 // parts
    return trainer, [collate(pairs[i : i + size]) for i in range(0, 4, size)]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_sharded_gradients_are_those_of_one_process(
    checkpointing, tmp_path, backbone, rows_file
) -> None:
    """FSDP2. (Accelerate knows it on accelerators only; so the model is sharded here as its recipe says.)"""
    out = tmp_path / "gradients.pt"
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    arguments = (port, backbone, str(rows_file), checkpointing, str(out))
    torch.multiprocessing.spawn(gradients_of_sharded_model, arguments, nprocs=2)
    _, sharded = torch.load(out)
    trainer, (batch,) = one_step(backbone, str(rows_file), 1, False)
    trainer.compute_loss(trainer.model, batch, num_items_in_batch=batch_counts(batch)).backward()
    model: Any = trainer.model
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(sharded[name], parameter.grad, atol=1e-4, rtol=1e-3, msg=name)


@pytest.fixture(scope="module")
def uneven_file(rows_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine rows to train on and three to validate on: neither is a multiple of anything below."""
    rows = sorted(read_rows(rows_file), key=lambda row: len(row.answer))
    rows = [
        *rows[1:9],
        rows[10],
        rows[0],
        rows[9],
        rows[11],
    ]  # the last three answer at unequal length
    last = [row.model_copy(update={"split": "validation"}) for row in rows[9:]]
    path = tmp_path_factory.mktemp("uneven") / "rows.jsonl"
    write_rows(path, [*rows[:9], *last])
    return path


def uneven(output: Path, backbone: str, data: Path, batch: int, eval_batch: int) -> TrainConfig:
    """An epoch whose last step is short, and an evaluation."""
    run = config(output, backbone, data, batch, eval_strategy="epoch")
    run.training.update(per_device_eval_batch_size=eval_batch)
    return run.model_copy(update={"eval_samples": 0})


def eval_losses(run: Path) -> list[float]:
    history = json.loads((run / "log_history.json").read_text())
    return [entry["eval_loss"] for entry in history if "eval_loss" in entry]


@pytest.fixture(scope="module")
def short_at_once(tmp_path_factory, backbone: str, uneven_file: Path) -> Path:
    return train(uneven(tmp_path_factory.mktemp("short") / "run", backbone, uneven_file, 4, 3))


def test_a_short_last_step_counts_every_row_once(
    short_at_once, tmp_path, backbone, uneven_file
) -> None:
    """accelerate fills it up with rows of the epoch's beginning."""
    in_two_processes(uneven(tmp_path / "run", backbone, uneven_file, 2, 2))
    assert_same(tmp_path / "run", short_at_once)
    (loss,), (expected,) = eval_losses(tmp_path / "run"), eval_losses(short_at_once)
    assert loss == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("eval_batch", [1, 2, 8])
def test_a_loss_of_validation_is_that_of_all_rows_as_one_batch(
    eval_batch: int, short_at_once, tmp_path, backbone, uneven_file
) -> None:
    run = train(uneven(tmp_path / "run", backbone, uneven_file, 4, eval_batch))
    assert eval_losses(run) == pytest.approx(eval_losses(short_at_once), rel=1e-4)
    rows = [row for row in read_rows(uneven_file) if row.split == "validation"]
    model = StormForConditionalGeneration.from_pretrained(str(run))
    trainer = StormTrainer(
        model=model,
        method=Method(latent_budget=K),
        args=training_arguments(config(run, "", Path(), 1)),
    )
    batch = StormCollator(AutoProcessor.from_pretrained(run), 6, K)(rows)
    with torch.no_grad():
        expected = trainer.compute_loss(model, batch)
    assert eval_losses(run) == [pytest.approx(expected.item(), rel=1e-3)]

"""Run one training config: load, build targets, fit, save."""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import yaml
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import BitsAndBytesConfig, TrainingArguments, set_seed
from transformers.utils.import_utils import is_flash_attn_2_available

from storm_vlm.data.atomic_write import write_json, write_text
from storm_vlm.data.check import check_video, check_videos, fault_lines, row_faults
from storm_vlm.data.collator import StormCollator, VideoInputs
from storm_vlm.data.identity import checkpoint_identity, rows_identity
from storm_vlm.data.output import locked, model_files
from storm_vlm.data.processor import check_processor
from storm_vlm.data.row import Row, RowError, scan_rows
from storm_vlm.data.store import Store
from storm_vlm.model.adapters import token_rows
from storm_vlm.model.attention import SDPA_IN_PARTS
from storm_vlm.model.backbones import backbone, unwrap
from storm_vlm.model.checkpoint import load_processor
from storm_vlm.model.modeling import StormForConditionalGeneration
from storm_vlm.model.tokens import add_latent_tokens, has_latent_tokens
from storm_vlm.training.arguments import training_arguments
from storm_vlm.training.card import write_card
from storm_vlm.training.checkpoints import all_or_nothing, last_whole_checkpoint, set_torn_aside
from storm_vlm.training.config import ConfigError, Method, TrainConfig
from storm_vlm.training.distillation import DistillationCollator, SelfDistilledTeacher
from storm_vlm.training.feature_cache import CachedVideoInputs
from storm_vlm.training.row_lengths import long_rows, row_lengths
from storm_vlm.training.sample_answers import SampleAnswers
from storm_vlm.training.targets import Targets, alignment_targets
from storm_vlm.training.trainer import RowDataset, StormTrainer
from storm_vlm.versions import versions

INPUTS = "inputs.json"  # beside a run: what model and data were, by content
logger = logging.getLogger(__name__)


def train(config: TrainConfig, rows: list[Row] | None = None) -> Path:
    """Train and save; returns the folder, a stock checkpoint that also knows its latent tokens.

    A run that was interrupted goes on from its last whole checkpoint; one that is finished is left as it is.

    Beside the weights: `train_config.yaml` as resolved, `log_history.json`, `versions.json`. `rows` stands in
    for reading `config.data` (whose `train` split is used).

    Raises:
        ConfigError: no training rows, arguments that transformers refuses, or a folder that holds another run, or
            another model.
        OutputError: another process is at work on the folder.
        DivergedError: the loss, or a weight, is no longer a number.
        SaveError: the disk is full; the last whole checkpoint is kept.
        RowError, VideoError: bad data; names the rows, or the file.
    """
    if rows is None and not Path(config.data).is_file():
        raise ConfigError(f"data={config.data}: no such file: name a file of rows with data=FILE")
    _refuse_other_model(Path(config.output_dir), config.model)
    with locked(Path(config.output_dir)):
        return _train(config, *(scan_rows(config.data) if rows is None else (rows, {})))


def _train(config: TrainConfig, rows: list[Row], malformed: dict[str, str]) -> Path:
    arguments = training_arguments(config)
    output = Path(config.output_dir)
    model_identity = checkpoint_identity(config.model, Store(output))
    inputs = {"rows": rows_identity(rows), "model": model_identity}
    if _finished(config, output, inputs):
        logger.info("%s holds this run, finished: remove it to train again", output)
        return output
    rows = sound_rows(config, rows, malformed)
    _splits(config, arguments, rows)  # before the model is loaded, which takes longer
    if arguments.save_only_model and (kept := last_whole_checkpoint(output)):
        raise ConfigError(
            f"{kept} has no optimizer (training.save_only_model): going on from it would be another run. Remove "
            f"{output} to train again from the start"
        )
    set_seed(arguments.seed)  # adapters begin at random
    model, processor = load_model(config)
    reader = StormCollator(processor, config.num_frames, config.method.latent_budget)
    rows = _without(long_rows(rows, reader, model.config), config, rows, len(rows))
    rows, validation = _splits(config, arguments, rows)
    trainer = build_trainer(config, arguments, model, processor, rows, validation)
    resumed = _begin(config, output, inputs, trainer.args.should_save)
    _check_room(trainer, output)
    trainer.train(resume_from_checkpoint=resumed)
    _save(trainer, processor)
    return output


def sound_rows(
    config: TrainConfig, rows: list[Row], malformed: Mapping[str, str] = MappingProxyType({})
) -> list[Row]:
    """The rows that a run would come to and can work on, looked at before the model is loaded.

    `malformed`: lines of the file that hold no row.

    Raises:
        RowError: some cannot be worked on, and `skip_bad_rows` is not set.
    """
    rows = [row for row in rows if row.split in ("train", "validation")]
    source = config.method.target_source if config.method.needs_targets else "none"
    imagined = source in ("thought_video", "shuffled", "self_distilled")
    faults = {**malformed, **row_faults(rows, check_videos if imagined else check_video)}
    budget = config.method.latent_budget
    if source != "none" and budget:
        faults |= {
            row.id: f"it takes {row.slots} slots, and method.latent_budget is {budget}"
            for row in rows
            if row.slots is not None and row.slots > budget
        }
    return _without(faults, config, rows, len(rows) + len(malformed))


def _without(
    faults: Mapping[str, str], config: TrainConfig, rows: list[Row], count: int
) -> list[Row]:
    """The other rows, if `skip_bad_rows` is set. Raises RowError if it is not."""
    if not faults:
        return rows
    named = f"{len(faults)} of {count} rows cannot be worked on"
    if not config.skip_bad_rows:
        mend = "mend or remove them, or set skip_bad_rows=true"
        raise RowError(f"{named}: {mend}\n{fault_lines(faults, config.data)}")
    logger.warning("%s, and are skipped:\n%s", named, fault_lines(faults, config.data))
    return [row for row in rows if row.id not in faults]


def _splits(
    config: TrainConfig, arguments: TrainingArguments, rows: list[Row]
) -> tuple[list[Row], list[Row]]:
    """Rows to train on, and rows to validate with. Raises ConfigError where there are none and some are needed."""
    parts = (
        [row for row in rows if row.split == "train"],
        [r for r in rows if r.split == "validation"],
    )
    if not parts[0]:
        raise ConfigError(f"{config.data} has no row of the split 'train'")
    if arguments.eval_strategy != "no" and not parts[1]:
        raise ConfigError(
            f"{config.data} has no row of the split 'validation': set training.eval_strategy to no"
        )
    return parts


def build_trainer(
    config: TrainConfig,
    arguments: TrainingArguments,
    model: Any,
    processor: Any,
    rows: list[Row],
    validation: list[Row],
) -> StormTrainer:
    """A trainer with its adapters, targets (or their teacher) and lengths, as the config says.

    Raises:
        ConfigError: adapters that PEFT refuses, or a teacher or Muon for a sharded model.
        TargetError: no row has what targets are made from.
    """
    method, num_frames = config.method, config.num_frames
    cache_bytes = int(config.video_cache_gb * 2**30)
    tower, home = backbone(model).vision_tower, model.device  # the rest waits for the trainer
    if config.vision_cache is not None or method.needs_targets:
        tower.to(arguments.device)
    if config.vision_cache is None:
        videos = VideoInputs(processor, num_frames, cache_bytes)
    else:
        clips = [*rows, *validation]
        videos = CachedVideoInputs(
            model, processor, clips, num_frames, cache_bytes, config.vision_cache
        )
    targets, distilled = None, method.target_source == "self_distilled"
    if method.needs_targets and not distilled:
        folder = Path(config.target_cache or Path(config.data).with_suffix(".targets"))
        main_first = arguments.main_process_first(local=False, desc="targets")
        targets = alignment_targets(model, processor, rows, method, folder, main_first)
        _tell_missing(targets, method)
    tower.to(home)
    if config.lora is not None:
        model = add_adapters(model, config.lora)
        if config.vision_cache is not None and any(p.requires_grad for p in tower.parameters()):
            raise ConfigError(
                "vision_cache: lora trains the vision tower, too, which would never be asked: leave out one of them, "
                "or lora.target_modules (by default, the decoder's)"
            )
    collator: Any = StormCollator(processor, num_frames, method.latent_budget, videos)
    teacher = None
    if method.needs_targets and distilled:
        frames = method.num_target_frames
        reader = StormCollator(processor, frames, 0, VideoInputs(processor, frames, cache_bytes))
        if config.quantization is None:
            model.to(arguments.device)
        teacher = SelfDistilledTeacher(model, reader, rows, method)
        collator = DistillationCollator(collator, reader)
    grouped = arguments.train_sampling_strategy == "group_by_length"
    asked = validation[: config.eval_samples]
    return StormTrainer(
        model=model,
        args=arguments,
        train_dataset=RowDataset(rows, targets),
        eval_dataset=RowDataset(validation),
        data_collator=collator,
        method=method,
        muon=config.muon,
        teacher=teacher,
        lengths=row_lengths(rows, processor, num_frames) if grouped else (),
        samples=SampleAnswers(processor, asked, num_frames, Path(config.output_dir))
        if asked
        else None,
    )


def load_model(config: TrainConfig) -> tuple[Any, Any]:
    """The model to train, with its latent tokens, and its processor."""
    attention, reason = choose_attention(config.attn_implementation)
    logger.info("attention: %s (%s)", attention, reason)
    extra: dict[str, Any] = {}
    if config.quantization is not None:
        extra["quantization_config"] = BitsAndBytesConfig(**config.quantization)
    model = StormForConditionalGeneration.from_pretrained(
        config.model,
        dtype=None if config.dtype == "auto" else getattr(torch, config.dtype),
        attn_implementation=attention,
        **extra,
    )
    processor = load_processor(config.model)
    check_processor(processor, model.config)
    if config.method.latent_budget:
        add_latent_tokens(model, processor, config.method.latent_budget)
        model.config.latent_pause = config.method.slot_input == "pause"
        narrow = config.method.bottleneck != "none"
        model.config.latent_bottleneck = backbone(model).video_token_id if narrow else None
    elif has_latent_tokens(model.config):
        model.config.latent_budget = 0
    model.config.num_frames = config.num_frames
    if config.freeze_vision:
        backbone(model).vision_tower.requires_grad_(False)
    return model, processor


def choose_attention(wanted: str | None) -> tuple[str, str]:
    """An attention implementation of transformers, and why it."""
    if wanted is not None:
        return wanted, "as configured"
    if torch.cuda.is_available() and is_flash_attn_2_available():
        return "flash_attention_2", "flash-attn is installed: no padding is computed"
    why = "flash-attn is not installed" if torch.cuda.is_available() else "no GPU"
    return SDPA_IN_PARTS, f"{why}; sdpa that does not copy the prompt's keys"


def add_adapters(model: Any, settings: dict[str, Any]) -> Any:
    """LoRA on a model whose latent tokens' embeddings are new, and so must train, too.

    Raises:
        ConfigError: PEFT does not know a setting, or cannot do it.
    """
    touches_tables = {"modules_to_save", "target_modules"} & set(settings)
    if touches_tables and model.config.tie_word_embeddings:
        settings = {"ensure_weight_tying": True, **settings}
    settings = {"target_modules": lora_targets(model), **settings}
    if has_latent_tokens(model.config):
        if "trainable_token_indices" in settings:
            raise ConfigError(
                "lora.trainable_token_indices: it is where the latent tokens stand: leave it out"
            )
        whole = settings.get("modules_to_save") or ()
        settings["trainable_token_indices"] = token_rows(model, except_in=whole)
    try:
        return get_peft_model(model, LoraConfig(**settings))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"lora: {error}") from error


def lora_targets(model: Any) -> str:
    """PEFT's `target_modules`: the linear layers of the decoder; the vision tower has some of the same names."""
    decoder = backbone(model).decoder
    (root,) = (name for name, module in model.named_modules() if module is decoder)
    linear = (n for n, module in decoder.layers.named_modules() if isinstance(module, nn.Linear))
    names = dict.fromkeys(name.rpartition(".")[2] for name in linear)
    return rf"{re.escape(root)}\..*\.({'|'.join(names)})"


def _refuse_other_model(output: Path, model: str) -> None:
    """Raises ConfigError where saving would overwrite a model that is no run of ours."""
    ours = (output / "train_config.yaml").exists()
    base = Path(model).expanduser()
    if not output.is_dir():
        return
    if (base.is_dir() and base.samefile(output)) or (model_files(output) and not ours):
        raise ConfigError(
            f"{output} holds a model, which would be overwritten: choose another output_dir"
        )


def _finished(config: TrainConfig, output: Path, inputs: dict[str, str]) -> bool:
    """Whether the folder holds this run, with the last file that it writes.

    A run that has not come to its first checkpoint does not make the folder its own.

    Raises:
        ConfigError: the folder holds a run with other settings, another model, or other rows.
    """
    known, finished = output / "train_config.yaml", (output / "versions.json").exists()
    if known.exists() and (finished or last_whole_checkpoint(output)):
        theirs, wanted = _told(known), config.model_dump(mode="json")
        if changed := _changes({key: theirs.get(key) for key in wanted}, wanted):
            raise ConfigError(
                f"{output} holds a run with other settings ({', '.join(changed)}): choose another output_dir, or "
                "remove that one"
            )
        made_from = output / INPUTS
        read = _told(made_from) if made_from.exists() else inputs
        for name, file in (("model", config.model), ("rows", config.data)):
            if read.get(name) != inputs[name]:
                raise ConfigError(
                    f"{output} holds a run from what {file} was before it changed: choose another output_dir, or "
                    "remove that one"
                )
    return finished


def _told(file: Path) -> dict[str, Any]:
    """What a file of a run says, in YAML or JSON. Raises ConfigError."""
    try:
        said = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (UnicodeError, yaml.YAMLError):
        said = None
    if not isinstance(said, dict):
        raise ConfigError(f"{file} is damaged: put it back, or remove {file.parent} to train again")
    return said


def _changes(theirs: Any, wanted: Any, name: str = "") -> list[str]:
    """The dotted names of the settings that differ."""
    if not (isinstance(theirs, dict) and isinstance(wanted, dict)):
        return [] if theirs == wanted else [name]
    keys = sorted(theirs.keys() | wanted.keys())
    dotted = {key: f"{name}.{key}".lstrip(".") for key in keys}
    return [c for key in keys for c in _changes(theirs.get(key), wanted.get(key), dotted[key])]


def _check_room(trainer: StormTrainer, output: Path) -> None:
    """Raises ConfigError where the disk cannot hold even the result; better now than when all is done."""
    model: Any = trainer.model
    adapted = unwrap(model) is not model
    saved = [p for p in model.parameters() if p.requires_grad or not adapted]
    needed = sum(parameter.numel() * parameter.element_size() for parameter in saved)
    if trainer.args.should_save and (free := shutil.disk_usage(output).free) < needed:
        raise ConfigError(
            f"{output} has room for {free / 2**20:.1f} MiB, and the weights alone take {needed / 2**20:.1f} MiB: "
            "make room, or choose another output_dir"
        )


def _tell_missing(targets: Targets, method: Method) -> None:
    if targets.missing and method.slot_input in ("target", "scheduled"):
        logger.warning(
            "%d of %d rows have no thought video: their slots are fed with the model's own states from the first "
            "step on. On the micro world that cost far more than to leave such rows out until Stage II",
            targets.missing,
            len(targets),
        )


def _begin(config: TrainConfig, output: Path, inputs: dict[str, str], writes: bool) -> str | None:
    """The checkpoint to go on from; from now on, the folder belongs to this config."""
    if writes:
        write_text(output / "train_config.yaml", yaml.safe_dump(config.model_dump(mode="json")))
        write_json(output / INPUTS, inputs)
        set_torn_aside(output)
    whole = last_whole_checkpoint(output)
    return None if whole is None else str(whole)


def _save(trainer: StormTrainer, processor: Any) -> None:
    """Weights and processor, and how they were made. (Trainer's own way adds a pickle.)"""
    trainer.check_weights()
    weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if not trainer.args.should_save:
        return
    output = Path(str(trainer.args.output_dir))
    model: Any = trainer.accelerator.unwrap_model(trainer.model_wrapped)
    for tied in unwrap(model).all_tied_weights_keys:  # gathered as if they were not
        weights.pop(tied, None)
    with all_or_nothing(output) as folder:
        model.save_pretrained(folder, state_dict=weights)
        unwrap(model).config.save_pretrained(folder)  # adapters know nothing of latent tokens
        processor.save_pretrained(folder)
    write_card(output)
    write_json(output / "log_history.json", trainer.state.log_history)
    launched = trainer.accelerator.state
    processes = {
        "processes": launched.num_processes,
        "distributed": launched.distributed_type.value,
    }
    write_json(output / "versions.json", {**versions(), **processes})

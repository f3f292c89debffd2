"""Answer a question about a video: the one path of the command line, of evaluation and of serving."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from storm_vlm.data.answer import parse_answer
from storm_vlm.data.check import check_length
from storm_vlm.data.collator import Question, Reader, StormCollator, VideoInputs
from storm_vlm.data.processor import check_processor
from storm_vlm.data.prompt import LatentMode
from storm_vlm.data.row import Row
from storm_vlm.data.video import Clip, read_video
from storm_vlm.errors import InputError
from storm_vlm.inference.shared_prefix import read_prefixes
from storm_vlm.inference.timing import Phases
from storm_vlm.model.backbones import input_device
from storm_vlm.model.checkpoint import load_processor
from storm_vlm.model.device import torch_device
from storm_vlm.model.modeling import StormForConditionalGeneration
from storm_vlm.model.tokens import check_tokenizer, has_latent_tokens, latent_tokens

DEFAULT_FRAMES = 32  # the paper's Tables 1 and 2
MAX_NEW_TOKENS = 32  #: of a written answer
#: Greedy decoding, whatever a checkpoint's generation_config.json asks for (Qwen2.5-VL's, a repetition penalty).
GREEDY: dict[str, Any] = {
    "do_sample": False,
    "num_beams": 1,
    "num_return_sequences": 1,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "min_length": 0,
    **dict.fromkeys(
        (
            "min_new_tokens",
            "encoder_repetition_penalty",
            "encoder_no_repeat_ngram_size",
            "bad_words_ids",
            "sequence_bias",
            "suppress_tokens",
            "begin_suppress_tokens",
            "forced_bos_token_id",
            "forced_eos_token_id",
            "exponential_decay_length_penalty",
            "guidance_scale",
            "watermarking_config",
            "stop_strings",
            "max_time",
            "prompt_lookup_num_tokens",
        )
    ),
}
#: What the pipeline decides itself, and where to say it.
OWNED = {
    "latent_mode": "say it when the pipeline is made",
    "max_length": "use max_new_tokens",
    "return_dict_in_generate": "call the model's own generate for its output",
    "output_latent_states": "call the model's own generate for its latent states",
    "num_return_sequences": "ask once for each answer, or call the model's own generate",
    "num_beams": "latent slots are recorded along one beam; call the model's own generate for beams",
}
#: Not to be had with a cache that is there already.
UNSHARED = {"num_beams", "use_cache", "cache_implementation", "past_key_values", "assistant_model"}


@dataclass(frozen=True)
class Answer:
    """What the model wrote, and how it came about."""

    text: str
    option: str | None = (
        None  # the chosen option's text, where options were given and one was chosen
    )
    slots_used: int = 0
    forced_end: bool = False  # the budget, not the model, closed the latent segment
    opened: bool = False  # there was a latent segment
    tokens: int = 0  # written, the end of turn included, the latent segment not
    prompt_tokens: int = 0  # visual ones included
    visual_tokens: int = 0
    # wall time of this batch by phase: decode, vision, prefill, latent, answer, total
    seconds: dict[str, float] = field(default_factory=dict)


class StormPipeline:
    """A model with its processor.

    `latent_mode` None is "force" for a checkpoint that has latent slots and "off" for one that has none,
    such as a stock Qwen2.5-VL. `cache_bytes`, `read` and `max_pixels` are those of `VideoInputs`.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        num_frames: int | None = None,
        latent_mode: LatentMode | None = None,
        cache_bytes: int = 0,
        read: Reader = read_video,
        max_pixels: int | None = None,
    ) -> None:
        config = model.config
        has_slots = has_latent_tokens(config)
        budget = config.latent_budget if has_slots else 0
        self.model, self.processor = model.eval(), processor
        self.latent_mode: LatentMode = latent_mode or ("force" if budget else "off")
        if self.latent_mode != "off" and not budget:
            raise InputError(
                f"latent_mode={self.latent_mode!r}, but this checkpoint has no latent slots: "
                "train it first (storm train), or use latent_mode='off'"
            )
        check_processor(processor, config)
        if has_slots:
            check_tokenizer(config, processor)
        frames = num_frames or getattr(config, "num_frames", None) or DEFAULT_FRAMES
        videos = VideoInputs(processor, frames, cache_bytes, read, max_pixels)
        self.collator = StormCollator(processor, frames, budget, videos)

    @classmethod
    def from_pretrained(
        cls,
        path: str,
        *,
        device: str | None = None,
        dtype: Any = None,
        num_frames: int | None = None,
        max_pixels: int | None = None,
        latent_mode: LatentMode | None = None,
        cache_bytes: int = 0,
        read: Reader = read_video,
        trust_remote_code: bool = False,
    ) -> StormPipeline:
        """Load a checkpoint, ours or a stock one, from a folder or the hub.

        Args:
            path: folder or hub name, e.g. `Qwen/Qwen2.5-VL-7B-Instruct`.
            device: where to run; by default a GPU if there is one.
            dtype: a torch dtype; by default the checkpoint's.
            num_frames: frames sampled from a clip; by default what the checkpoint was trained with, else 32.
            max_pixels: of a frame; by default what the checkpoint's processor says.
            cache_bytes: of processed clips that are kept in memory.
            read: reads a clip's frames, such as a `FrameCache`.

        Raises:
            CheckpointError: the checkpoint is not there, damaged, or not whole.
            InputError: there is no such device.
            StormError: `max_pixels` for a processor that knows no such bound.
        """
        place = torch_device(device)  # before the weights are read, which takes longer
        model = StormForConditionalGeneration.from_pretrained(
            path, dtype=dtype, trust_remote_code=trust_remote_code
        )
        processor = load_processor(path, trust_remote_code=trust_remote_code)
        return cls(
            model.to(place), processor, num_frames, latent_mode, cache_bytes, read, max_pixels
        )

    def answer(
        self,
        video: str | Clip,
        question: str,
        options: Sequence[str] = (),
        max_new_tokens: int = MAX_NEW_TOKENS,
        **generate_kwargs: Any,
    ) -> Answer:
        """One answer. Raises VideoError if the file cannot be read, InputError for what cannot be asked.

        `max_new_tokens` bounds the written answer; the latent segment comes on top.
        """
        questions = [Question(video, question, tuple(options))]
        return self.answer_batch(questions, max_new_tokens, **generate_kwargs)[0]

    @torch.inference_mode()
    def answer_batch(
        self,
        questions: Sequence[Question | Row],
        max_new_tokens: int = MAX_NEW_TOKENS,
        **generate_kwargs: Any,
    ) -> list[Answer]:
        """Answers to a batch, equal to asking one by one. Questions about one clip share what they can.

        They are greedy (`GREEDY`), unless `generate_kwargs` say otherwise: the checkpoint's generation_config.json
        decides on the end of a turn alone. Raises InputError for one of `generate_kwargs` that is in `OWNED`, and
        PromptError for a prompt that is longer than the model can read.
        """
        self.check_kwargs(generate_kwargs)
        began = time.perf_counter()
        prompts, videos = self.collator.prompts(questions, self.latent_mode)
        ids: list[list[int]] = self.processor.tokenizer(prompts)["input_ids"]
        check_length(self.model.config, max(map(len, ids)))
        ready = time.perf_counter()
        latent = self.latent_mode != "off"
        # Pads and the end; where the model may open the segment itself, the start, too.
        segment = self.collator.latent_budget + (1 if self.latent_mode == "force" else 2)
        with Phases(self.model) as phases:
            inputs = None
            if not UNSHARED & generate_kwargs.keys():
                inputs = read_prefixes(self.model, self.processor, ids, videos)
            if inputs is None:
                device = input_device(self.model)
                batch = self.collator.collate(prompts, videos)
                inputs = {name: tensor.to(device) for name, tensor in batch.items()}
            output = self.model.generate(
                **inputs,
                **{
                    **GREEDY,
                    "max_new_tokens": max_new_tokens + (segment if latent else 0),
                    "latent_mode": self.latent_mode,
                    "output_latent_states": latent,
                    "return_dict_in_generate": True,
                    **generate_kwargs,
                },
            )
        new_ids = output.sequences[:, inputs["input_ids"].shape[1] :]
        seconds = {"decode": ready - began, **phases.split(new_ids)}
        seconds["total"] = time.perf_counter() - began
        texts = self.processor.batch_decode(new_ids, skip_special_tokens=True)
        used = output.latent_counts.tolist() if latent else [0] * len(texts)
        forced = output.forced_end.tolist() if latent else [False] * len(texts)
        opened = self._opened(new_ids)
        counts = count_written(self.model, new_ids)
        lengths, visual = prompt_sizes(self.processor, inputs)
        return [
            Answer(
                text.strip(),
                _chosen(text, question.options),
                used[i],
                forced[i],
                opened[i],
                counts[i],
                lengths[i],
                visual[i],
                seconds,
            )
            for i, (text, question) in enumerate(zip(texts, questions, strict=True))
        ]

    def check_kwargs(self, generate_kwargs: Mapping[str, Any]) -> None:
        """Raises InputError for what `answer_batch` decides itself, unless it is said as it decides."""
        latent = self.latent_mode != "off"
        decided = {
            **GREEDY,
            "latent_mode": self.latent_mode,
            "output_latent_states": latent,
            "return_dict_in_generate": True,
        }
        for name, remedy in OWNED.items():
            beams = name == "num_beams" and not latent
            if name in generate_kwargs and generate_kwargs[name] != decided.get(name) and not beams:
                raise InputError(f"{name}={generate_kwargs[name]!r} does not go here: {remedy}")

    def _opened(self, new_ids: Tensor) -> list[bool]:
        if self.latent_mode != "auto":
            return [self.latent_mode == "force"] * len(new_ids)
        return (new_ids == latent_tokens(self.model.config).start).any(1).tolist()


def count_written(model: Any, new_ids: Tensor) -> list[int]:
    """How many of the ids (B, T) behind a prompt each row wrote: up to its end of turn, no latent tokens."""
    ends = model.generation_config.eos_token_id
    ends = torch.as_tensor([] if ends is None else ends, device=new_ids.device).reshape(-1)
    is_end = torch.isin(new_ids, ends)
    written = is_end.cumsum(1) - is_end.long() == 0  # what follows an end of turn is padding
    if has_latent_tokens(model.config):
        latent = torch.tensor(latent_tokens(model.config), device=new_ids.device)
        written &= ~torch.isin(new_ids, latent)
    return written.sum(1).tolist()


def prompt_sizes(processor: Any, inputs: Any) -> tuple[list[int], list[int]]:
    """Tokens of every row's prompt, and how many of them are visual."""
    names = ("video_token_id", "image_token_id")
    visual = [getattr(processor, name) for name in names if hasattr(processor, name)]
    is_visual = torch.isin(inputs["input_ids"], inputs["input_ids"].new_tensor(visual))
    return inputs["attention_mask"].sum(1).tolist(), is_visual.sum(1).tolist()


def _chosen(text: str, options: Sequence[str]) -> str | None:
    index = parse_answer(text, options) if options else None
    return None if index is None else options[index]

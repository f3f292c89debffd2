"""Rows to model inputs. Shapes: B batch, T prompt tokens, A answer tokens, K slots, D hidden.

Prompts are padded on the left, as ``generate`` needs them; answers on the right, as a separate
tensor, because the latent segment comes between the two and holds no token of the input.
"""

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from storm_vlm.data.decode import VideoError
from storm_vlm.data.processor import FrameBound, least_frames
from storm_vlm.data.prompt import LatentMode, answer_text, build_messages, render_prompt
from storm_vlm.data.row import Row, without_labels
from storm_vlm.data.video import Clip, read_video, require_proportions, video_metadata
from storm_vlm.errors import InputError
from storm_vlm.model.latent import IGNORE_INDEX

LAYOUT = "video_ids"  # of a clip's tensors: the ids that stand for it in a prompt
# Of a processor's outputs, those that are of the text.
TEXT = {"input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids"}
Reader = Callable[[str, int, float | None, float | None], Clip]  # path, frames, start, end
Example = Row | Mapping[str, Any] | tuple[Row, Tensor | None]


@dataclass(frozen=True)
class Question:
    """What to ask about which video; a :class:`Row` serves as well. No video: text alone.

    Labels come off options ("A. red"), as they do in a row. Raises InputError for an empty question, and for options
    that are empty or equal.
    """

    video: str | Clip | None
    question: str
    options: tuple[str, ...] = ()
    start: float | None = None
    end: float | None = None

    def __post_init__(self) -> None:
        if not self.question.strip():
            raise InputError("the question is empty: write one")
        options = tuple(without_labels(self.options))
        if len(set(options)) < len(options) or not all(option.strip() for option in options):
            raise InputError(
                f"options must differ, and none be empty: {', '.join(map(repr, options))}"
            )
        object.__setattr__(self, "options", options)


class VideoInputs:
    """The stock processor's tensors for a clip, the most recently used kept in memory.

    ``cache_bytes`` bounds what is kept (0: nothing). Files are taken not to change. The tensors
    are shared between calls: do not write to them. ``read`` is `read_video`, or what keeps its clips on disk.
    ``max_pixels`` bounds every frame (None: what the processor says), see `FrameBound`.
    """

    def __init__(
        self,
        processor: Any,
        num_frames: int,
        cache_bytes: int = 0,
        read: Reader = read_video,
        max_pixels: int | None = None,
    ) -> None:
        self.processor, self.num_frames, self.read = processor, num_frames, read
        self.cache_bytes = cache_bytes
        self._kept: OrderedDict[tuple[Any, ...], dict[str, Tensor]] = OrderedDict()
        self._kept_bytes = 0
        if getattr(processor, "video_processor", None) is None:
            raise InputError(f"{type(processor).__name__} reads no videos: choose a video model")
        # Unset, it means different things in different versions; True is what the model was trained with.
        if getattr(processor.video_processor, "cap_pixels_per_frame", True) is None:
            processor.video_processor.cap_pixels_per_frame = True
        self.bound = None
        if max_pixels is not None:
            self.bound = FrameBound(processor.video_processor, max_pixels)
            processor.video_processor.size = self.bound.size(num_frames)  # for the record

    def get(
        self, path: str, start: float | None = None, end: float | None = None
    ) -> dict[str, Tensor]:
        """``num_frames`` of the file's window, processed. Raises ``VideoError``."""
        key = (path, start, end)
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        inputs = self.load(path, start, end)
        size = _num_bytes(inputs)
        if size <= self.cache_bytes:
            self._kept[key] = inputs
            self._kept_bytes += size
            while self._kept_bytes > self.cache_bytes:
                self._kept_bytes -= _num_bytes(self._kept.popitem(last=False)[1])
        return inputs

    def load(self, path: str, start: float | None, end: float | None) -> dict[str, Tensor]:
        """What :meth:`get` keeps."""
        return self.process(self.read(path, self.num_frames, start, end))

    def process(self, clip: Clip) -> dict[str, Tensor]:
        """The processor's tensors of one clip, as its model's `generate` takes them, and `LAYOUT` (n,).

        Of a Qwen2.5-VL: pixel_values_videos (patches, values), video_grid_thw (1, 3), second_per_grid_ts (1,).
        A clip of fewer frames than a temporal patch is filled up with its last one, as Qwen2.5-VL's processor does.
        Raises ``VideoError`` for a clip that is too thin.
        """
        require_proportions(clip.path, *clip.frames.shape[1:3])
        if (missing := least_frames(self.processor.video_processor) - len(clip.frames)) > 0:
            shown, times = (
                np.r_[part, part[-1:].repeat(missing, 0)] for part in (clip.frames, clip.timestamps)
            )
            clip = replace(clip, frames=shown, timestamps=times)
        size = {} if self.bound is None else {"size": self.bound.size(len(clip.frames))}
        outputs = self.processor(
            text=[self.processor.video_token],
            videos=[clip.frames],
            video_metadata=[video_metadata(clip)],
            do_sample_frames=False,
            input_data_format="channels_last",  # it would take a height of 1 or 3 for channels
            add_special_tokens=False,
            return_tensors="pt",
            **size,
        )
        tensors = {n: torch.as_tensor(value) for n, value in outputs.items() if n not in TEXT}
        return {**tensors, LAYOUT: outputs["input_ids"][0]}


class StormCollator:
    """Builds training batches (call it) and prompts for ``generate`` (:meth:`collate_prompts`).

    ``latent_budget`` is the model's K; 0 trains the baseline without a latent segment. ``videos``
    reads the clips; by default a :class:`VideoInputs` that keeps none.
    """

    def __init__(
        self,
        processor: Any,
        num_frames: int,
        latent_budget: int,
        videos: VideoInputs | None = None,
    ) -> None:
        self.processor, self.latent_budget = processor, latent_budget
        self.videos = videos or VideoInputs(processor, num_frames)

    def __call__(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """The prompts of :meth:`collate_prompts` plus what is to be learned.

        Examples are rows, or mappings with a row's fields (as `datasets` yields them), so that this is
        a ``DataCollator`` of transformers; or pairs of a row and its target (K, D), None where it has no
        thought video (paper eq. 4); (k, D) for a row of k slots.
        ``labels`` (B, A): answer and end-of-turn tokens, then -100. Where a row has its own number of ``slots``, also
        these, (B,). Of pairs, also ``targets`` (B, K, D) float32, zero where absent, unless none has one; and
        ``target_mask`` (B,) bool.
        Raises ``ValueError`` for targets that do not fit the budget, ``VideoError``.
        """
        pairs = [example if isinstance(example, tuple) else (example, None) for example in examples]
        rows = [row if isinstance(row, Row) else Row.model_validate(row) for row, _ in pairs]
        batch = self.collate_prompts(rows, "force" if self.latent_budget else "off")
        batch["labels"] = self._labels(rows)
        if self.latent_budget and any(row.slots is not None for row in rows):
            batch["slots"] = torch.tensor([self._slots(row) for row in rows])
        if isinstance(examples[0], tuple):
            batch |= self._stack_targets(rows, [target for _, target in pairs])
        return batch

    def collate_prompts(
        self, questions: Sequence[Row | Question], latent_mode: LatentMode
    ) -> dict[str, Tensor]:
        """Inputs of ``generate``, equal to what the stock processor returns for the same text and clips.

        ``input_ids``, ``attention_mask`` and, where the model has them, ``mm_token_type_ids`` are (B, T), padded
        on the left; what :meth:`VideoInputs.process` makes of the clips follows in row order.
        """
        return self.collate(*self.prompts(questions, latent_mode))

    def collate(
        self, prompts: list[str], videos: Sequence[dict[str, Tensor] | None]
    ) -> dict[str, Tensor]:
        """What :meth:`collate_prompts` makes of :meth:`prompts`."""
        shown = [video for video in videos if video is not None]
        tokens = self._tokenize(prompts, padding_side="left")
        input_ids: Tensor = tokens["input_ids"]
        mask = {"input_ids": input_ids, "attention_mask": tokens["attention_mask"]}
        kinds = token_types(self.processor, input_ids)
        return {**mask, **kinds, **join_clips(self.processor, shown)}

    def prompts(
        self, questions: Sequence[Row | Question], latent_mode: LatentMode
    ) -> tuple[list[str], list[dict[str, Tensor] | None]]:
        """The text of each, and the tensors of its clip: one object for all questions about it, None for none."""
        clips: dict[Any, dict[str, Tensor]] = {}
        prompts, videos = [], []
        for item in questions:
            video = None
            messages = build_messages(item.question, item.options, int(item.video is not None))
            prompt = render_prompt(self.processor, messages, latent_mode)
            if item.video is not None:
                in_memory = isinstance(item.video, Clip)
                clip = id(item.video) if in_memory else (item.video, item.start, item.end)
                video = clips[clip] = clips.get(clip) or self._video(item)
                prompt = expand_video(self.processor, prompt, video[LAYOUT])
            prompts.append(prompt)
            videos.append(video)
        return prompts, videos

    def _tokenize(
        self, texts: list[str], padding_side: Literal["left", "right"], **kwargs: Any
    ) -> Any:
        return self.processor.tokenizer(
            texts, padding=True, padding_side=padding_side, return_tensors="pt", **kwargs
        )

    def _video(self, item: Row | Question) -> dict[str, Tensor]:
        if isinstance(item.video, Clip):
            return self.videos.process(item.video)
        try:
            return self.videos.get(str(item.video), item.start, item.end)
        except VideoError as error:
            raise VideoError(
                f"{item.id}: {error}" if isinstance(item, Row) else str(error)
            ) from error

    def _labels(self, rows: Sequence[Row]) -> Tensor:
        end_of_turn = self.processor.tokenizer.eos_token
        texts = [answer_text(row) + end_of_turn for row in rows]
        tokens = self._tokenize(texts, padding_side="right", add_special_tokens=False)
        return tokens["input_ids"].masked_fill(tokens["attention_mask"] == 0, IGNORE_INDEX)

    def _slots(self, row: Row) -> int:
        return min(row.slots or self.latent_budget, self.latent_budget)

    def _stack_targets(
        self, rows: Sequence[Row], targets: Sequence[Tensor | None]
    ) -> dict[str, Tensor]:
        mask = torch.tensor([target is not None for target in targets])
        present = [
            (target, self._slots(row))
            for row, target in zip(rows, targets, strict=True)
            if target is not None
        ]
        if not present:
            return {"target_mask": mask}
        hidden = present[0][0].shape[-1]
        if any(target.shape != (slots, hidden) for target, slots in present):
            raise InputError(
                f"targets must all be (K, D) with K = latent_budget = {self.latent_budget}, or a row's own slots, "
                f"got {sorted({tuple(target.shape) for target, _ in present})}: compute them again for this budget"
            )
        padded = [F.pad(target, (0, 0, 0, self.latent_budget - slots)) for target, slots in present]
        stacked = torch.zeros(len(targets), self.latent_budget, hidden)
        stacked[mask] = torch.stack(padded).float()
        return {"targets": stacked, "target_mask": mask}


def token_types(processor: Any, input_ids: Tensor) -> dict[str, Tensor]:
    """`mm_token_type_ids` (B, T), where the processor's model has them."""
    if "mm_token_type_ids" not in processor.model_input_names:
        return {}
    types = processor.create_mm_token_type_ids(input_ids.tolist())
    return {"mm_token_type_ids": torch.tensor(types, device=input_ids.device)}


def join_clips(processor: Any, clips: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors of several clips, in this order, as a model takes them. Raises InputError where it cannot."""
    joined = {}
    for name in clips[0].keys() - {LAYOUT} if clips else ():
        parts = [clip[name] for clip in clips]
        if len({part.shape[1:] for part in parts}) > 1:
            raise InputError(
                f"{type(processor).__name__} takes clips of one length at a time, and these differ in {name}: ask "
                "one by one (batch size 1), or leave out clips that are too short"
            )
        joined[name] = torch.cat(parts)
    return joined


def expand_video(processor: Any, prompt: str, *video_ids: Tensor) -> str:
    """The prompt with what stands for each of its clips, (n,) ids, in place of its one video token.

    What the stock processor does when given text and video together; done apart so that a cached
    video needs no second processing.
    """
    first, *rest = prompt.split(processor.video_token, len(video_ids))
    texts = [processor.tokenizer.decode(i, clean_up_tokenization_spaces=False) for i in video_ids]
    return first + "".join(text + part for text, part in zip(texts, rest, strict=True))


def _num_bytes(inputs: dict[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in inputs.values())

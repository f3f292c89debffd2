"""STORM as a model of lmms-eval 0.7: `--model storm --model_args pretrained=…,reasoner=latent`.

lmms-eval finds it by the entry point `lmms_eval.models`. It asks for PyAV below 16, with which our reader is not
safe, so install it first and storm-vlm after it, in an environment of its own; the newer PyAV serves both.
"""

from __future__ import annotations

import logging
from typing import Any

from accelerate import Accelerator
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts  # type: ignore[import-not-found]
from lmms_eval.api.model import lmms  # type: ignore[import-not-found]
from lmms_eval.models.registry_v2 import ModelManifest  # type: ignore[import-not-found]
from tqdm.auto import tqdm

from storm_vlm.data.collator import Question
from storm_vlm.errors import InputError
from storm_vlm.evaluation.runner import distributed
from storm_vlm.inference.frames import Frames
from storm_vlm.inference.pipeline import StormPipeline
from storm_vlm.inference.reasoners import build_reasoner, default_reasoner

logger = logging.getLogger(__name__)
manifest = ModelManifest("storm", chat_class_path=f"{__name__}.Storm")


class Storm(lmms):
    """A checkpoint of ours or a stock one, with any of the reasoners. Greedy whatever a task asks for.

    Args:
        pretrained: folder or hub name.
        batch_size: questions at once; those that share a bound on new tokens go together.
        device, max_batch_size: lmms-eval passes them; Accelerate gives each process its device.
        reasoner, num_frames, max_pixels, latent_mode: as for `storm evaluate`.
        max_new_tokens: of a turn. None: the task's for `latent` and `direct`, the protocol's for the others, whose
            chains a task's bound on answers would cut off.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str,
        batch_size: int | str = 1,
        device: str | None = None,
        max_batch_size: int | None = None,
        reasoner: str | None = None,
        num_frames: int | None = None,
        max_pixels: int | None = None,
        latent_mode: Any = None,
        max_new_tokens: int | None = None,
    ) -> None:
        super().__init__()
        state = distributed()
        self._rank, self._world_size = state.process_index, state.num_processes
        self.device: Any = state.device
        self.accelerator = Accelerator(cpu=self.device.type == "cpu")
        self.batch_size = int(batch_size)
        self.pipeline = StormPipeline.from_pretrained(
            pretrained,
            device=str(self.device),
            num_frames=num_frames,
            max_pixels=max_pixels,
            latent_mode=latent_mode,
        )
        self.name = reasoner or default_reasoner(self.pipeline)
        self.frames = Frames(self.pipeline.collator.videos.num_frames)
        self.max_new_tokens = max_new_tokens

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """One result each, in the order of the requests."""
        if any(request.args[2].get("do_sample") for request in requests):
            logger.warning("a task asks for sampling; storm answers greedily")
        batches: dict[int | None, list[int]] = {}
        for number, request in enumerate(requests):
            batches.setdefault(self._bound(request.args[2]), []).append(number)
        results: dict[int, GenerationResult] = {}
        with tqdm(total=len(requests), disable=self.rank != 0, desc="storm") as bar:
            for bound, numbers in batches.items():
                reasoner = build_reasoner(self.name, self.pipeline, self.frames, bound)
                for first in range(0, len(numbers), self.batch_size):
                    batch = numbers[first : first + self.batch_size]
                    replies = reasoner.answer([self._asked(requests[i]) for i in batch])
                    for i, reply in zip(batch, replies, strict=True):
                        counts = TokenCounts(output_tokens=reply.tokens)
                        results[i] = GenerationResult(reply.text, counts)
                    bar.update(len(batch))
        return [results[i] for i in range(len(requests))]

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        raise NotImplementedError("storm answers questions; use a task of generate_until")

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        raise NotImplementedError("storm answers in one round; use a task of generate_until")

    def _bound(self, gen_kwargs: dict[str, Any]) -> int | None:
        if self.max_new_tokens or self.name not in ("latent", "direct"):
            return self.max_new_tokens
        return gen_kwargs.get("max_new_tokens")

    def _asked(self, request: Instance) -> Question:
        """The one user turn of a request: its text, and its video if it has one."""
        _, doc_to_messages, _, doc_id, task, split = request.args
        turns = doc_to_messages(self.task_dict[task][split][doc_id])
        if [turn["role"] for turn in turns] != ["user"]:
            raise InputError(f"{task}: storm takes one user turn, got {turns}")
        parts = turns[0]["content"]
        videos = [part for part in parts if part["type"] == "video"]
        text = "\n".join(part["text"] for part in parts if part["type"] == "text")
        if len(videos) > 1 or any(part["type"] not in ("video", "text") for part in parts):
            raise InputError(f"{task}: storm takes one video and text, got {parts}")
        if not videos:
            return Question(None, text)
        video = videos[0]
        return Question(video["url"], text, (), video.get("start_time"), video.get("end_time"))

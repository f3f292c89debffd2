"""The five steps from a row to a training row (paper section 3.2). Each takes a draft and returns the next.

A row that has what a step would make is left as it is, and nobody is paid: importers may bring keyframes, plans
or prompts of their own, and a step may be replaced by any program that writes rows. Between steps, what is not a
field of a row is in its `meta`: `video_prompt`, and `construction`, how things came about.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict

from storm_vlm.construction import filters
from storm_vlm.construction.config import BuildConfig, StepName
from storm_vlm.construction.generators import GENERATORS
from storm_vlm.construction.prompts import (
    Keyframes,
    ReasoningPlan,
    VideoPrompt,
    keyframe_messages,
    plan_messages,
    video_messages,
)
from storm_vlm.construction.teacher import TeacherClient, TeacherReply
from storm_vlm.construction.types import Rejected, Request
from storm_vlm.data.row import Row, ThoughtVideo
from storm_vlm.data.store import Store, key_of
from storm_vlm.data.video import read_frames, read_video, write_video
from storm_vlm.errors import StormError

CRF = 12  # near-lossless: the codec should not decide what is learned
JUDGED = 32  # frames of a thought video that the filters look at


class Draft(BaseModel):
    """A row in the making. ``rejected`` says why it is out, if it is; scores come from the last step.

    ``final``: the next run leaves it as it is. What a teacher failed to give is asked for again: it may have been
    badly set up.
    """

    model_config = ConfigDict(frozen=True)

    row: Row
    rejected: str | None = None
    detail: str = ""
    final: bool = True
    scores: dict[str, float] = {}
    fingerprint: str = ""

    def noted(self, step: str, note: dict[str, Any], **fields: Any) -> Draft:
        """With fields of the row set, and a note how that came about."""
        meta = dict(fields.pop("meta", self.row.meta))
        meta["construction"] = {**meta.get("construction", {}), step: note}
        return self.model_copy(update={"row": self.row.model_copy(update={**fields, "meta": meta})})


class Resources:
    """What the steps work with. Made once per process; models are loaded when they are needed."""

    def __init__(self, config: BuildConfig, store: Store) -> None:
        self.config = config
        self.store = store
        self.teacher = TeacherClient(config.teacher, store) if config.teacher.model else None
        self.generator = GENERATORS[config.generator](config.generator_config, config.seed)
        self._lock = threading.Lock()
        self._off_topic: Callable[[np.ndarray, str], float] | None = None
        self._visual_gain: Callable[[Row], float] | None = None

    def keeps_thought_video(self, row: Row) -> bool:
        return row.thought_video is not None and not self.config.replace

    def off_topic(self, frames: np.ndarray, text: str) -> float:
        with self._lock:
            model = str(self.config.off_topic_model)
            self._off_topic = self._off_topic or filters.off_topic(model)
            return self._off_topic(frames, text)

    def visual_gain(self, row: Row) -> float:
        with self._lock:
            if self._visual_gain is None:
                from storm_vlm.construction.visual_gain import VisualGain  # brings torch

                self._visual_gain = VisualGain(str(self.config.visual_gain_model))
            return self._visual_gain(row)


def select_keyframes(resources: Resources, draft: Draft) -> Draft:
    """Times of at most K frames that matter: the teacher's choice, else spread evenly."""
    row, config = draft.row, resources.config
    if row.keyframes or resources.keeps_thought_video(row):
        return draft
    clip = read_video(row.video, config.candidates, row.start, row.end, config.max_side)
    times = [float(time) for time in clip.timestamps]
    note: dict[str, Any] = {"status": "uniform", "candidates": len(times)}
    if resources.teacher:
        shown, detail = config.show_answer, config.teacher.detail
        most = config.keyframes
        messages = keyframe_messages(row, list(clip.frames), times, most, shown, detail)
        reply = resources.teacher.ask(messages, Keyframes, candidates=len(times), most=most)
        note |= reply.provenance(config.teacher) | {"answer_shown": shown}
        if reply.value:
            chosen = tuple(times[i] for i in reply.value.selected)
            return draft.noted("keyframes", note, keyframes=chosen)
        note |= {"status": f"{reply.status}, uniform", "detail": reply.detail}
        draft = draft.model_copy(update={"final": False})
    spread = np.linspace(0, len(times) - 1, min(config.keyframes, len(times))).round().astype(int)
    return draft.noted("keyframes", note, keyframes=tuple(times[i] for i in spread))


def write_plan(resources: Resources, draft: Draft) -> Draft:
    """The teacher's reasoning from the keyframes to the answer."""
    row, config = draft.row, resources.config
    if row.plan or not resources.teacher or resources.keeps_thought_video(row):
        return draft
    frames = _keyframes(row, config.max_side)
    messages = plan_messages(row, frames, row.keyframes, config.show_answer, config.teacher.detail)
    reply = resources.teacher.ask(messages, ReasoningPlan)
    note = reply.provenance(config.teacher) | {"answer_shown": config.show_answer}
    return draft.noted("plan", note, plan=_needed("plan", reply).plan.strip())


def write_video_prompt(resources: Resources, draft: Draft) -> Draft:
    """The plan as something to be seen, if the generator wants words."""
    row, config = draft.row, resources.config
    if row.meta.get("video_prompt") or resources.keeps_thought_video(row):
        return draft
    if "thoughts" in config.steps and not resources.generator.needs_prompt:
        return draft  # asked for alone, prompts are for a generator of somebody else's
    if not resources.teacher or not row.plan:
        what = "plan" if resources.teacher else "teacher"
        raise StormError(
            f"{row.id}: {config.generator} needs a prompt and there is no {what} to make one from: name a "
            "teacher.model and run the step plans, or give rows meta.video_prompt"
        )
    (frame,) = _keyframes(row, config.max_side, first=True)
    messages = video_messages(row, frame, row.keyframes[0], config.teacher.detail)
    reply = resources.teacher.ask(messages, VideoPrompt)
    text = " ".join(_needed("prompt", reply).prompt.split())
    note = reply.provenance(config.teacher)
    return draft.noted("prompt", note, meta={**row.meta, "video_prompt": text})


def imagine(resources: Resources, draft: Draft) -> Draft:
    """The thought video, made unless the store has it, and all that led to it as its provenance."""
    row, generator, store = draft.row, resources.generator, resources.store
    if resources.keeps_thought_video(row):
        return draft
    if not row.keyframes:
        raise StormError(f"{row.id}: has no keyframes; run the step keyframes first")
    meta = dict(row.meta)
    prompt = str(meta.pop("video_prompt", ""))
    given = {"keyframes": row.keyframes, "plan": row.plan, "prompt": prompt}
    notes = {step: {"status": "given"} for step, value in given.items() if value}
    notes |= meta.pop("construction", {})
    request = Request(row, _keyframes(row), prompt)
    decided = {"seed": resources.config.seed, "settings": generator.settings()}
    key = key_of(generator=generator.name, **decided, **generator.determined_by(request))
    path = store.path("thoughts", key, ".mp4")
    if not path.exists():
        imagined = generator.imagine(request)
        costs = {"frames": len(imagined.frames), **imagined.costs}
        store.write(
            "thoughts", key, json.dumps(costs).encode()
        )  # first: the video's being there means finished
        with store.place("thoughts", key, ".mp4") as unfinished:
            write_video(unfinished, _even(imagined.frames), imagined.fps, crf=CRF)
    provenance = {"steps": notes, "prompt": prompt, **decided, "key": key}
    thought = ThoughtVideo(
        path=str(path), source=generator.source, generator=generator.name, provenance=provenance
    )
    return draft.model_copy(
        update={"row": row.model_copy(update={"thought_video": thought, "meta": meta})}
    )


def judge(resources: Resources, draft: Draft) -> Draft:
    """Scores of the thought video; thresholds are applied when results are collected.

    What is true (an oracle's, or the real future) need not begin at a keyframe, and may be like another or off a
    text; a real video may also have cuts, black frames and flashes.
    """
    row = draft.row
    if (thought := row.thought_video) is None:
        raise StormError(f"{row.id}: has no thought video to judge; run the step thoughts first")
    frames = read_video(thought.path, JUDGED, thought.start, thought.end).frames
    imagined, real = thought.source in ("generated", "keyframes"), thought.source == "future"
    contrasts = [filters.blank(frame[None]) for frame in frames]
    scores = {"blank": max(contrasts) if real else min(contrasts), "frozen": filters.frozen(frames)}
    if not real:
        scores["flicker"] = filters.flicker(frames)
    if imagined and row.keyframes:
        (first,) = _keyframes(row, first=True)
        scores["mismatch"] = filters.mismatch(frames, first)
    if imagined and resources.config.off_topic_model:
        text = str(thought.provenance.get("prompt") or row.question)
        scores["off_topic"] = resources.off_topic(frames, text)
    if imagined and resources.config.visual_gain_model:
        scores["visual_gain"] = resources.visual_gain(row)
    rounded = {name: round(score, 6) for name, score in scores.items()}
    print_ = filters.fingerprint(frames) if imagined else ""
    return draft.model_copy(update={"scores": rounded, "fingerprint": print_})


STEP_FUNCTIONS: dict[StepName, Callable[[Resources, Draft], Draft]] = {
    "keyframes": select_keyframes,
    "plans": write_plan,
    "prompts": write_video_prompt,
    "thoughts": imagine,
    "filter": judge,
}


def _needed(step: str, reply: TeacherReply[Any]) -> Any:
    if reply.value is None:
        raise Rejected(f"{step}_{reply.status}", reply.detail, final=False)
    return reply.value


def _keyframes(
    row: Row, max_side: int | None = None, first: bool = False
) -> tuple[np.ndarray, ...]:
    """The frames on screen at the row's keyframes."""
    times = row.keyframes[:1] if first else row.keyframes
    ascending = sorted(set(times))
    frames = read_frames(row.video, ascending, max_side).frames
    return tuple(frames[ascending.index(time)] for time in times)


def _even(frames: np.ndarray) -> np.ndarray:
    """Without a last odd row or column, which the codec could not hold."""
    height, width = (side // 2 * 2 for side in frames.shape[1:3])
    return frames[:, :height, :width]

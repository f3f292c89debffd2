"""The playground: ask about a clip, see what the slots hold, and whether the answer depends on them."""

from __future__ import annotations

import asyncio
import base64
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse
from pydantic import BaseModel, ConfigDict, Field
from torch.nn.functional import cosine_similarity

from storm_vlm.analysis.states import visual_tokens
from storm_vlm.data.collator import Question
from storm_vlm.data.jpeg import jpeg_uri
from storm_vlm.data.row import read_rows
from storm_vlm.data.video import Clip, read_video
from storm_vlm.inference.pipeline import StormPipeline
from storm_vlm.lab.world.clips import build_world
from storm_vlm.model.backbones import input_device
from storm_vlm.model.interventions import answers_when_fed, latent_states, own_slots
from storm_vlm.pages import render
from storm_vlm.serving.app import Service
from storm_vlm.serving.engine import Engine
from storm_vlm.serving.protocol import Refusal

EXAMPLES, TOKENS, SIDE = 6, 32, 240  # clips to choose from; of an answer; pixels of a frame


class Asked(BaseModel):
    """What the page sends."""

    model_config = ConfigDict(extra="forbid")

    question: str = Field(max_length=2000)
    video: str


@dataclass(frozen=True)
class Thought:
    """What the page shows."""

    frames: list[str]  #: JPEGs, one for each step of time that the model sees
    similarity: list[
        list[float]
    ]  #: by slot, cosine with the vision tower's mean token of each frame
    answers: dict[str, str]  #: with the model's own slots, and with others


@torch.inference_mode()
def think(pipeline: StormPipeline, clip: Clip, question: str, other: Clip) -> Thought:
    """The question about `clip`; the slots of "another clip" are those of the same question about `other`."""
    model, collator = pipeline.model, pipeline.collator
    questions = [Question(clip, question), Question(other, question)]
    inputs = collator.collate_prompts(questions, "force")
    inputs = {name: tensor.to(input_device(model)) for name, tensor in inputs.items()}
    states, _ = latent_states(model, inputs, collator.latent_budget)
    states = own_slots(model, states)
    slots = {
        "its own slots": states,
        "another clip's slots": states.flip(0),
        "zeroed slots": 0 * states,  # as many
        "latents off": None,
    }
    written = answers_when_fed(model, inputs, slots, TOKENS)
    tokens = visual_tokens(pipeline, [collator.videos.process(clip)])[0].flatten(1, -2).mean(1)
    taken = states[0, ~states[0].isnan().any(-1)]
    similarity = cosine_similarity(taken[:, None].float(), tokens[None].float(), dim=-1)
    steps = torch.linspace(0, len(clip.frames) - 1, len(tokens)).round().long().tolist()
    return Thought(
        [jpeg_uri(clip.frames[at], SIDE) for at in steps],
        similarity.tolist(),
        {kind: _text(pipeline, logits[0]) for kind, logits in written.items()},
    )


def _text(pipeline: StormPipeline, logits: torch.Tensor) -> str:
    """Of a row's logits (A, V): up to the end of its turn."""
    text = pipeline.processor.tokenizer.decode(logits.argmax(-1))
    return text.split(pipeline.processor.tokenizer.eos_token)[0].strip()


def add_playground(app: FastAPI) -> str:
    """Add the page, and `/play/thought`, which it asks with the server's key and limits; returns the page's path."""
    with TemporaryDirectory() as folder:
        rows = read_rows(build_world(folder, "reasoning", "test", EXAMPLES))
        clips = [read_video(row.video, 32) for row in rows]
        examples = [
            {
                "video": "data:video/mp4;base64,"
                + base64.b64encode(Path(row.video).read_bytes()).decode(),
                "question": row.question,
                "answer": row.answer,
                "picture": jpeg_uri(clip.frames[-1], SIDE),
            }
            for row, clip in zip(rows, clips, strict=True)
        ]
    page = render("play.html", examples=examples)

    @app.get("/play", response_class=HTMLResponse, include_in_schema=False)
    async def play() -> str:
        return page

    @app.post("/play/thought", include_in_schema=False)
    async def thought(asked: Asked, request: Request) -> Any:
        service: Service = request.app.state.service
        engine = service.engine
        assert isinstance(engine, Engine)
        pipeline = engine.pipelines.get("force")
        if pipeline is None:
            raise Refusal(400, "this model has no latent slots to look into")
        await request.scope["storm.work"].enter_async_context(service.clips)
        clip = await service.readers.read(asked.video)
        frames = pipeline.collator.videos.num_frames
        same = asked.video == examples[0]["video"]
        other = clips[1 if same else 0]
        every = torch.linspace(0, len(other.frames) - 1, min(frames, len(other.frames))).round()
        other = Clip(other.frames[every.long()], other.timestamps[every.long()], "an example")

        def look() -> Thought:
            with engine.model:
                return think(pipeline, clip, asked.question, other)

        return await asyncio.to_thread(look)

    return "/play"

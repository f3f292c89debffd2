"""`storm answer`: a question about a clip."""

from __future__ import annotations

from typing import Annotated, Literal

from cyclopts import Parameter
from cyclopts.types import PositiveInt

from storm_vlm.cli.terminal import Json, Switch, errors, show, show_json


def answer(
    video: str,
    question: str,
    /,
    *,
    options: Annotated[list[str] | None, Parameter(negative="")] = None,
    checkpoint: str | None = None,
    latent_mode: Literal["force", "auto", "off"] | None = None,
    max_new_tokens: PositiveInt | None = None,
    num_frames: PositiveInt | None = None,
    as_json: Annotated[bool, Json] = False,
    trust_remote_code: Annotated[bool, Switch] = False,
) -> None:
    """Answer a question about a video; what it took is printed beside the answer, on stderr.

    Args:
        video: A video file.
        question: What is asked about it.
        options: An option; repeat for each.
        checkpoint: Folder or hub name; by default the trained micro model that is shipped.
        latent_mode: By default what the checkpoint is for.
        max_new_tokens: Of the written answer, 32 by default; the latent segment comes on top.
        num_frames: Frames read from the clip; by default as trained, else 32.
        as_json: Print slots used, forced end, timings.
        trust_remote_code: Run code that the checkpoint brings.
    """
    from storm_vlm.data.collator import Question
    from storm_vlm.data.prompt import question_text
    from storm_vlm.data.video import video_shape
    from storm_vlm.inference.pipeline import MAX_NEW_TOKENS, StormPipeline
    from storm_vlm.lab.checkpoints import shipped

    prompt = Question(video, question, tuple(options or ()))
    question_text(prompt.question, prompt.options)
    video_shape(video)  # before the model is loaded, which takes longer
    pipeline = StormPipeline.from_pretrained(
        str(shipped("storm")) if checkpoint is None else checkpoint,
        num_frames=num_frames,
        latent_mode=latent_mode,
        trust_remote_code=trust_remote_code,
    )
    result = pipeline.answer_batch([prompt], max_new_tokens or MAX_NEW_TOKENS)[0]
    if as_json:
        show_json(result)
        return
    if options and result.option is None:
        show(f"no option was chosen; the model wrote: {result.text!r}")
    else:
        show(result.option or result.text)
    slots = f"{result.slots_used} latent slots" if result.opened else "no latent slots"
    show(f"({slots}, {result.tokens} tokens, {result.seconds['total']:.2f} s)", to=errors)

"""The embedded server: OpenAI's chat protocol over the one pipeline."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    ProcessCollector,
    generate_latest,
)
from starlette.exceptions import HTTPException

from storm_vlm.data.collator import Question
from storm_vlm.data.prompt import question_text
from storm_vlm.errors import StormError
from storm_vlm.inference.pipeline import Answer
from storm_vlm.serving.config import ServeConfig
from storm_vlm.serving.engine import Engine, Event, Job
from storm_vlm.serving.gate import Gate
from storm_vlm.serving.protocol import (
    ChatRequest,
    Completion,
    Refusal,
    TextPart,
    error_body,
    error_response,
)
from storm_vlm.serving.reader import ClipReaders
from storm_vlm.serving.replicas import Replicas

BROKEN = "something broke in the server; its log says what"


class Service:
    """From a request to the events of its answer."""

    def __init__(
        self,
        engine: Engine | Replicas,
        name: str,
        config: ServeConfig,
        metrics: CollectorRegistry,
    ) -> None:
        self.engine, self.name, self.config, self.metrics = engine, name, config, metrics
        self.readers = ClipReaders(engine.num_frames, config)
        # Frames take the most memory: few clips are held at a time, however many requests are.
        self.clips = asyncio.Semaphore(2 * config.batch_size)
        counters = {"answers": "Given.", "slots": "Latent ones, used.", "tokens": "Written."}
        self.counters = {
            name: Counter(f"storm_{name}", help, registry=metrics)
            for name, help in counters.items()
        }
        self.seconds = Counter(
            "storm_seconds", "Of the model, by phase.", ["phase"], registry=metrics
        )

    def _count(self, answer: Answer) -> None:
        self.counters["answers"].inc()
        self.counters["slots"].inc(answer.slots_used)
        self.counters["tokens"].inc(answer.tokens)
        for phase, spent in answer.seconds.items():
            self.seconds.labels(phase).inc(spent)

    def check_name(self, name: str) -> None:
        if name != self.name:
            raise Refusal(404, f"the model here is {self.name!r}", "model_not_found")

    async def submit(
        self, asked: ChatRequest, request: Request
    ) -> tuple[Job, asyncio.Queue[Event]]:
        """A job that is waiting for its answer, and where its events will be. Raises Refusal, StormError."""
        parts = asked.messages[0].parts
        texts = [part.text for part in parts if isinstance(part, TextPart)]
        urls = [part.video_url.url for part in parts if not isinstance(part, TextPart)]
        most = self.config.max_tokens
        tokens = asked.max_completion_tokens or asked.max_tokens or most
        mode = asked.latent_mode or self.engine.default
        self.check_name(asked.model)
        if len(urls) > 1:
            raise Refusal(400, "a question is about one video; send one video_url")
        if tokens > most:
            raise Refusal(400, f"an answer has at most {most} tokens here; lower max_tokens")
        if mode not in self.engine.modes:
            raise Refusal(400, f"this model has no latent slots for latent_mode {mode!r}")
        question = Question(None, "\n".join(texts))
        question_text(question.question)
        work, loop, events = (
            request.scope["storm.work"],
            asyncio.get_running_loop(),
            asyncio.Queue(),
        )
        if urls:
            await work.enter_async_context(self.clips)
            question = Question(await self.readers.read(urls[0]), question.question)

        def tell(event: Event) -> None:
            if isinstance(event, Answer):
                self._count(event)
            loop.call_soon_threadsafe(events.put_nowait, event)

        sampling = {"temperature": asked.temperature, "top_p": asked.top_p or 1.0, "top_k": 0}
        job = Job(
            question,
            mode,
            tokens,
            tell,
            sampling if asked.temperature else {},
            asked.seed,
            bool(asked.stream),
        )
        work.callback(self.engine.submit(job))
        return job, events


router = APIRouter()


@router.post("/v1/chat/completions", response_model=None)
async def complete(asked: ChatRequest, request: Request) -> Response | dict[str, Any]:
    service: Service = request.app.state.service
    job, events = await service.submit(asked, request)
    completion = Completion(service.name)
    event = await events.get()  # what cannot be answered has a status of its own, streamed or not
    if job.streamed and not isinstance(event, Exception):
        totals = bool(asked.stream_options and asked.stream_options.include_usage)
        pieces = _pieces(job, event, events, completion, totals)
        return StreamingResponse(pieces, media_type="text/event-stream")
    if isinstance(event, Answer):
        return completion.whole(event, _reason(job))
    raise event if isinstance(event, (StormError, Refusal)) else Refusal(500, BROKEN)


@router.get("/v1/models")
async def models(request: Request) -> dict[str, Any]:
    return {"object": "list", "data": [_card(request.app.state.service.name)]}


@router.get("/v1/models/{name:path}")
async def model(name: str, request: Request) -> dict[str, Any]:
    request.app.state.service.check_name(name)
    return _card(name)


@router.get("/health")
async def health(request: Request) -> dict[str, str]:
    engine = request.app.state.service.engine
    if not await asyncio.to_thread(lambda: engine.is_alive):
        raise Refusal(503, "the engine has ended")
    return {"status": "ok"}


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    page = generate_latest(request.app.state.service.metrics)
    return Response(page, media_type=CONTENT_TYPE_LATEST)


def create_app(
    engine: Engine | Replicas, name: str, config: ServeConfig, key: str | None
) -> FastAPI:
    """An ASGI application.

    Args:
        engine: what answers; whoever made it closes it.
        name: the model's, for clients.
        key: that clients must bring; None: the server answers to its own machine alone.
    """
    metrics = CollectorRegistry()
    ProcessCollector(registry=metrics)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.service = service = Service(engine, name, config, metrics)
        yield
        service.readers.close()

    app = FastAPI(title="storm", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.add_middleware(Gate, config=config, key=key, metrics=metrics)
    app.include_router(router)
    for kind in (HTTPException, RequestValidationError, StormError, Exception):
        app.add_exception_handler(kind, _explain)
    return app


async def _explain(_: Request, error: Exception) -> Response:
    """Any error in OpenAI's shape; of what is our bug, nothing is told."""
    if isinstance(error, HTTPException):
        return error_response(error)
    if isinstance(error, RequestValidationError):
        fault = error.errors()[0]
        param = ".".join(str(part) for part in fault["loc"][1:])
        return JSONResponse(error_body(400, f"{param}: {fault['msg']}", param=param), 400)
    told = isinstance(error, StormError)
    return error_response(Refusal(400, str(error)) if told else Refusal(500, BROKEN))


def _card(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "storm"}


def _reason(job: Job) -> str:
    return "stop" if job.stopped else "length"


async def _pieces(
    job: Job, event: Event, events: asyncio.Queue[Event], completion: Completion, totals: bool
) -> AsyncIterator[str]:
    """Server-sent events, from the first event of the job to its last."""
    yield _sse(completion.piece())
    while isinstance(event, str):
        yield _sse(completion.piece(event))
        event = await events.get()
    if isinstance(event, Exception):
        yield _sse(error_body(500, BROKEN))
    else:
        yield _sse(completion.piece(finish_reason=_reason(job)))
        if totals:
            yield _sse(completion.totals(event))
    yield "data: [DONE]\n\n"


def _sse(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body)}\n\n"

"""The engine in several processes: replicas on Ray Serve, which routes, looks after their health and restarts them.

Gate, reader and protocol stay where they are, in front: they see no difference. A replica may end amid an answer.
Ray runs what an actor was told at most once, so the front asks again; what a client has been told already is not
told twice.
"""

from __future__ import annotations

import asyncio
import logging
import random
import signal
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any

from storm_vlm.data.collator import Question
from storm_vlm.data.prompt import LatentMode
from storm_vlm.errors import StormError
from storm_vlm.inference.pipeline import Answer, StormPipeline
from storm_vlm.serving.engine import Engine, Job
from storm_vlm.serving.protocol import Refusal

ATTEMPTS = 3  # a question that ends every replica that it comes to must end some time
log = logging.getLogger(__name__)


class Replica:
    """One process of Ray Serve's, with an engine of its own."""

    def __init__(self, checkpoint: str, batch_size: int) -> None:
        self.engine = Engine(StormPipeline.from_pretrained(checkpoint), batch_size)

    def check_health(self) -> None:
        """Ray Serve asks now and then, and starts a replica that raises anew."""
        if not self.engine.is_alive:
            raise RuntimeError("the engine has ended")

    def traits(self) -> tuple[tuple[LatentMode, ...], LatentMode, int]:
        """Latent modes, the default one, and frames of a video."""
        return self.engine.modes, self.engine.default, self.engine.num_frames

    async def answer(
        self,
        question: Question,
        latent_mode: LatentMode,
        max_tokens: int,
        sampling: Mapping[str, float],
        seed: int,
        streamed: bool,
    ) -> AsyncIterator[str | StormError | tuple[Answer, bool] | None]:
        """Pieces of text, then the answer and whether it ended its turn; or an error; None: a fault of ours."""
        loop, events = asyncio.get_running_loop(), asyncio.Queue()

        def tell(event: Any) -> None:
            loop.call_soon_threadsafe(events.put_nowait, event)

        job = Job(question, latent_mode, max_tokens, tell, sampling, seed, streamed)
        leave = self.engine.submit(job)
        try:
            while isinstance(event := await events.get(), str):
                yield event
            if isinstance(event, Answer):
                yield event, job.stopped
            else:  # errors of other classes need not survive a journey
                yield StormError(str(event)) if isinstance(event, StormError) else None
        finally:
            leave()


class Replicas:
    """What `Engine` is to its callers, on `count` replicas. `close` ends them.

    `RAY_ADDRESS` names the cluster, as everywhere with Ray; without it, Ray starts on this machine alone. A
    checkpoint's folder must be seen by every node.

    Raises:
        StormError: Ray Serve is not installed, there is no such cluster, or it has too few CPUs or GPUs.
    """

    def __init__(self, checkpoint: str, name: str, batch_size: int, count: int) -> None:
        try:
            import ray
            import ray.serve
        except ImportError as error:
            raise StormError("--ray needs Ray Serve: pip install 'storm-vlm[replicas]'") from error
        ends = signal.getsignal(signal.SIGTERM)  # which Ray would take for itself
        try:
            ray.init(log_to_driver=False, include_dashboard=False)
        except Exception as error:  # of many classes
            raise StormError(f"Ray does not start ({error}): see RAY_ADDRESS") from error
        signal.signal(signal.SIGTERM, ends)
        self.name = name
        try:
            handle = self._start(checkpoint, batch_size, count)
            self.modes, self.default, self.num_frames = handle.traits.remote().result()
        except BaseException:
            ray.shutdown()
            raise
        self._handle = handle.options(stream=True)

    def _start(self, checkpoint: str, batch_size: int, count: int) -> Any:
        """The handle of as many replicas, all of them ready."""
        import ray
        from ray import serve

        there = ray.cluster_resources()
        kind = "GPU" if there.get("GPU") else "CPU"
        if there.get(kind, 0) < count:
            raise StormError(f"{count} replicas need a {kind} each: lower --replicas")
        folder = Path(checkpoint).expanduser()
        place = str(folder.resolve()) if folder.exists() else checkpoint
        serve.start(proxy_location="Disabled")  # what comes over HTTP comes through our gate
        replica: Any = serve.deployment(
            Replica,
            num_replicas=count,
            max_ongoing_requests=2 * batch_size,  # a batch to work on, and the next
            ray_actor_options={"num_cpus": 1, "num_gpus": int(kind == "GPU")},
        )
        return serve.run(replica.bind(place, batch_size), name=self.name, route_prefix=None)

    def submit(self, job: Job) -> Callable[[], object]:
        """Within an event loop; returns how to take the job back."""
        return asyncio.ensure_future(self._answer(job)).cancel

    async def _answer(self, job: Job) -> None:
        from ray.exceptions import RayError

        seed = random.getrandbits(63) if job.seed is None else job.seed  # the same at each attempt
        asked = job.question, job.latent_mode, job.max_tokens, dict(job.sampling), seed
        for _ in range(ATTEMPTS):
            answering = self._handle.answer.remote(*asked, job.streamed)
            said = ""
            try:
                async for event in answering:
                    if isinstance(event, str):
                        said += event
                        job.write(said)
                    elif not isinstance(event, tuple):
                        job.tell(event or RuntimeError("see the replica's log"))
                        return
                    elif event[0].text.startswith(job.written):
                        job.stopped = event[1]
                        job.end(event[0])
                        return
                    else:
                        break  # half of another answer has been told
            except RayError as error:
                log.warning("a replica ended, its question is asked again: %s", error)
            finally:
                answering.cancel()
        job.tell(Refusal(503, "no replica lived to answer; ask again", retry_after="1"))

    @property
    def is_alive(self) -> bool:
        from ray import serve

        app = serve.status().applications[self.name]
        states = [state for part in app.deployments.values() for state in part.replica_states]
        return "RUNNING" in states

    def close(self) -> None:
        import ray
        from ray import serve

        serve.delete(self.name)
        ray.shutdown()

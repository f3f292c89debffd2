"""The same steps on Ray Data: tasks decode and ask the teacher, actors hold the generator, tasks judge.

All share one store, on a file system that every node sees. A task or an actor that dies is run again by Ray, and
finds in the store what had been finished.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any
from uuid import uuid4

from storm_vlm.construction.build import Builder
from storm_vlm.construction.config import BuildConfig
from storm_vlm.construction.steps import Draft
from storm_vlm.construction.teacher import BudgetReached
from storm_vlm.data.atomic_write import half_file
from storm_vlm.data.check import RowFile
from storm_vlm.data.row import Row
from storm_vlm.errors import StormError
from storm_vlm.inference.client import UnansweredError

PREPARING = ("keyframes", "plans", "prompts")
BLOCKS = 1000  # of rows, at most: Ray keeps some kilobytes for each
# First the row's place; then row and draft as JSON, and state: "going", or how it ended.
Item = dict[str, Any]


def on_ray(address: str) -> Callable[[Builder, RowFile], Counter[str]]:
    """Work for `build.run` on a Ray cluster: its address, `auto`, or `local` for this machine alone."""

    def work(builder: Builder, rows: RowFile) -> Counter[str]:
        try:
            import ray
            import ray.data
        except ImportError as error:
            raise StormError("--ray needs Ray: pip install 'storm-vlm[ray]'") from error
        try:
            ray.init(
                address=None if address == "local" else address,
                ignore_reinit_error=True,
                log_to_driver=False,
            )
        except (ConnectionError, ValueError, RuntimeError, AssertionError) as error:
            raise StormError(
                f"no Ray cluster at {address!r} ({error}): give its address, auto, or local"
            ) from error
        try:
            queue = builder.store.folder / "unfinished" / f"{uuid4().hex}.jsonl"
            with half_file(queue, queue):
                return _flow(builder, rows, queue)
        finally:
            ray.shutdown()

    return work


def _flow(builder: Builder, rows: RowFile, queue: Path) -> Counter[str]:
    """Rows go by way of a file, and Ray is told their places in it: it would keep all rows in memory."""
    import ray.data

    if not len(rows):
        return Counter()
    items: list[Item] = []
    with queue.open("wb") as file:
        for row in rows:
            items.append({"place": file.tell()})
            file.write(row.model_dump_json().encode() + b"\n")
    config, told = builder.config, (builder.config.model_dump_json(), str(builder.store.folder))
    ray.data.DataContext.get_current().enable_progress_bars = False
    on_gpu = builder.resources.generator.on_gpu
    resources: dict[str, Any] = {"num_gpus": 1} if on_gpu else {"num_cpus": 0.25}
    gpus = int(ray.cluster_resources().get("GPU", 1)) if on_gpu else 1
    # Small blocks: what a dying worker takes with it is their rows' step.
    data: Any = ray.data.from_items(items, override_num_blocks=min(len(items), BLOCKS))
    # Mostly waiting for the teacher, hence a quarter of a CPU.
    asking = ray.data.TaskPoolStrategy(size=config.workers)
    actors = ray.data.ActorPoolStrategy(min_size=1, max_size=max(gpus, 1))
    data = data.map(prepare, fn_args=(*told, str(queue)), compute=asking, num_cpus=0.25)
    data = data.map(Imaginer, fn_constructor_args=told, compute=actors, **resources)
    data = data.map(finish, fn_args=told, num_cpus=0.5)
    return Counter(item["state"] for item in data.iter_rows())


@cache
def _builder(config: str, store: str) -> Builder:
    """One to a worker process."""
    return Builder(BuildConfig.model_validate_json(config), store)


def prepare(item: Item, config: str, store: str, queue: str) -> Item:
    """Decoding and the teacher."""
    builder = _builder(config, store)
    with open(queue, "rb") as file:
        file.seek(item["place"])
        text = file.readline().decode()
    row = Row.model_validate_json(text)
    if (draft := builder.finished(row)) and draft.final:
        return {"row": "", "draft": "", "state": "done"}
    going = {"row": text, "draft": Draft(row=row).model_dump_json(), "state": "going"}
    return _advanced(builder, going, PREPARING)


class Imaginer:
    """An actor, which keeps the generator's weights from one row to the next."""

    def __init__(self, config: str, store: str) -> None:
        self.builder = _builder(config, store)

    def __call__(self, item: Item) -> Item:
        return _advanced(self.builder, item, ("thoughts",))


def finish(item: Item, config: str, store: str) -> Item:
    """The filters' scores, and the result into the store."""
    builder = _builder(config, store)
    item = _advanced(builder, item, ("filter",))
    if item["state"] == "going":
        row = Row.model_validate_json(item["row"])
        builder.finish(row, Draft.model_validate_json(item["draft"]))
        return {"state": "done"}
    return {"state": item["state"]}


def _advanced(builder: Builder, item: Item, steps: tuple[str, ...]) -> Item:
    if item["state"] != "going":
        return item
    draft = Draft.model_validate_json(item["draft"])
    try:
        draft = builder.advance(draft, [step for step in steps if step in builder.config.steps])
    except UnansweredError:
        return {**item, "state": "unanswered"}
    except BudgetReached:
        return {**item, "state": "budget"}
    return {**item, "draft": draft.model_dump_json()}

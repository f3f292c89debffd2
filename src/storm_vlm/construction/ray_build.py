"""The same steps on Ray Data: tasks decode and ask the teacher, actors hold the generator, tasks judge.

All share one store, on a file system that every node sees. A task or an actor that dies is run again by Ray, and
finds in the store what had been finished.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import cache
from typing import Any

from storm_vlm.construction.build import Builder
from storm_vlm.construction.config import BuildConfig
from storm_vlm.construction.steps import Draft
from storm_vlm.construction.teacher import BudgetReached
from storm_vlm.data.row import Row
from storm_vlm.errors import StormError
from storm_vlm.inference.client import UnansweredError

PREPARING = ("keyframes", "plans", "prompts")
Item = dict[
    str, str
]  # row, draft (both JSON) and state, which is "going" until it says how it ended


def on_ray(address: str) -> Callable[[Builder, list[Row]], Counter[str]]:
    """Work for `build.run` on a Ray cluster: its address, `auto`, or `local` for this machine alone."""

    def work(builder: Builder, rows: list[Row]) -> Counter[str]:
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
            return _flow(builder, rows)
        finally:
            ray.shutdown()

    return work


def _flow(builder: Builder, rows: list[Row]) -> Counter[str]:
    import ray.data

    if not rows:
        return Counter()
    config, told = builder.config, (builder.config.model_dump_json(), str(builder.store.folder))
    ray.data.DataContext.get_current().enable_progress_bars = False
    on_gpu = builder.resources.generator.on_gpu
    resources: dict[str, Any] = {"num_gpus": 1} if on_gpu else {"num_cpus": 0.25}
    gpus = int(ray.cluster_resources().get("GPU", 1)) if on_gpu else 1
    items = [{"row": row.model_dump_json(), "draft": "", "state": "going"} for row in rows]
    # One row to a block: what a dying worker takes with it is one row's step.
    data: Any = ray.data.from_items(items, override_num_blocks=len(items))
    # Mostly waiting for the teacher, hence a quarter of a CPU.
    asking = ray.data.TaskPoolStrategy(size=config.workers)
    actors = ray.data.ActorPoolStrategy(min_size=1, max_size=max(gpus, 1))
    data = data.map(prepare, fn_args=told, compute=asking, num_cpus=0.25)
    data = data.map(Imaginer, fn_constructor_args=told, compute=actors, **resources)
    data = data.map(finish, fn_args=told, num_cpus=0.5)
    return Counter(item["state"] for item in data.take_all())


@cache
def _builder(config: str, store: str) -> Builder:
    """One to a worker process."""
    return Builder(BuildConfig.model_validate_json(config), store)


def prepare(item: Item, config: str, store: str) -> Item:
    """Decoding and the teacher."""
    builder, row = _builder(config, store), Row.model_validate_json(item["row"])
    if (draft := builder.finished(row)) and draft.final:
        return {**item, "state": "done"}
    return _advanced(builder, {**item, "draft": Draft(row=row).model_dump_json()}, PREPARING)


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
        item = {**item, "state": "done"}
    return item


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

"""`storm serve`: a checkpoint behind the OpenAI protocol."""

from __future__ import annotations

from typing import Annotated, Literal

from cyclopts import Parameter
from cyclopts.types import PositiveInt

from storm_vlm.cli.terminal import Fields, Switch, show
from storm_vlm.errors import StormError
from storm_vlm.serving.config import ServeConfig


def serve(
    checkpoint: str | None = None,
    /,
    *,
    config: Annotated[ServeConfig, Fields] = ServeConfig.model_validate({}),  # noqa: B008
    engine: Annotated[Literal["storm", "vllm"], Parameter(help="What answers.")] = "storm",
    ray: Annotated[bool, Switch] = False,
    replicas: PositiveInt = 1,
) -> None:
    """Answer over HTTP, as OpenAI's chat completions; STORM_API_KEY is the key that clients must bring.

    Args:
        checkpoint: Folder or hub name; by default the trained micro model that is shipped.
        ray: Run the engine on Ray Serve; RAY_ADDRESS names a cluster, else on this machine.
        replicas: Engines, each with a CPU or GPU of its own; needs --ray.
    """
    from storm_vlm.lab.checkpoints import shipped
    from storm_vlm.serving.serve import hand_over
    from storm_vlm.serving.serve import serve as run

    checkpoint = str(shipped("storm")) if checkpoint is None else checkpoint
    if replicas > 1 and not ray:
        raise StormError("--replicas are Ray's: add --ray")
    if engine == "vllm":
        if ray:
            raise StormError("--ray runs our own engine alone: leave --engine vllm out")
        hand_over(checkpoint, config)
    run(checkpoint, config, show, replicas=replicas if ray else 0)


def play(
    checkpoint: str | None = None,
    /,
    *,
    config: Annotated[ServeConfig, Fields] = ServeConfig.model_validate({}),  # noqa: B008
) -> None:
    """The same server with a page to ask from, which shows the slots and what the answer is without them.

    Args:
        checkpoint: Folder or hub name; by default the trained micro model that is shipped.
    """
    from storm_vlm.lab.checkpoints import shipped
    from storm_vlm.lab.play import add_playground
    from storm_vlm.serving.serve import serve as run

    run(str(shipped("storm")) if checkpoint is None else checkpoint, config, show, add_playground)

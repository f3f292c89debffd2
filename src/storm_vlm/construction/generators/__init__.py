"""Where thought videos come from: video models, the real future, the keyframes, or the micro world's simulator."""

from __future__ import annotations

from typing import TYPE_CHECKING

from storm_vlm.registry import Registry

if TYPE_CHECKING:
    from storm_vlm.construction.types import Generator

GENERATORS: Registry[type[Generator]] = Registry(
    "generators",
    {
        "wan": f"{__name__}.wan:Wan",
        "ltx-2": f"{__name__}.ltx2:LTX2",
        "hunyuan-video": f"{__name__}.hunyuan:HunyuanVideo",
        "future": f"{__name__}.future:Future",
        "keyframes": f"{__name__}.slides:Slides",
        "world": "storm_vlm.lab.world.generator:World",
        "erring_world": "storm_vlm.lab.world.generator:ErringWorld",
    },
)

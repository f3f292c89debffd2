"""Rows from other data sets, and rows for other trainers.

An importer is a function from one object of a source (see `sources.py`) to the fields of its rows, videos named as
the source names them; or a class of such functions, of which every import makes one. A field `of_video` is a function
from the video's path to the fields that only the file itself tells. It raises `parse.Skipped` for an object that is
not for us (an image question), ValueError for one that is wrong; the text before a first colon is the reason that is
counted. An exporter is a function from a row to an object; it raises ValueError for what its layout cannot say.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from storm_vlm.registry import Registry

if TYPE_CHECKING:
    from storm_vlm.data.row import Row

IMPORTERS: Registry[Callable[[Any], list[dict[str, Any]]]] = Registry(
    "importers",
    {
        "video-r1": f"{__name__}.video_r1:video_r1_rows",
        "videoespresso": f"{__name__}.videoespresso:videoespresso_rows",
        "llava-video": f"{__name__}.conversations:llava_rows",
        "llama-factory": f"{__name__}.conversations:llama_factory_rows",
        "ms-swift": f"{__name__}.conversations:swift_rows",
        "openai": f"{__name__}.conversations:openai_rows",
        "vbvr": f"{__name__}.vbvr:Vbvr",
        "twiff": f"{__name__}.futures:twiff_rows",
        "future-l1": f"{__name__}.futures:future_l1_rows",
        "v1-33k": f"{__name__}.futures:v1_33k_rows",
    },
)
EXPORTERS: Registry[Callable[[Row], dict[str, Any]]] = Registry(
    "exporters",
    {
        "llama-factory": f"{__name__}.conversations:sharegpt_item",
        "ms-swift": f"{__name__}.conversations:sharegpt_item",  # the same layout
    },
)

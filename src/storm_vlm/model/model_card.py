"""`README.md` of a checkpoint: what it was made from and how, how to load it, what is known of it."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

CARD = "README.md"
BLANK = "[More Information Needed]"  # of the form that transformers lays on top when it uploads

_HEAD = """\
---
library_name: transformers
pipeline_tag: video-text-to-text
tags: [storm, latent-reasoning]
{base}---

# {name}

A video-language model of the type `{kind}`{slots}. Made from {made_from} with
`storm-vlm`. The licence of the model that it was made from holds for it, too.

## How to load

```python
from storm_vlm import StormPipeline  # pip install storm-vlm

answer = StormPipeline.from_pretrained("{name}").answer("CLIP.mp4", "What happens next?")
```
"""
_PLAIN = """
With transformers alone it needs `trust_remote_code=True`, which runs `custom_generate/generate.py` of this folder:

```python
from transformers import AutoModelForImageTextToText

model = AutoModelForImageTextToText.from_pretrained("{name}", trust_remote_code=True)
```

With neither, the model has no slots, and its turn ends where they begin: answers are empty.
"""
_LIMITS = """
## Limits

{results}Video is read as {frames} frames spread evenly over the clip. Nothing is known of clips, questions and
languages unlike those that it was trained on; answers can be wrong, and what the latent slots hold is not to be read
as an explanation.
"""


def model_card(
    folder: Path, base: str = "", stages: Sequence[tuple[str, str]] = (), results: str = ""
) -> str:
    """The card of a checkpoint's folder.

    Args:
        folder: holds its `config.json`.
        base: the model that it was made from, a folder or hub name.
        stages: of its training, in order: a title, and settings as YAML.
        results: Markdown.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    budget, name = config.get("latent_budget", 0), folder.resolve().name
    on_hub = bool(re.fullmatch(r"\w[\w.-]*/[\w.-]+", base)) and not Path(base).exists()
    parts = [
        _HEAD.format(
            name=name,
            kind=config["model_type"],
            slots=f" that reasons in at most {budget} latent slots before it answers"
            if budget
            else "",
            base=f"base_model: {base}\n" if on_hub else "",
            made_from=f"`{base if on_hub else Path(base).name or 'a model of its own'}`",
        )
    ]
    if budget and not (folder / "adapter_config.json").exists():
        parts.append(_PLAIN.format(name=name))
    if stages:
        parts.append("\n## How it was made\n")
        parts += [f"\n{title}:\n\n```yaml\n{settings}```\n" for title, settings in stages]
    if results:
        parts.append(f"\n## Results\n\n{results.strip()}\n")
    unknown = "" if results else "No result is recorded here. "
    frames = config.get("num_frames") or "some"
    parts.append(_LIMITS.format(results=unknown, frames=frames))
    return "".join(parts)


def keep_or_write_card(folder: Path, base: str) -> None:
    """A card where there is none yet."""
    card = folder / CARD
    if not card.exists() or BLANK in card.read_text(encoding="utf-8"):
        card.write_text(model_card(folder, base), encoding="utf-8")

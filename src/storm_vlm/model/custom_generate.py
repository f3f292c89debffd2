"""What a checkpoint says to those who load it with transformers alone.

With ``trust_remote_code=True`` transformers runs its ``custom_generate/generate.py``: the rollout of this package, as
one file. Without, its generation config lets every latent token end the turn: the stock model, which would write text
into the segment and then answer from nothing, answers with nothing. Ours takes those ends away again.
"""

from __future__ import annotations

import copy
import inspect
import re
from pathlib import Path
from typing import Any

from storm_vlm import errors
from storm_vlm.model import generation, positions, segment, tokens
from storm_vlm.model.backbones import BACKBONES, backbone
from storm_vlm.model.generation import LatentRolloutMixin

SOURCES = (errors, tokens, segment, positions, generation)  # each needs those before it
HEADER = '''"""STORM: the latent slots of this checkpoint, for `generate` with ``trust_remote_code=True``.

Put together from the sources of the package `storm_vlm`, which is not needed here.
"""

from __future__ import annotations

import inspect
'''
POSITION_RULES: tuple[
    type, ...
] = ()  # what the core is extended with; a checkpoint's file names its own


def write_custom_generate(model: Any, folder: Path) -> None:
    """Beside the weights of a model with latent slots: its rollout, and a generation config for stock models."""
    if not getattr(model.config, "latent_budget", 0):
        return
    config = copy.deepcopy(model.generation_config)
    ends = [] if config.eos_token_id is None else config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    config.eos_token_id = list(dict.fromkeys([*ends, *tokens.latent_tokens(model.config)]))
    config.save_pretrained(folder)
    place = folder / "custom_generate"
    place.mkdir(exist_ok=True)
    (place / "generate.py").write_text(source(model), encoding="utf-8")


def source(model: Any) -> str:
    """The file ``custom_generate/generate.py`` of a model: its needs are torch and transformers."""
    core = backbone(model).core if model.config.model_type in BACKBONES else None
    rules = [c.__name__ for c in type(core).__mro__ if c.__module__ == positions.__name__]
    ours = r"^from (?:storm_vlm|__future__)\b.* import (?:\([^)]*\)|.*)\n"
    parts = [re.sub(ours, "", inspect.getsource(module), flags=re.MULTILINE) for module in SOURCES]
    last = f"POSITION_RULES = ({''.join(f'{name}, ' for name in rules)})\n"
    return "\n\n".join([HEADER, *parts, last, inspect.getsource(generate)])


def generate(model: Any, *args: Any, **kwargs: Any) -> Any:
    """``model.generate``, of a stock model that becomes one with latent slots on its first call."""
    if "latent_run" not in inspect.signature(model.prepare_inputs_for_generation).parameters:
        for module, mixins in ((model, (LatentRolloutMixin,)), (model.base_model, POSITION_RULES)):
            stock = type(module)
            body = {"__module__": stock.__module__}
            module.__class__ = type(stock.__name__, (*mixins, stock), body)
    return type(model).generate(model, *args, **kwargs)

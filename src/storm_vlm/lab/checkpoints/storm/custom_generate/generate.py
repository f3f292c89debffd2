"""STORM: the latent slots of this checkpoint, for `generate` with ``trust_remote_code=True``.

Put together from the sources of the package `storm_vlm`, which is not needed here.
"""

from __future__ import annotations

import inspect


"""The one base of all errors that a user can mend."""


class StormError(Exception):
    """Wrong input, a missing file, a setting that cannot work: the message names it and the remedy.

    The command line prints the message of these alone, in one line. Any other exception is a bug of ours.
    """


class InputError(StormError, ValueError):
    """A value that was given, and cannot be used."""


class AccessError(StormError, OSError):
    """A file, folder or server that cannot be read, written or reached."""


"""The three special tokens of the latent segment, and where their ids and the slot budget are kept.

Ids and budget live in the model's config, so that a checkpoint carries all that inference needs.
"""


from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AddedToken


LATENT_TOKENS = ("<|latent_start|>", "<|latent_pad|>", "<|latent_end|>")
_CONFIG_NAMES = ("latent_start_token_id", "latent_pad_token_id", "latent_end_token_id")
# What our checkpoints keep in a stock config.
SETTINGS = (*_CONFIG_NAMES, "latent_budget", "latent_pause", "latent_bottleneck", "num_frames")


class LatentError(StormError, ValueError):
    """A checkpoint, prompt or option that latent reasoning cannot work with."""


class LatentTokens(NamedTuple):
    """Token ids of the latent segment ``start pad*K end``."""

    start: int
    pad: int
    end: int


def has_latent_tokens(config: Any) -> bool:
    """Whether this config's model has met `add_latent_tokens`."""
    return getattr(config, _CONFIG_NAMES[0], None) is not None


def latent_tokens(config: Any) -> LatentTokens:
    """Read the ids from a model config.

    Raises:
        LatentError: the config has none, i.e. the model has never met `add_latent_tokens`.
    """
    ids = [getattr(config, name, None) for name in _CONFIG_NAMES]
    if any(i is None for i in ids):
        raise LatentError(
            "this model's config has no latent token ids: call add_latent_tokens(model, processor)"
        )
    return LatentTokens(*ids)  # type: ignore[arg-type]


def check_settings(config: Any) -> None:
    """Raises CheckpointError for `SETTINGS` that no training could have written."""
    text = config.get_text_config()
    known = [name for name in SETTINGS if getattr(config, name, None) is not None]
    needed = [*_CONFIG_NAMES, "latent_budget"] if set(_CONFIG_NAMES) & set(known) else []
    most = getattr(text, "max_position_embeddings", None) or float("inf")
    ranges = {
        **dict.fromkeys([*_CONFIG_NAMES, "latent_bottleneck"], (0, text.vocab_size - 1)),
        "latent_budget": (0, most),
        "num_frames": (1, float("inf")),
        "latent_pause": (False, True),
    }
    for name in dict.fromkeys([*needed, *known]):
        value, (low, high) = getattr(config, name, None), ranges[name]
        if type(value) is not type(low) or not low <= value <= high:
            raise CheckpointError(
                f"config.json of {config.name_or_path or 'this model'}: {name} is {value!r}, not from {low} to "
                f"{high}: copy the file again from where the model was trained"
            )


def check_tokenizer(config: Any, processor: Any) -> None:
    """Raises CheckpointError where config and tokenizer have other ids for the latent tokens."""
    ids = getattr(processor, "tokenizer", processor).convert_tokens_to_ids(list(LATENT_TOKENS))
    known = [getattr(config, name, None) for name in _CONFIG_NAMES]
    if known != ids:
        raise CheckpointError(
            f"{config.name_or_path or 'this model'}: config.json has the latent tokens' ids {known}, the tokenizer "
            f"{ids}: copy both again from where the model was trained"
        )


def add_latent_tokens(model: Any, processor: Any, budget: int = 8, seed: int = 0) -> LatentTokens:
    """Teach model and processor the latent tokens; calling it again only sets the budget.

    Qwen2.5-VL's embedding table has spare rows beyond the tokenizer, so it normally keeps its size; it never shrinks.
    The three rows (spare rows are untrained) start at the mean of the trained rows plus a small distinct noise, in
    the input embedding and in the output layer.

    Args:
        model: a causal model with a ``config``; changed in place.
        processor: its processor (or tokenizer); changed in place. Save both.
        budget: K, the most latent slots of a segment (8 in the paper); 0 switches latent reasoning off.
        seed: of the noise; the global random state is left alone.

    Raises:
        LatentError: negative budget, or a config whose ids contradict the tokenizer.
    """
    if budget < 0:
        raise LatentError(f"the latent budget must be 0 or more, got {budget}")
    tokenizer = getattr(processor, "tokenizer", processor)
    added = [AddedToken(name, special=True, normalized=False) for name in LATENT_TOKENS]
    tokenizer.add_tokens(added, special_tokens=True)  # known tokens are skipped
    ids = LatentTokens(*tokenizer.convert_tokens_to_ids(list(LATENT_TOKENS)))
    known = [getattr(model.config, name, None) for name in _CONFIG_NAMES]
    if known != list(ids):
        if any(i is not None for i in known):
            raise LatentError(
                f"config says latent ids {known}, tokenizer says {list(ids)}: load a matching pair"
            )
        if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
            model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        _initialize_rows(model, ids, seed)
    for name, token_id in zip(_CONFIG_NAMES, ids, strict=True):
        setattr(model.config, name, token_id)
    model.config.latent_budget = budget
    return ids


@torch.no_grad()
def _initialize_rows(model: Any, ids: LatentTokens, seed: int) -> None:
    tables: list[Tensor] = [model.get_input_embeddings().weight]
    output = model.get_output_embeddings()
    if output is not None and output.weight is not tables[0]:
        tables.append(output.weight)
    generator = torch.Generator().manual_seed(seed)
    for table in tables:
        trained = table[: min(ids)]  # special tokens come last
        mean = trained.mean(0, dtype=torch.float32)
        sample = trained[:: max(1, len(trained) // 4096)]  # no float32 copy of the whole table
        scale = 0.1 * sample.float().std()
        noise = torch.randn(len(ids), table.shape[1], generator=generator).to(mean)
        table[list(ids)] = (mean + scale * noise).to(table)


"""Which token may follow: the rules of the latent segment, as a function of the ids alone.

``<|latent_start|>``, then up to K ``<|latent_pad|>``, then always ``<|latent_end|>`` (section 3.1).
"""


from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList


NEVER = float("-inf")


def latent_segment(input_ids: Tensor, tokens: LatentTokens, budget: int) -> tuple[Tensor, Tensor]:
    """Per row of ids (B, T): is the latent segment open (B,) bool, and how many slots has it (B,) long.

    Derived from the ids alone, without a device synchronisation.
    """
    if input_ids.shape[1] == 0:  # a prompt of embeddings only
        used = input_ids.new_zeros(len(input_ids))
        return used.bool(), used
    trailing = (input_ids[:, -(budget + 1) :] == tokens.pad).flip(1)
    used = trailing.long().cumprod(1).sum(1)
    before = (input_ids.shape[1] - 1 - used).clamp_min(0)
    return input_ids.gather(1, before[:, None])[:, 0] == tokens.start, used


class LatentBudgetProcessor(LogitsProcessor):
    """Chooses the tokens of the latent segment and keeps them out of the text. Must run last."""

    def __init__(
        self,
        tokens: LatentTokens,
        budget: int,
        sampling: bool,
        prompt_length: int,
        forced: bool = False,  # the prompts have opened the segment
    ) -> None:
        self.tokens, self.budget, self.sampling = tokens, budget, sampling
        self.latent = torch.tensor(tokens)
        self.forced = forced
        self.once = forced or budget == 0  # no segment opens behind the prompt
        self.first = max(prompt_length - 1, 0)  # the prompt's last token may open the segment
        self.last = (
            prompt_length + budget
        )  # ids that may leave it open, where the prompt has opened it

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores (B, V) in, scores out. Forced choices score 0, so they leave a beam's score alone."""
        _, pad, end = self.tokens
        outside = self._outside(input_ids, scores)
        if self._is_over(input_ids):
            return outside
        is_open, used = self._segment(input_ids)
        full = used >= self.budget
        inside = torch.full_like(scores, NEVER)
        if self.sampling:  # keep p(end); all other probability means "one more slot"
            others = scores.clone()
            others[:, end] = NEVER
            inside[:, pad] = others.logsumexp(-1).masked_fill_(full, NEVER)
            inside[:, end] = scores[:, end].masked_fill(full, 0.0)
        else:
            ends = full | (scores.argmax(-1) == end)
            inside.scatter_(1, torch.where(ends, end, pad)[:, None], 0.0)
        return torch.where(is_open[:, None], inside, outside)

    def bar(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores (B, V) without the segment's tokens where they have no place, for top-p and its like to choose from.

        Else these might leave nothing but such tokens, and so nothing at all.
        """
        outside = self._outside(input_ids, scores)
        if self._is_over(input_ids):
            return outside
        is_open, _ = self._segment(input_ids)
        return torch.where(is_open[:, None], scores, outside)

    def _outside(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        start = self.tokens.start
        self.latent = self.latent.to(scores.device)
        outside = scores.index_fill(1, self.latent, NEVER)
        if not self.once:
            opened = (input_ids[:, self.first :] == start).any(1)
            outside[:, start] = scores[:, start].masked_fill(opened, NEVER)
        return outside

    def _segment(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        """`latent_segment`, with less to count where all prompts opened it: what is open has a slot for each step."""
        if not self.forced:
            return latent_segment(input_ids, self.tokens, self.budget)
        steps = input_ids.shape[1] - 1 - self.first
        is_open = input_ids[:, -1] == (self.tokens.pad if steps else self.tokens.start)
        return is_open, is_open * steps

    def _is_over(self, input_ids: Tensor) -> bool:
        """Whether no segment can be open, known from the length alone."""
        return self.once and input_ids.shape[1] > self.last


class LatentProcessors(LogitsProcessorList):
    """All processors of one generate: where it samples, the rule's bar before them, and the rule behind them."""

    def __init__(self, processors: LogitsProcessorList, rule: LatentBudgetProcessor) -> None:
        super().__init__(processors)
        self.rule = rule

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Tensor:
        if self.rule.sampling:
            scores = self.rule.bar(input_ids, scores)
        return self.rule(input_ids, super().__call__(input_ids, scores, **kwargs))


"""M-RoPE positions by the rule Qwen2-VL and Qwen2.5-VL were trained with.

transformers 5 lets the text after a video resume at ``start + max(height, width)``, so the question
overlaps the temporal axis of a long video (and 5.17 truncates the seconds per temporal grid to an
integer). The released weights were trained with: every block starts at the largest position so far
plus one, and the temporal index is ``floor(grid index * seconds per grid * tokens per second)``
(Qwen2-VL, which knows no seconds: the grid index).

The product is taken in float32, as in the code published with the weights (``get_rope_index`` of
transformers 4.49, ``rope2d.py`` of Qwen's finetuning code: an integer range times a float). vLLM
follows the same rule in float64, and starts from seconds rounded to float32. Where the exact product is
an integer, that falls below it more often: at round rates a third of all clips differ by one step
in some grid, and float32 is the nearer one.
"""


from collections.abc import Iterable
from itertools import chain, repeat
from typing import Any

import torch
from torch import Tensor

TEXT, IMAGE, VIDEO = 0, 1, 2


class TrainedPositions:
    """Mixed into the stock ``Qwen2_5_VLModel`` or ``Qwen2VLModel``, whose forward and generate follow it then."""

    config: Any

    def get_rope_index(
        self,
        input_ids: Tensor,
        mm_token_type_ids: Tensor | None = None,
        image_grid_thw: Tensor | None = None,
        video_grid_thw: Tensor | None = None,
        second_per_grid_ts: Tensor | Iterable[float] | None = None,
        attention_mask: Tensor | None = None,
        **_: Any,
    ) -> tuple[Tensor, Tensor]:
        """Positions of a batch that may be padded on either side.

        Args:
            input_ids: (B, T).
            mm_token_type_ids: (B, T), 0 text, 1 image, 2 video; None: all text.
            image_grid_thw, video_grid_thw: (n, 3) time, height, width in patches, in order over the whole batch.
            second_per_grid_ts: seconds between the temporal grids of each video; None: 1.0 each.
            attention_mask: (B, T), 0 where padded; None means no padding.

        Returns:
            positions (3, B, T), 0 where padded, and deltas (B, 1): next position minus the row's unpadded length.

        Raises:
            ValueError: the grids do not account for the image and video tokens.
        """
        types = torch.zeros_like(input_ids) if mm_token_type_ids is None else mm_token_type_ids
        types = types.cpu()  # one transfer: what follows are a few small tensors a row
        keep = types >= 0 if attention_mask is None else attention_mask.cpu() != 0
        seconds: Any = chain([] if second_per_grid_ts is None else second_per_grid_ts, repeat(1.0))
        blocks = {
            IMAGE: (self._block(grid, 0.0) for grid in _rows(image_grid_thw)),
            VIDEO: map(self._block, _rows(video_grid_thw), seconds),
        }
        positions = torch.zeros(3, *types.shape, dtype=torch.long)
        deltas = torch.zeros(len(types), 1, dtype=torch.long)
        for row, kept in enumerate(keep):
            kinds, lengths = torch.unique_consecutive(types[row][kept], return_counts=True)
            placed, start = [torch.zeros(3, 0, dtype=torch.long)], 0
            for kind, length in zip(kinds.tolist(), lengths.tolist(), strict=True):
                while length > 0:  # a run may hold several videos that no text separates
                    text = torch.arange(length).expand(3, -1)
                    block = text if kind == TEXT else next(blocks[kind], None)
                    if block is None:
                        break
                    placed.append(block + start)
                    start = int(placed[-1].max()) + 1
                    length -= block.shape[1]
                if length != 0:
                    name = "image" if kind == IMAGE else "video"
                    raise ValueError(
                        f"{name} tokens and {name}_grid_thw disagree by {length} tokens: rebuild the inputs"
                    )
            positions[:, row, kept] = torch.cat(placed, 1)
            deltas[row] = start - int(kept.sum())
        return positions.to(input_ids.device), deltas.to(input_ids.device)

    def _block(self, grid: list[int], seconds: float) -> Tensor:
        """Positions (3, n) of an image or a video, counted from 0."""
        vision = self.config.vision_config
        # in float32, see above
        rate = getattr(vision, "tokens_per_second", 1)
        time = torch.arange(grid[0]) * torch.tensor(float(seconds)) * rate
        sides = (torch.arange(side // vision.spatial_merge_size) for side in grid[1:])
        return torch.stack(torch.meshgrid(time.long(), *sides, indexing="ij")).flatten(1)


def _rows(grids: Tensor | None) -> list[list[int]]:
    return [] if grids is None else grids.tolist()


"""The latent rollout inside transformers' own ``generate`` (paper, section 3.1); no loop of ours.

``generate`` sees a model's hidden state before it chooses the next token. So the last state is always kept, and where
the chosen token turned out to be ``<|latent_pad|>`` that state, not the token's embedding, is fed next (unless the
checkpoint was trained with pause slots, `latent_pause` in its config). A logits processor decides on the tokens of
the segment: after ``<|latent_start|>`` every choice but ``<|latent_end|>`` means "one more slot", and after K slots
the end is forced.

Extra arguments of ``generate``, also valid as attributes of a generation config:
    latent_mode: ``auto`` (default; the model may open a segment, a prompt ending in ``<|latent_start|>`` has opened
        one; ``off`` for a model that has no latent tokens), ``force`` (every prompt must end so) or ``off``.
    latent_budget: K, by default the checkpoint's; 0 is ``off``.
    output_latent_states: with ``return_dict_in_generate``, adds ``latent_states`` (B, K, D), the model's own state
        per slot, zero where unused, ``latent_counts`` (B,) slots used, and ``forced_end`` (B,) bool: the budget, not
        the model, ended the segment. Not with beams.
    latent_override: (B, K, D) embeddings to feed into the slots instead (an intervention), the same for all sequences
        of a prompt; an argument only.

A checkpoint trained with a bottleneck (`latent_bottleneck` in its config: the id of its video tokens) does not attend
to the video once the segment is closed.

A response has at most one segment. Without one, the computation is the stock model's.
"""


from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.generation.configuration_utils import GenerationMode
from transformers.utils import output_capturing


LATENT_MODES = ("auto", "force", "off")
_MODES = (
    GenerationMode.GREEDY_SEARCH,
    GenerationMode.SAMPLE,
    GenerationMode.BEAM_SEARCH,
    GenerationMode.BEAM_SAMPLE,
)
# Behind the mixin stands a stock class, whose methods a type checker cannot see.
_Stock: Any = object
OPTIONS = ("latent_mode", "latent_budget", "output_latent_states")
# 5.17 can only keep the states of all layers, later versions just the last one
_LAST_STATE = [-1] if hasattr(output_capturing, "selected_hidden_states") else True


def keep_latent_tokens(generation_config: Any, config: Any) -> None:
    """No latent token ends the turn; that is for stock models alone (`storm_vlm.model.custom_generate`)."""
    ends = generation_config.eos_token_id
    if isinstance(ends, list) and has_latent_tokens(config):
        latent = latent_tokens(config)
        generation_config.eos_token_id = [token for token in ends if token not in latent]


@dataclass
class _LatentRun:
    """One call of generate. Travels in model_kwargs, so that overlapping calls cannot mix."""

    tokens: LatentTokens
    embedding: Any  # the model's, of its ids
    budget: int
    forced: bool
    override: Tensor | None
    record: bool
    pause: bool = False  # slots hold the pad's own embedding
    bottleneck: int | None = None  # the token that is not attended to once the segment is closed
    grows: bool = True  # the cache does; a static one is for compiled forwards
    prompt_length: float = float("inf")
    is_over: bool = False  # no row can have an open segment any more
    hidden: Tensor | None = None  # (B, 1, D) at the last position; None until the prompt is read
    states: list[Tensor] = field(default_factory=list)  # (B, 1, D), one of each forward
    choices: list[Tensor] = field(default_factory=list)  # (B,), the model's own, of each forward

    def check_prompt(self, ids: Tensor) -> None:
        self.prompt_length = ids.shape[1]
        is_open, used = latent_segment(ids, self.tokens, self.budget)
        if self.forced and not bool((is_open & (used == 0)).all()):
            raise LatentError(
                "latent_mode='force' needs prompts that end in <|latent_start|>: "
                "append it, or use latent_mode='auto'"
            )

    def embed(self, ids: Tensor) -> Tensor:
        """Embeddings (B, 1, D) of the last ids (B, T), or states where these are latent pads."""
        last, fed = ids[:, -1:], self.hidden
        embeds = self.embedding(last)
        if self.override is not None:
            rows = torch.arange(len(ids), device=ids.device)
            repeats = len(ids) // len(self.override)  # beams or sampled sequences per prompt
            _, used = latent_segment(ids, self.tokens, self.budget)
            fed = self.override.to(embeds)[rows // repeats, (used - 1).clamp_min(0)][:, None]
        elif self.pause:
            return embeds
        assert fed is not None
        return torch.where(last[..., None] == self.tokens.pad, fed.to(embeds), embeds)

    def narrow(self, mask: Any, ids: Tensor, by_ids: bool) -> Any:
        """An attention mask (B, T) without the video, where the segment of the ids (B, T) is closed.

        No mask: all is attended to, as transformers drops a mask of ones. `by_ids`: the prompt was of ids alone.
        """
        if self.bottleneck is None:
            return mask
        mask = torch.ones_like(ids) if mask is None else mask
        if not (self.grows and by_ids) or mask.shape != ids.shape:
            raise LatentError(
                "this checkpoint has a bottleneck, which needs a prompt of ids and a cache that grows: leave out "
                "inputs_embeds and cache_implementation"
            )
        closed = (ids == self.tokens.end).any(1)
        return mask.masked_fill((ids == self.bottleneck) & closed[:, None], 0)

    def read_outputs(self, outputs: Any) -> None:
        # clone: with CUDA graphs the next replay overwrites its outputs
        self.hidden = hidden = outputs.hidden_states[-1][:, -1:].clone()
        if self.record:
            self.states.append(hidden)
            self.choices.append(outputs.logits[:, -1].argmax(-1))

    def report(self, output: Any, new_ids: Tensor) -> None:
        """Add latent_states, latent_counts and forced_end to a generate output. `new_ids`: (B, T), behind the prompt.

        Forward t, the prompt's being the first, chose new token t: the state of a slot is that of its own forward.
        """
        pads, ends = new_ids == self.tokens.pad, new_ids == self.tokens.end
        output["latent_counts"] = counts = pads.sum(1)
        if not self.states:  # off: nothing was recorded
            output["latent_states"] = counts.new_zeros(len(counts), 0, 0, dtype=torch.float32)
            output["forced_end"] = ends.any(1)
            return
        states = torch.cat(self.states, 1)
        wants_end = torch.stack(self.choices, 1) == self.tokens.end
        slots = torch.arange(self.budget, device=counts.device)
        at = (pads.long().argmax(1)[:, None] + slots).clamp_max(states.shape[1] - 1)
        states = states.gather(1, at[..., None].expand(-1, -1, states.shape[-1]))
        output["latent_states"] = states * (slots < counts[:, None])[..., None]
        at = ends.long().argmax(1, keepdim=True).clamp_max(wants_end.shape[1] - 1)
        wanted = wants_end.gather(1, at)[:, 0]
        output["forced_end"] = ends.any(1) & (counts == self.budget) & ~wanted


class LatentRolloutMixin(_Stock):
    """Put in front of a stock ``*ForConditionalGeneration`` class (see `storm_vlm.model.modeling`).

    ``forward`` is left alone on purpose: ``generate`` reads its signature.
    """

    def _latent_budget(self, generation_config: Any) -> int:
        """The K in force under this generation config; 0 is off."""
        mode = getattr(generation_config, "latent_mode", None) or "auto"
        if mode not in LATENT_MODES:
            raise LatentError(f"latent_mode must be one of {LATENT_MODES}, got {mode!r}")
        if mode == "off" or (mode == "auto" and not has_latent_tokens(self.config)):
            return 0
        latent_tokens(self.config)  # raises if this model has never met its latent tokens
        budget = getattr(generation_config, "latent_budget", None)
        budget = self.config.latent_budget if budget is None else budget
        if budget < 0:
            raise LatentError(f"latent_budget must be 0 or more, got {budget}")
        return budget

    def _prepare_generation_config(
        self, generation_config: Any, **kwargs: Any
    ) -> tuple[Any, dict[str, Any]]:
        options = {name: kwargs.pop(name) for name in OPTIONS if name in kwargs}
        override = kwargs.pop("latent_override", None)
        config, model_kwargs = super()._prepare_generation_config(generation_config, **kwargs)
        keep_latent_tokens(config, self.config)
        for name, value in options.items():
            setattr(config, name, value)
        config.latent_budget = self._latent_budget(config)
        if override is not None and override.shape[1] < config.latent_budget:
            raise LatentError(f"latent_override must have {config.latent_budget} slots")
        if has_latent_tokens(self.config):
            model_kwargs["latent_run"] = _LatentRun(
                latent_tokens(self.config),
                self.get_input_embeddings(),
                config.latent_budget,
                forced=getattr(config, "latent_mode", None) == "force",
                override=override,
                record=bool(getattr(config, "output_latent_states", False)),
                pause=bool(getattr(self.config, "latent_pause", False)),
                bottleneck=getattr(self.config, "latent_bottleneck", None),
            )
        return config, model_kwargs

    def _validate_generation_mode(
        self, generation_mode: Any, generation_config: Any, kwargs: Any
    ) -> None:
        super()._validate_generation_mode(generation_mode, generation_config, kwargs)
        record = getattr(generation_config, "output_latent_states", False)
        if record and generation_config.num_beams > 1:
            raise LatentError("output_latent_states cannot follow beams: use num_beams=1")
        if not generation_config.latent_budget:
            return
        if generation_mode not in _MODES:
            raise LatentError(
                f"latent rollout feeds one state at a time and cannot do {generation_mode.value}: "
                "drop the assistant or prompt lookup, or use latent_mode='off'"
            )
        if generation_config.use_cache is False:
            raise LatentError("latent rollout needs use_cache=True (or latent_mode='off')")
        layers = (getattr(module, "gradient_checkpointing", False) for module in self.modules())
        if self.training and any(layers):
            raise LatentError(
                "gradient checkpointing in train mode drops the cache: call model.eval() first"
            )

    def init_continuous_batching(self, *_: Any, **__: Any) -> Any:
        """Always refused: it feeds ids only, neither states nor videos."""
        raise NotImplementedError("continuous batching cannot feed latent states: use generate()")

    def _get_logits_processor(self, generation_config: Any, *args: Any, **kwargs: Any) -> Any:
        processors = super()._get_logits_processor(generation_config, *args, **kwargs)
        if has_latent_tokens(self.config):
            rule = LatentBudgetProcessor(
                latent_tokens(self.config),
                generation_config.latent_budget,
                sampling=bool(generation_config.do_sample),
                prompt_length=kwargs.get("input_ids_seq_length") or 0,
                forced=getattr(generation_config, "latent_mode", None) == "force",
            )
            processors = LatentProcessors(processors, rule)
        return processors

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        *args: Any,
        inputs_embeds: Tensor | None = None,
        is_first_iteration: bool | None = False,
        latent_run: _LatentRun | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        inputs = super().prepare_inputs_for_generation(
            input_ids,
            *args,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )
        active = latent_run if latent_run is not None and latent_run.budget else None
        cache = inputs.get("cache", inputs.get("past_key_values"))  # its name before 5.24
        if is_first_iteration and cache is not None:
            # beam search hands nothing but the cache to _reorder_cache; caches may be reused
            cache.latent_run = active
        if active is None:
            return inputs
        ids = inputs["input_ids"]
        if is_first_iteration:
            active.grows = not getattr(cache, "is_compileable", False)
        inputs["attention_mask"] = active.narrow(
            inputs.get("attention_mask"), input_ids, inputs_embeds is None
        )
        if active.forced and active.grows:
            # behind K slots and the end all is as in the stock model
            active.is_over = input_ids.shape[1] > active.prompt_length + active.budget
        if active.is_over:
            return inputs
        inputs["output_hidden_states"] = inputs.get("output_hidden_states") or _LAST_STATE
        if active.hidden is not None and ids.shape[1] == 1:  # behind the prompt, or its last chunk
            # always embeddings, so that a compiled forward sees one kind of input
            inputs["input_ids"], inputs["inputs_embeds"] = None, active.embed(input_ids)
        return inputs

    def _update_model_kwargs_for_generation(
        self, outputs: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        latent_run = model_kwargs.get("latent_run")
        if latent_run is not None and latent_run.budget and not latent_run.is_over:
            latent_run.read_outputs(outputs)
        return super()._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **kwargs)

    def _prefill(
        self, input_ids: Tensor, generation_config: Any, model_kwargs: Any, *args: Any, **kw: Any
    ) -> Any:
        latent_run = model_kwargs.get("latent_run")
        if latent_run is not None and latent_run.budget:
            latent_run.check_prompt(input_ids)
        return super()._prefill(input_ids, generation_config, model_kwargs, *args, **kw)

    def _reorder_cache(self, cache: Any, beam_idx: Tensor) -> Any:
        cache.reorder_cache(beam_idx)
        run = getattr(cache, "latent_run", None)
        if run is not None:
            run.hidden = run.hidden.index_select(0, beam_idx.to(run.hidden.device))
        return cache

    def _sample(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        output = super()._sample(input_ids, *args, **kwargs)
        latent_run = kwargs.get("latent_run")
        if latent_run is not None and latent_run.record and not isinstance(output, Tensor):
            latent_run.report(output, output.sequences[:, input_ids.shape[1] :])
        return output


POSITION_RULES = (TrainedPositions, )


def generate(model: Any, *args: Any, **kwargs: Any) -> Any:
    """``model.generate``, of a stock model that becomes one with latent slots on its first call."""
    if "latent_run" not in inspect.signature(model.prepare_inputs_for_generation).parameters:
        for module, mixins in ((model, (LatentRolloutMixin,)), (model.base_model, POSITION_RULES)):
            stock = type(module)
            body = {"__module__": stock.__module__}
            module.__class__ = type(stock.__name__, (*mixins, stock), body)
    return type(model).generate(model, *args, **kwargs)

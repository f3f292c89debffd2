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

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.generation.configuration_utils import GenerationMode
from transformers.utils import output_capturing

from storm_vlm.model.segment import LatentBudgetProcessor, LatentProcessors, latent_segment
from storm_vlm.model.tokens import LatentError, LatentTokens, has_latent_tokens, latent_tokens

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

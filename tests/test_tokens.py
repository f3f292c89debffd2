import pytest
import torch
from tiny import tiny_processor
from tiny_model import tiny_model, tiny_stock_model

from storm_vlm.model.tokens import LATENT_TOKENS, add_latent_tokens, latent_tokens


def fresh_model(**changes):
    model = tiny_stock_model(**changes)
    for name in ("start", "pad", "end"):
        delattr(model.config, f"latent_{name}_token_id")
    return model


def tables(model):
    return model.get_input_embeddings().weight, model.get_output_embeddings().weight


def test_spare_rows_are_used_and_nothing_else_changes() -> None:
    model, processor = fresh_model(), tiny_processor(with_latent_tokens=False)
    before = [table.clone() for table in tables(model)]
    trained = len(processor.tokenizer)
    ids = add_latent_tokens(model, processor, budget=6)
    assert ids == tuple(processor.tokenizer.convert_tokens_to_ids(list(LATENT_TOKENS)))
    assert ids == latent_tokens(model.config) and model.config.latent_budget == 6
    for old, new in zip(before, tables(model), strict=True):
        assert old.shape == new.shape
        others = [i for i in range(len(old)) if i not in ids]
        assert torch.equal(old[others], new[others])
        rows, mean = new[list(ids)], old[:trained].mean(0)
        assert (rows - mean).norm(dim=1).max() < 0.5 * old[:trained].norm(dim=1).mean()
        assert len({tuple(row.tolist()) for row in rows}) == 3
    tokenizer = processor.tokenizer
    text = "a<|latent_start|><|latent_pad|><|latent_end|>b"
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == "ab"


def test_calling_it_again_changes_only_the_budget() -> None:
    model, processor = fresh_model(), tiny_processor(with_latent_tokens=False)
    ids = add_latent_tokens(model, processor, budget=6)
    before = [table.clone() for table in tables(model)]
    state = torch.get_rng_state()
    assert add_latent_tokens(model, processor, budget=3, seed=1) == ids
    assert model.config.latent_budget == 3 and torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(before, tables(model), strict=True))


def test_the_seed_alone_decides() -> None:
    rows = []
    for seed, noise in [(0, 1), (0, 2), (7, 1)]:
        model = fresh_model()
        torch.manual_seed(noise)
        ids = add_latent_tokens(model, tiny_processor(with_latent_tokens=False), seed=seed)
        rows.append(model.get_input_embeddings().weight[list(ids)])
    assert torch.equal(rows[0], rows[1]) and not torch.equal(rows[0], rows[2])


@pytest.mark.parametrize("tied", [False, True])
def test_the_table_grows_only_when_it_must(tied: bool) -> None:
    processor = tiny_processor(with_latent_tokens=False)
    size = len(processor.tokenizer)
    model = fresh_model(vocab_size=size, tie_word_embeddings=tied)
    old = model.get_input_embeddings().weight.clone()
    ids = add_latent_tokens(model, processor)
    new, head = tables(model)
    assert new.shape[0] == size + 3 == head.shape[0] and (new is head) == tied
    assert torch.equal(new[:size], old) and max(ids) == size + 2
    assert head[list(ids)].isfinite().all() and head[list(ids)].abs().sum() > 0


def test_mistakes_are_named() -> None:
    processor = tiny_processor(with_latent_tokens=False)
    with pytest.raises(ValueError, match="budget"):
        add_latent_tokens(fresh_model(), processor, budget=-1)
    with pytest.raises(ValueError, match="add_latent_tokens"):
        latent_tokens(fresh_model().config)
    model = tiny_model()
    model.config.latent_pad_token_id = 12
    with pytest.raises(ValueError, match="matching pair"):
        add_latent_tokens(model, tiny_processor())

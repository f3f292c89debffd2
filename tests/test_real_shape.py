"""The published vocabulary, chat template and configurations; weights are random.

`pytest -m slow tests/test_real_shape.py` runs the full width, a few layers deep: some minutes and 7 GiB of memory.
"""

from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from published import published_processor
from real_step import measure
from tiny_model import tiny_config
from transformers import Qwen2_5_VLForConditionalGeneration

from storm_vlm.data.collator import Question, StormCollator
from storm_vlm.data.row import Row
from storm_vlm.data.video import Clip, video_metadata
from storm_vlm.lab.bench.training_step import Shape, random_batch, random_model, shape_config
from storm_vlm.model.adapters import token_rows
from storm_vlm.model.latent import alignment_loss, answer_loss, storm_loss
from storm_vlm.model.modeling import enable_latents
from storm_vlm.model.rollout import rollout
from storm_vlm.model.tokens import add_latent_tokens
from storm_vlm.training.plan_request import PlanRequest
from storm_vlm.training.planning import plan_config
from storm_vlm.training.train import lora_targets
from storm_vlm.training.trainer import boundary_loss

BUDGET, FRAMES = 8, 4
ROWS = {"3b": 151936, "7b": 152064}  # of the published embedding tables
# What the published tokenizer makes of the system turn, of the user's and of the assistant's beginning.
SYSTEM = [151644, 8948, 198, 2610, 525, 264, 10950, 17847, 13, 151645, 198]
USER, ASSISTANT = [151644, 872, 198], [151645, 198, 151644, 77091, 198]
START, PAD, END = 151665, 151666, 151667


@pytest.fixture(scope="module")
def processor() -> Any:
    return published_processor(max_pixels=16 * 28 * 28)


def clip(seed: int = 0) -> Clip:
    frames = np.random.default_rng(seed).integers(0, 256, (FRAMES, 72, 128, 3), np.uint8)
    return Clip(frames, np.arange(FRAMES) / 2, "clip")


def narrow(shape: Shape) -> Any:
    """A stock model with the published vocabulary, rows and special tokens, and hardly any width."""
    config = tiny_config(
        vocab_size=ROWS[shape], tie_word_embeddings=shape == "3b", eos_token_id=151645
    )
    for name in [name for name in vars(config) if name.startswith("latent_")]:
        delattr(config, name)
    config.vision_start_token_id, config.vision_end_token_id = 151652, 151653
    config.image_token_id, config.video_token_id = 151655, 151656
    torch.manual_seed(0)
    model: Any = Qwen2_5_VLForConditionalGeneration(config).eval()
    model.generation_config.eos_token_id = [151645, 151643]
    return model


def test_prompts_token_by_token(processor: Any) -> None:
    tokenizer = processor.tokenizer
    assert len(tokenizer) == 151665
    named = {
        "<|endoftext|>": 151643,
        "<|video_pad|>": 151656,
        "<tool_call>": 151657,
        "<|file_sep|>": 151664,
    }
    assert {name: tokenizer.convert_tokens_to_ids(name) for name in named} == named
    collator = StormCollator(processor, FRAMES, BUDGET)
    batch = collator.collate_prompts([Question(clip(), "What happens next?")], "auto")
    visual = int(batch["video_grid_thw"].prod()) // 4
    expected = [
        *SYSTEM,
        *USER,
        151652,
        *[151656] * visual,
        151653,
        3838,
        8573,
        1790,
        30,
        *ASSISTANT,
    ]
    assert batch["input_ids"][0].tolist() == expected
    content = [
        {"type": "video", "video": list(clip().frames)},
        {"type": "text", "text": "What happens next?"},
    ]
    stock = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=True,
        processor_kwargs={"do_sample_frames": False, "video_metadata": [video_metadata(clip())]},
    )
    for name in ("input_ids", "pixel_values_videos", "video_grid_thw", "mm_token_type_ids"):
        assert torch.equal(batch[name], torch.as_tensor(stock[name])), name


@pytest.mark.parametrize("shape", ROWS)
def test_latent_tokens_take_spare_rows(processor: Any, shape: Shape) -> None:
    """Stage I, Stage II and generate, with adapters and without."""
    model, processor = narrow(shape), published_processor(16 * 28 * 28)
    tables = [model.get_input_embeddings().weight, model.get_output_embeddings().weight]
    assert (tables[0] is tables[1]) == (shape == "3b")
    before = [table.detach().clone() for table in tables]
    assert add_latent_tokens(model, processor, BUDGET) == (START, PAD, END)
    for table, old in zip(
        (model.get_input_embeddings(), model.get_output_embeddings()), before, strict=True
    ):
        changed = (table.weight != old).any(1).nonzero().flatten().tolist()
        assert len(table.weight) == ROWS[shape] and changed == [START, PAD, END]
    enable_latents(model)
    options = ("It falls off the table", "It stays")
    rows = [
        Row(
            id=str(n),
            video="clip",
            question="What next?",
            options=options,
            answer=options[n],
            split="train",
        )
        for n in range(2)
    ]
    collator = StormCollator(processor, FRAMES, BUDGET)
    asked = [Question(clip(n), row.question, row.options) for n, row in enumerate(rows)]
    batch = collator.collate_prompts(asked, "force") | {"labels": collator._labels(rows)}
    assert batch["input_ids"][:, -1].tolist() == [START] * 2
    assert batch["labels"].tolist() == [[32, 151645], [33, 151645]]  # "A", "B"
    for trained in (model, None):
        if trained is None:
            settings = LoraConfig(
                r=2, target_modules=lora_targets(model), trainable_token_indices=token_rows(model)
            )
            trained = get_peft_model(model, settings)
        targets = torch.randn(2, BUDGET, 64)
        for slots in (targets, None):
            output = rollout(trained, batch, BUDGET, slots)
            loss = answer_loss(output.logits, batch["labels"]) + alignment_loss(
                output.states, targets
            )
            loss.backward()
        gradients = [p.grad for p in trained.parameters() if p.requires_grad and p.grad is not None]
        assert gradients and all(bool(g.isfinite().all()) for g in gradients)
        trained.zero_grad()
        del batch["labels"]
        ids = trained.generate(
            **batch, latent_mode="force", max_new_tokens=BUDGET + 3, do_sample=False
        )
        batch["labels"] = collator._labels(rows)
        written = ids[:, batch["input_ids"].shape[1] :]
        slots_used = (written == PAD).sum(1)
        assert bool(((written == END).sum(1) == 1).all()) and bool((slots_used <= BUDGET).all())
        assert "latent" not in "".join(processor.batch_decode(written, skip_special_tokens=True))


def loss_of(net: Any, batch: dict[str, torch.Tensor], kind: str) -> torch.Tensor:
    """What the trainer's step minimizes."""
    if kind == "SFT":
        return answer_loss(rollout(net, batch, 0).logits, batch["labels"])
    targets = torch.randn(1, BUDGET, net.config.get_text_config().hidden_size)
    output = rollout(net, batch, BUDGET, targets if kind == "Stage I" else None)
    answer = answer_loss(output.logits, batch["labels"]) + boundary_loss(net, output)
    return storm_loss(answer, alignment_loss(output.states, targets), 0.1 * (kind == "Stage I"))


def planned(config: Any, processor: Any, request: PlanRequest, kind: str) -> Any:
    return plan_config(config, processor.video_processor, request).steps[kind]


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "rank"), [("3b", 0), ("7b", 8)])
def test_a_step_at_full_width_takes_what_the_plan_says(shape: Shape, rank: int) -> None:
    """Two layers of the published width, with the whole vocabulary; all weights of 3B train, adapters of 7B."""
    config = shape_config(shape)
    config.text_config.num_hidden_layers, config.vision_config.depth = 2, 2
    config.text_config.layer_types = config.text_config.layer_types[:2]
    config.vision_config.fullatt_block_indexes = [1]
    model = random_model(config, BUDGET, "cpu", torch.bfloat16)
    net = model
    if rank:
        net = get_peft_model(model, LoraConfig(r=rank, target_modules=lora_targets(model))).train()
    batch = random_batch(config, 1, 400, "cpu")
    batch["pixel_values_videos"] = batch["pixel_values_videos"].to(torch.bfloat16)
    text = ("input_ids", "attention_mask", "mm_token_type_ids")
    without = {name: t[:, :-1] if name in text else t for name, t in batch.items()}
    trainable = [parameter for parameter in net.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, foreach=False)
    length = batch["input_ids"].shape[1] - 1
    request = PlanRequest(
        num_frames=2 * int(batch["video_grid_thw"][0, 0]),
        max_pixels=256 * 28 * 28,
        question_tokens=length - int((batch["mm_token_type_ids"] == 2).sum()),
        answer_tokens=batch["labels"].shape[1],
        latent_budget=BUDGET,
        lora_rank=rank,
    )
    for kind in ("SFT", "Stage I", "Stage II"):
        with torch.autocast("cpu", torch.bfloat16):
            inputs = without if kind == "SFT" else batch
            _, size = measure(net, lambda inputs=inputs, kind=kind: loss_of(net, inputs, kind))
        gradients = sum(p.grad.nbytes for p in trainable if p.grad is not None)
        optimizer.step()
        optimizer.zero_grad()
        states = sum(v.nbytes for s in optimizer.state.values() for v in s.values() if v.ndim)
        step = planned(config, published_processor(), request, kind)
        measured = {
            "weights": sum(p.nbytes for p in net.parameters()),
            "gradients": gradients,
            "optimizer": states,
            "kept": size,
        }
        plan = {name: getattr(step, name) for name in ("weights", "gradients", "optimizer")}
        plan["kept"] = step.activations + step.logits + step.kv_cache
        print(shape, kind, {name: (measured[name] / 2**20, plan[name] / 2**20) for name in plan})  # noqa: T201
        for name in plan:
            assert measured[name] == pytest.approx(plan[name], rel=0.15), name
    ids = net.generate(
        **{k: v for k, v in batch.items() if k != "labels"}, latent_mode="force", max_new_tokens=12
    )
    assert ids.shape[1] > length

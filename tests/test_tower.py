"""What the frozen tower makes of clips, kept on disk: the same losses and gradients, and nothing computed twice."""

import inspect
import json
from pathlib import Path

import pytest
import torch
from tiny import tiny_run

from storm_vlm.data.collator import StormCollator, VideoInputs
from storm_vlm.data.decode import VideoError
from storm_vlm.data.row import Row
from storm_vlm.model.backbones import BACKBONES, QwenVL
from storm_vlm.model.modeling import StormForConditionalGeneration
from storm_vlm.model.rollout import rollout
from storm_vlm.model.tokens import add_latent_tokens
from storm_vlm.training.config import ConfigError, Method, TrainConfig
from storm_vlm.training.feature_cache import CachedVideoInputs, Excerpt, FeatureCache
from storm_vlm.training.train import train

K = 3


@pytest.fixture
def model(backbone: str, processor):
    model = StormForConditionalGeneration.from_pretrained(backbone)
    add_latent_tokens(model, processor, K)
    model.model.visual.requires_grad_(False)
    return model.train()


@pytest.fixture
def kept(model, processor, reasoning_rows: list[Row], tmp_path: Path) -> CachedVideoInputs:
    return CachedVideoInputs(model, processor, reasoning_rows[:3], 6, 0, tmp_path / "features")


@pytest.mark.parametrize(("slots", "fed"), [(0, ""), (K, "states"), (K, "targets")])
def test_features_in_place_of_pixels_change_neither_answers_nor_gradients(
    model, processor, kept, reasoning_rows, slots: int, fed: str
) -> None:
    """Rows of different lengths, so that prompts are padded."""
    collator = StormCollator(processor, 6, slots)
    slot_inputs = torch.randn(3, K, 128) if fed == "targets" else None

    def run() -> tuple[torch.Tensor, list[torch.Tensor]]:
        model.zero_grad()
        output = rollout(model, collator(reasoning_rows[:3]), slots, slot_inputs)
        output.logits.square().mean().backward()
        return output.logits, [p.grad for p in model.parameters() if p.grad is not None]

    logits, gradients = run()
    collator = StormCollator(processor, 6, slots, kept)
    batch = collator(reasoning_rows[:3])
    assert "pixel_values_videos" not in batch and batch["video_features"].shape[1] == 128
    assert not bool(batch["attention_mask"].all())
    model.model.visual.forward = None  # nobody asks the tower
    again, regained = run()
    torch.testing.assert_close(again, logits)
    assert len(regained) == len(gradients) > 30
    for one, other in zip(regained, gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_a_batch_without_all_its_features_is_refused(
    model, processor, kept, reasoning_rows
) -> None:
    collator = StormCollator(processor, 6, K, kept)
    batch = collator(reasoning_rows[:2])
    batch["video_features"] = batch["video_features"][1:]
    with pytest.raises(ValueError, match=r"\d+ video_features for \d+ video tokens"):
        rollout(model, batch, K)


def test_a_second_run_asks_the_tower_for_new_clips_only(
    model, processor, reasoning_rows, tmp_path
) -> None:
    asked: list[int] = []
    model.model.visual.register_forward_hook(lambda *_: asked.append(1))
    folder = tmp_path / "features"

    def run(rows: list[Row], num_frames: int = 6) -> CachedVideoInputs:
        asked.clear()
        return CachedVideoInputs(model, processor, rows, num_frames, 0, folder)

    rows = reasoning_rows[:3]
    assert run([*rows, rows[0]]) and len(asked) == 3  # a clip that two rows ask about, once
    again = run(rows)
    assert not asked
    run(reasoning_rows[:4])
    assert len(asked) == 1
    run([rows[0].model_copy(update={"end": 0.5})])  # another window is another excerpt
    assert len(asked) == 1
    run(rows, num_frames=4)
    assert len(asked) == 3
    cache = again.cache
    file = cache.store.path("features", cache.key(Excerpt(rows[0].video)), ".safetensors")
    whole = file.read_bytes()
    for damage in (whole[:-40], b"", b"\xff" * 400):  # made again
        file.write_bytes(damage)
        run(rows)
        assert len(asked) == 1 and file.read_bytes() == whole
    file.unlink()
    with pytest.raises(VideoError, match=r"no longer in .*start again"):
        again.get(rows[0].video)


def test_what_another_process_has_made_meanwhile_is_not_made_again(
    model, processor, reasoning_rows, tmp_path
) -> None:
    excerpts = [Excerpt(row.video) for row in reasoning_rows[:3]]
    ours, theirs = (FeatureCache(tmp_path, "features", model, processor, 6) for _ in range(2))
    computed = []

    def compute(excerpt: Excerpt) -> dict[str, torch.Tensor]:
        if not computed:
            computed.append(excerpt)
            theirs.fill([e for e in excerpts if e != excerpt], lambda _: {"it": torch.ones(1)})
            return {"it": torch.ones(1)}
        raise AssertionError("made again")

    ours.fill(excerpts, compute)
    for excerpt in excerpts:
        tensors = ours.read(excerpt)
        assert tensors is not None and torch.equal(tensors["it"], torch.ones(1))


def test_features_belong_to_all_that_decides_them(
    model, processor, reasoning_rows, tmp_path: Path
) -> None:
    excerpt = Excerpt(reasoning_rows[0].video)

    def key(
        excerpt: Excerpt = excerpt, num_frames: int = 6, kind="features", **rule: object
    ) -> str:
        return FeatureCache(tmp_path, kind, model, processor, num_frames, **rule).key(excerpt)

    keys = [key(), key(num_frames=4), key(slots=3), key(slots=4)]
    windows = (
        {"end": 1.0},
        {"start": 1.0},
        {"after": 1.0},
        {"times": (1.0,)},
        {"times": (1.0, 2.0)},
    )
    keys += [key(Excerpt(excerpt.path, **window)) for window in windows]  # type: ignore[arg-type]
    keys += [key(Excerpt(reasoning_rows[1].video))]
    video, before = processor.video_processor, dict(processor.video_processor.size)
    video.size = {**before, "longest_edge": before["longest_edge"] // 2}
    keys.append(key())
    video.size = before
    (tmp_path / "moved.mp4").write_bytes(Path(excerpt.path).read_bytes())
    assert key(Excerpt(str(tmp_path / "moved.mp4"))) == key() == keys[0]  # a name decides nothing
    with torch.no_grad():  # weights whose bytes do not tell their type
        for weight in model.model.visual.parameters():
            weight.zero_()
    keys += [key() for dtype in (torch.float16, torch.bfloat16) if model.to(dtype)]
    assert len(set(keys)) == len(keys)


class Doubled(QwenVL):
    def encode(self, batch):
        return 2 * super().encode(batch)


def test_features_and_targets_belong_to_the_adapter_and_its_code(
    model, processor, reasoning_rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    excerpt = Excerpt(reasoning_rows[0].video)

    def key() -> str:
        return FeatureCache(tmp_path, "targets", model, processor, 6).key(excerpt)

    keys = [key()]
    monkeypatch.setitem(BACKBONES._parts, "qwen2_5_vl", Doubled)
    keys.append(key())
    assert key() == keys[-1]
    monkeypatch.setattr(inspect, "getsource", lambda part: f"{part.__name__}, edited")
    keys.append(key())
    assert len(set(keys)) == 3


def losses(folder: Path, backbone: str, rows: Path, **settings: object) -> list[float]:
    method = Method(latent_budget=K, slot_input="scheduled")
    run = tiny_run(folder, backbone, rows, method, 4).model_copy(update=settings)
    history = json.loads((train(run) / "log_history.json").read_text())
    return [entry["loss"] for entry in history if "loss" in entry]


def test_a_run_with_kept_features_has_the_losses_of_one_without(
    tmp_path: Path, backbone: str, reasoning_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = losses(tmp_path / "plain", backbone, reasoning_file)
    folder = tmp_path / "features"
    kept = losses(tmp_path / "kept", backbone, reasoning_file, vision_cache=str(folder))
    assert len(kept) == 4 and kept == pytest.approx(plain, rel=1e-4)
    first = {file: file.stat().st_mtime_ns for file in folder.glob("features/*/*")}

    def never(*_: object) -> None:
        raise AssertionError("a video was read again")

    monkeypatch.setattr(VideoInputs, "load", never)
    monkeypatch.setattr(Excerpt, "read", never)
    again = losses(tmp_path / "again", backbone, reasoning_file, vision_cache=str(folder))
    assert again == kept and len(first) >= 12
    assert first == {file: file.stat().st_mtime_ns for file in folder.glob("features/*/*")}


def test_a_tower_that_trains_cannot_be_kept() -> None:
    with pytest.raises(ValueError, match="a tower that trains"):
        TrainConfig(model="m", data="d", output_dir="o", vision_cache="here", freeze_vision=False)


def test_nor_one_with_adapters(tmp_path: Path, backbone: str, reasoning_file: Path) -> None:
    with pytest.raises(ConfigError, match="lora trains the vision tower"):
        losses(
            tmp_path,
            backbone,
            reasoning_file,
            vision_cache=str(tmp_path / "features"),
            lora={"r": 2, "target_modules": ["gate_proj"]},
        )

"""What is compared on the micro world: arms, and the paper's tables that are made of them.

An arm is a list of stages, and a stage is a shipped YAML file with what is different in this arm. All arms take the
same number of optimizer steps with batches of the same size, whatever else they do; but for those named
`first`, which are there to show what a Stage II adds.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from storm_vlm.lab.world.clips import WorldName

Split = Literal[
    "train",
    "train_all_slots",
    "train_continued",
    "train_plans",
    "train_third",
    "train_dropped_25",
    "train_dropped_50",
    "train_filtered_25",
    "train_gained_25",
    "train_wrong_10",
    "train_wrong_25",
    "train_wrong_50",
    "train_blurred",
    "train_fast",
    "train_slow",
    "train_uneven",
]
Start = Literal["backbone", "deep", "storm"]


@dataclass(frozen=True)
class Stage:
    """A shipped config, its share of the arm's optimizer steps, and what is different in this arm."""

    config: str
    share: float = 1.0
    overrides: tuple[str, ...] = ()
    data: Split = "train"


@dataclass(frozen=True)
class Arm:
    """A system to compare: `name` is for people, `start` where its training begins, `rows` its share of the rows.

    `after` is the arm, of the same seed, whose checkpoint it starts from instead.
    """

    name: str
    stages: tuple[Stage, ...] = ()
    start: Start = "backbone"
    after: str | None = None
    rows: float = 1.0
    latent: bool = False  #: it has slots that hold states
    world: WorldName = "mirrors"

    @property
    def trained(self) -> bool:
        return bool(self.stages)


def _stage1(name: str, *overrides: str, data: Split = "train") -> Arm:
    return Arm(name, (Stage("stage1", overrides=overrides, data=data),), latent=True)


def _storm(name: str, *overrides: str) -> Arm:
    stages = (Stage("stage1", 0.8, overrides), Stage("stage2", 0.2, overrides))
    return Arm(name, stages, latent=True)


def _stage2(name: str, *overrides: str, rows: float = 1.0, data: Split = "train") -> Arm:
    """What is left of the steps after `third_first`."""
    stage = Stage("stage2", 0.2, overrides, data)
    return Arm(name, (stage,), after="third_first", rows=rows, latent=True)


def _rival(world: WorldName, name: str, config: str = "sft", data: Split = "train") -> Arm:
    return Arm(name, (Stage(config, 1.0, (_SLOWER,), data),), world=world)


SFT = Arm("SFT, same data and steps", (Stage("sft"),))
STORM = _storm("STORM, Stage I then II")
# The thought video's frames stay what they are for K = 8, whatever K is: two a step.
_FRAMES = "method.target_frames=16"
_FED = "method.slot_input=target"  # to the end of Stage I
_SLOWER = "training.learning_rate=3e-3"  # better than STORM's rate for all but STORM (`dev/LOG.md`)

ARMS: dict[str, Arm] = {
    "base": Arm("Backbone, perception only"),
    "shipped": Arm("STORM as shipped", start="storm", latent=True),
    "cot": Arm("Chain of thought, SFT on the oracle's plans", (Stage("sft", data="train_plans"),)),
    "sft": SFT,
    # 8e-3 is the best rate found for STORM; SFT is given it, too, and one of its own (`dev/LOG.md`).
    "sft_slower": Arm(
        "SFT, learning rate 3e-3 instead of 8e-3",
        (Stage("sft", overrides=(_SLOWER,)),),
    ),
    "pause": Arm("Pause slots, no target", (Stage("pause"),)),
    "full": STORM,
    # Table 3
    "deep_sft": replace(SFT, name="SFT, six layers (two of them new)", start="deep"),
    "deep_full": replace(STORM, name="STORM, six layers (two of them new)", start="deep"),
    # Table 5
    "k4": _storm("K = 4, two steps a slot", "method.latent_budget=4", _FRAMES),
    "k16": _storm("K = 16, half a board a slot", "method.latent_budget=16", _FRAMES),
    "unpooled": _storm(
        "K = 16, not pooled: all tokens of 2 frames",
        "method.latent_budget=16",
        "method.target_frames=2",
    ),
    # Table 6
    "stage1_only": _stage1("Stage I only"),
    "stage1_first": Arm(
        "STORM before its Stage II (80% of the steps)", (STORM.stages[0],), latent=True
    ),
    "stage2_only": Arm("Stage II only", (Stage("stage2_only"),), latent=True),
    # What slots are aligned to
    "keyframes": _stage1("the keyframes alone", "method.target_source=keyframes"),
    "self_distilled": _stage1(
        "the thought video, read by a slow average of the model",
        "method.target_source=self_distilled",
    ),
    "future": _stage1(
        "what the camera saw next", "method.target_source=future", data="train_continued"
    ),
    "shuffled": _stage1("another row's thought video (control)", "method.target_source=shuffled"),
    # What slots are fed with in Stage I
    "fed_targets": _stage1("targets, to the end", _FED),
    "fed_states": _stage1("own states, from the start", "method.slot_input=rollout"),
    # How many rows it takes
    "sft_eighth": replace(SFT, name="SFT, an eighth of the rows", rows=1 / 8),
    "full_eighth": replace(STORM, name="STORM, an eighth of the rows", rows=1 / 8),
    "sft_third": replace(SFT, name="SFT, a third of the rows", rows=1 / 3),
    "full_third": replace(STORM, name="STORM, a third of the rows", rows=1 / 3),
    # Studies beside the record: targets to the end of Stage I, and few rows
    "third_first": Arm(
        "Stage I on a third of the rows (80% of the steps)",
        (Stage("stage1", 0.8, (_FED,)),),
        rows=1 / 3,
        latent=True,
    ),
    "third": _stage2("then Stage II on these rows", rows=1 / 3),
    "third_late": Arm(
        "Stage I on a third of the rows, Stage II for the last 5% of the steps",
        (Stage("stage1", 0.95, (_FED,)), Stage("stage2", 0.05)),
        rows=1 / 3,
        latent=True,
    ),
    # Thought videos for a third of the rows, answers for all
    "answers": _stage2("then Stage II on all rows"),
    "answers_anchored_fast": _stage2(
        "then Stage II on all rows, aligned where there are targets, learning rate 1e-3",
        "method.alignment_weight=0.1",
        "method.alignment_reduction=sum",
        "training.learning_rate=1e-3",
        data="train_third",
    ),
    # Wrong thought videos
    "wrong_10": _stage1("10% of them wrong", _FED, data="train_wrong_10"),
    "wrong_25": _stage1("25% of them wrong", _FED, data="train_wrong_25"),
    "wrong_50": _stage1("50% of them wrong", _FED, data="train_wrong_50"),
    "filtered_25": _stage1(
        "25% wrong and left out, their rows kept for the answer", _FED, data="train_filtered_25"
    ),
    "gained_25": _stage1("25% wrong, left out by visual gain", _FED, data="train_gained_25"),
    "dropped_25": _stage1("25% wrong, left out with their rows", _FED, data="train_dropped_25"),
    "dropped_50": _stage1("50% wrong, left out with their rows", _FED, data="train_dropped_50"),
    # Thought videos that show what is right badly
    "blurred": _stage1("blurred, and compressed much", _FED, data="train_blurred"),
    "fast": _stage1("twice as fast, then still", _FED, data="train_fast"),
    "slow": _stage1("half as fast, cut off", _FED, data="train_slow"),
    "uneven": _stage1("each at half to twice the speed", _FED, data="train_uneven"),
    # Chains of three to seven steps
    "chains_sft": _rival("chains", "SFT"),
    "chains_all_slots": replace(
        _stage1("K = 8 slots for every question", _FED, data="train_all_slots"), world="chains"
    ),
    "chains_own_slots": replace(_stage1("a slot a step, from four to eight", _FED), world="chains"),
    # The harder split, and what it takes
    "crowded_sft": _rival("crowded", "SFT"),
    "crowded_own_slots": replace(_stage1("STORM (Stage I), a slot a step", _FED), world="crowded"),
    # The second world
    "puzzle_cot": _rival(
        "puzzle", "Chain of thought, SFT on the oracle's plans", data="train_plans"
    ),
    "puzzle_sft": _rival("puzzle", "SFT"),
    "puzzle_pause": _rival("puzzle", "Pause slots, no target", "pause"),
    "puzzle_full": Arm(
        "STORM, Stage I then II",
        (Stage("stage1", 0.8, (_FED,)), Stage("stage2", 0.2)),
        latent=True,
        world="puzzle",
    ),
}


@dataclass(frozen=True)
class Comparison:
    """Arms side by side: the counterpart of a table of the paper, or a question that it leaves open.

    `paragraph` says how to read the table, and what differs from the paper. `claimed` are the arms that the paper has
    behind the `reference`. `names` are what an arm is called here, where that is not its own name; `rivals` what an
    arm is set against, where that is not the `reference`.
    """

    title: str
    paper: str
    paragraph: str
    arms: tuple[str, ...]
    reference: str
    claimed: tuple[str, ...] = ()
    names: dict[str, str] = field(default_factory=dict)
    rivals: dict[str, str] = field(default_factory=dict)

    def name(self, arm: str) -> str:
        return self.names.get(arm, ARMS[arm].name)

    def against(self, arm: str) -> str | None:
        """None for the reference itself."""
        return None if arm == self.reference else self.rivals.get(arm, self.reference)


COMPARISONS: dict[str, Comparison] = {
    "main": Comparison(
        "STORM against its baselines",
        "Tables 1 and 2",
        "All start from one backbone and take the same rows and steps. The learning rate was searched for STORM; SFT "
        "is shown with that rate and with a better one of its own. The paper's chains of thought are written by the "
        "backbone as it is, ours are taught by the oracle's plans. Pause slots show what more computation alone "
        "does, and another clip's latents whether the answer depends on them: the paper has neither.",
        ("base", "cot", "sft", "sft_slower", "pause", "full"),
        "full",
        ("cot", "sft", "sft_slower"),
    ),
    "stages": Comparison(
        "Stages",
        "Table 6",
        "Stage I alone and Stage II alone take as many steps as both stages together, like the paper's. STORM before "
        "its Stage II has taken fewer, and shows what Stage II adds.",
        ("stage1_only", "stage1_first", "stage2_only", "full"),
        "full",
        ("stage1_only", "stage1_first", "stage2_only"),
    ),
    "targets": Comparison(
        "What slots are aligned to (Stage I alone)",
        "the paper's future work",
        "Each arm has its slots aligned to something else. Another row's thought video is a control: it teaches what "
        "such videos have in common, and nothing about this clip.",
        ("stage1_only", "self_distilled", "future", "keyframes", "shuffled", "pause", "sft"),
        "stage1_only",
        names={
            "stage1_only": "the oracle's thought video",
            "pause": "none: pause slots",
            "sft": "no slots: SFT",
        },
    ),
    "slot_inputs": Comparison(
        "What slots are fed with in Stage I",
        "not in the paper",
        "The paper does not say what the slots are fed with while they are aligned. In inference it can only be the "
        "model's own states.",
        ("stage1_only", "fed_targets", "fed_states", "pause"),
        "stage1_only",
        names={
            "stage1_only": "targets at first, then own states",
            "pause": "a pause token, no target",
        },
    ),
    "sizes": Comparison(
        "Two sizes of the backbone",
        "Table 3",
        "The larger backbone has two more layers, which add nothing before they are trained. SFT of each size is set "
        "against STORM of that size. The paper's Table 3 has a smaller model beside its own baseline.",
        ("base", "sft", "full", "deep_sft", "deep_full"),
        "full",
        ("base", "sft", "deep_sft"),
        {
            "base": "Backbone, perception only (either size)",
            "sft": "SFT, four layers",
            "full": "STORM, four layers",
        },
        {"deep_sft": "deep_full"},
    ),
    "latent_sizes": Comparison(
        "Latent size",
        "Table 5",
        "A thought video here has eight steps, so K = 8 is a step a slot. What is not pooled has only two of the "
        "thought video's frames, or K would be 128.",
        ("k4", "full", "k16", "unpooled"),
        "full",
        ("k4", "k16", "unpooled"),
        {"full": "K = 8, a step a slot"},
    ),
    "rows": Comparison(
        "How many rows it takes",
        "not in the paper",
        "All arms take the same number of steps, so fewer rows are seen more often. SFT is set against STORM on as "
        "many rows.",
        ("sft_eighth", "full_eighth", "sft_third", "full_third", "sft", "full"),
        "full",
        names={"sft": "SFT, all rows", "full": "STORM, all rows"},
        rivals={"sft_eighth": "full_eighth", "sft_third": "full_third"},
    ),
}

# Not of the paper's tables: `storm reproduce` makes them where they are asked for, in a record of their own.
STUDIES: dict[str, Comparison] = {
    "few_rows": Comparison(
        "Few rows: targets to the end of Stage I",
        "not in the paper",
        "STORM's Stage I goes over from targets to own states on the way, which fails with one seed of three on a "
        "third of the rows. Here targets are fed to its end.",
        ("full_third", "third_first", "third", "third_late"),
        "third",
    ),
    "answers": Comparison(
        "Thought videos for a third of the rows, answers for all",
        "the paper's setting",
        "In the paper Stage II has more rows than Stage I, which have no thought videos. Stage I is the same for all "
        "lines; the bold one has a Stage II on no other rows.",
        ("third_first", "third", "answers", "answers_anchored_fast"),
        "third",
        names={"third": "then Stage II on the same rows"},
    ),
    "wrong_thoughts": Comparison(
        "Wrong thought videos (Stage I alone, targets to the end)",
        "the paper's first limitation",
        "Of the training rows' thought videos a share is wrong, answers are right: a third of the wrong ones turn "
        "the other way at one mirror and go on from there, a third leave out a step, a third are of another scene. "
        "What is left out is left out by a filter without fault, but for visual gain: rows whose answer the thought "
        "video makes less likely, for a model that has learned on other scenes to read thought videos.",
        (
            "fed_targets",
            "wrong_10",
            "wrong_25",
            "filtered_25",
            "gained_25",
            "dropped_25",
            "wrong_50",
            "dropped_50",
        ),
        "fed_targets",
        names={"fed_targets": "all of them right"},
    ),
    "distorted_thoughts": Comparison(
        "Thought videos that show the right steps badly (Stage I alone, targets to the end)",
        "not in the paper",
        "All thought videos are changed, answers are right. Blurred: by a Gaussian of 4 pixels, where a cell has 32, "
        "and written at a rate factor of 40. Twice as fast: two steps a slot. Half as fast: two slots a step, and of "
        "more than three hidden steps the last are not shown. A speed of its own cannot be told from the clip.",
        ("fed_targets", "blurred", "fast", "slow", "uneven"),
        "fed_targets",
        names={"fed_targets": "as they were made"},
    ),
    "own_slots": Comparison(
        "As many slots as the question needs (Stage I alone, targets to the end)",
        "Table 5 has one K for all",
        "Questions about three to seven hidden steps, in training and test. In the last line a row has a slot for "
        "each step of its thought, the last one shown included (`Row.slots`); the model ends the segment by itself.",
        ("chains_sft", "chains_all_slots", "chains_own_slots"),
        "chains_own_slots",
    ),
    "harder_split": Comparison(
        "The harder split, after training on one or two balls",
        "not in the paper",
        "Rows for training and test ask about three to seven steps of the only ball or of one of two, a slot for a "
        "step. The harder split is the record's, with scenes of its own: two balls, six or seven steps.",
        ("crowded_sft", "crowded_own_slots"),
        "crowded_own_slots",
    ),
    "second_world": Comparison(
        "A second world: a sliding puzzle",
        "not in the paper",
        "The ball and what it rolls upon change places, and a block makes it turn right, a pad left. Asked is where "
        "the ball will be after three to five steps, or what will lie in a cell; harder split: six or seven steps. "
        "Of five ways to guess none is right for more than 22% of the test questions. Targets are fed to the end of "
        "Stage I; the learning rate is 3e-3 for all but STORM. The backbone is the shipped one, as it is: it answers "
        "all of 640 questions about what 80 such clips show.",
        ("puzzle_cot", "puzzle_sft", "puzzle_pause", "puzzle_full"),
        "puzzle_full",
    ),
}

"""Configuration of `ncalign study`: its flags, and what a study's file holds."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import Field, model_validator

from ncalign.core.config import Flat, Frozen
from ncalign.rewards.config import RewardConfig

Scale: TypeAlias = Literal["tiny", "small", "paper"]
Verb: TypeAlias = Literal["train", "online"]
Measure: TypeAlias = Literal[
    "reward",
    "sampled_reward",
    "solved",
    "reward_accuracy",
    "chosen_change",
    "rejected_change",
    "kl",
    "length",
    "win_rate",
    "task_score",
    "drift",
    "tokens_per_second",
    "tokens_generated",
]
ANSWERED: tuple[Measure, ...] = ("reward", "sampled_reward", "solved", "kl", "length")
"""Measures for which the held-out prompts are answered."""
OF_PAIRS: tuple[Measure, ...] = ("win_rate",)
"""Measures of two arms, made from what is measured of each."""
OF_TASKS: tuple[Measure, ...] = ("task_score",)
"""Measures with a value for each reasoning task."""
OF_RUNS: tuple[Measure, ...] = ("drift", "tokens_per_second", "tokens_generated")
"""Measures with one value for a run; the others have one for each held-out prompt."""
BEFORE = "before"
"""The arm that is the starting model."""


class StudyConfig(Frozen):
    """`ncalign study`: compare arms of runs over several seeds, with intervals."""

    study: str = Field(
        description="File of the study, or the name of one that is shipped (see the page); 'tiny-model': write the tiny model "
        "with scored groups of its answers to output_dir instead."
    )
    output_dir: Path | None = Field(None, description="Folder of the study; none: runs/, with the study's name and scale.")
    scale: Scale = Field("tiny", description="Which of the study's scales is run, where it has several.")
    data: Path | None = Field(None, description="File of programs, for a study whose material is one (transfer).")
    seeds: int | None = Field(None, ge=1, description="Number of seeds of each arm; none: as the study says.")
    workers: int = Field(1, ge=1, description="Number of processes that run at a time on this machine; cores are divided.")
    ray: str | None = Field(
        None,
        description="Address of a Ray cluster that makes the runs: 'auto' for the one that this machine belongs to, 'local' to "
        "start one here; none: no Ray.",
    )
    ray_cpus: int = Field(1, ge=1, description="CPU cores of each run, with ray.")
    ray_gpus: float = Field(0.0, ge=0, description="GPUs of each run, with ray.")

    @model_validator(mode="after")
    def _one_engine(self) -> StudyConfig:
        if self.ray is not None and self.workers > 1:
            raise ValueError("workers are processes of this machine, and with ray Ray decides what runs where: leave one out")
        if self.ray is None and (self.ray_cpus != 1 or self.ray_gpus != 0):
            raise ValueError("ray_cpus and ray_gpus are for runs on a Ray cluster: give ray, or leave them out")
        return self


class Evaluation(Frozen):
    """How the held-out prompts are answered, and what scores the answers."""

    rewards: Annotated[RewardConfig, Flat()]
    max_new_tokens: int = Field(256, ge=1, description="Maximum number of tokens of an answer.")
    num_samples: int = Field(4, ge=1, description="Number of sampled answers to each prompt, beside the greedy one.")
    temperature: float = Field(1.0, gt=0, description="Temperature of the sampled answers.")
    batch_size: int = Field(256, ge=1, description="Number of answers generated at a time.")
    solved_at: float = Field(1.0, description="Reward from which a greedy answer counts as solved.")
    empty_reward: float = Field(0.0, description="Reward of an answer without text, which no source can score.")


class TaskSuite(Frozen):
    """Reasoning tasks that every arm's model is asked."""

    names: tuple[str, ...] = Field(min_length=1, description="Tasks, named as for `evaluate`.")
    data: tuple[str, ...] = Field((), description="Data files of tasks, each as TASK=FILE.")
    limit: int | None = Field(None, ge=1, description="Maximum number of questions of a task; none: all of them.")
    num_fewshot: int | None = Field(
        None, ge=0, description="Number of examples before a task's question; none: each task's own number."
    )
    apply_chat_template: bool = Field(False, description="Put each task's question into a user's turn of the chat template.")
    batch_size: int = Field(8, ge=1, description="Number of questions asked at a time.")

    @model_validator(mode="after")
    def _pairs(self) -> TaskSuite:
        for entry in self.data:
            task, _, file = entry.partition("=")
            if task not in self.names or not file:
                raise ValueError(f"data: {entry!r} must be TASK=FILE, with one of the tasks {', '.join(self.names)}")
        return self

    def files(self) -> dict[str, str]:
        """The data file of each task that has one."""
        return {task: file for task, _, file in (entry.partition("=") for entry in self.data)}


class Material(Frozen):
    """A model and data that ncalign makes itself."""

    kind: Literal["tiny", "demo", "programs"] = Field(
        description="tiny: the tiny model and groups of its own answers; demo: SmolLM2-135M and the demo's shipped groups; "
        "programs: SmolLM2-135M and the programs of a file, scored by their tests in the sandbox."
    )
    data: Path | None = Field(None, description="File of programs, with kind: programs (see the page); also --data.")
    mix: Literal["words", "numbers"] = Field("words", description="Tasks of the tiny model.")
    num_prompts: int = Field(192, ge=8, description="Number of training groups.")
    num_samples: int = Field(8, ge=2, description="Number of candidates of each group.")
    num_held_out: int = Field(128, ge=8, description="Number of held-out prompts.")

    @model_validator(mode="after")
    def _only_of_programs(self) -> Material:
        if self.data is not None and self.kind != "programs":
            raise ValueError(f"data is for kind: programs, and kind is {self.kind}: leave one of both out")
        return self


class StudyFile(Frozen):
    """What a study's file holds: a base run, arms that differ from it, and what is compared with what."""

    claim: str = Field("", description="What the study is to decide, in a sentence.")
    source: str = Field("", description="Where the claim comes from.")
    verb: Verb = Field("train", description="Verb that makes the runs.")
    material: Material | None = Field(None, description="Model and data made by ncalign, in place of base's own.")
    base: dict[str, Any] = Field(default_factory=dict, description="Settings of every run.")
    before: bool = Field(False, description="Measure the starting model too, as an arm named before that is not trained.")
    arms: dict[str, dict[str, Any] | None] = Field(min_length=2, description="Settings of each arm that differ from base.")
    seeds: int = Field(3, ge=1, description="Number of runs of each arm, with the seeds 0, 1, ...")
    evaluate: Evaluation | None = Field(None, description="How held-out prompts are answered and scored; none: they are not.")
    tasks: TaskSuite | None = Field(None, description="Reasoning tasks that the trained models are asked; none: they are not.")
    measures: tuple[Measure, ...] = Field((), description="What is measured; none: all but what must be asked for.")
    compare: tuple[str, ...] = Field(
        (), description="Claims 'ARM > ARM', of the first measure, or 'ARM > ARM by MEASURE'; none: each arm > the first."
    )
    keep_models: bool = Field(True, description="Keep the runs' models once they are measured.")

    @model_validator(mode="after")
    def _measurable(self) -> StudyFile:
        unanswered = self.evaluate is None and self.material is None
        if asked := [name for name in self.measures if name in (*ANSWERED, *OF_PAIRS) and unanswered]:
            raise ValueError(f"measures {', '.join(asked)} need the section evaluate, which says how answers are scored")
        if (asked := [name for name in self.measures if name in OF_TASKS]) and self.tasks is None:
            raise ValueError(f"measures {', '.join(asked)} need the section tasks, which names them")
        if "drift" in self.measures and self.verb != "online":
            raise ValueError("drift is measured of online runs, and verb is train: set verb: online, or leave drift out")
        if self.material is not None:
            brought = () if self.material.kind == "programs" else ("model",)
            own = [name for name in (*brought, "data", "eval_data", "eval_fraction") if name in self.base]
            if own:
                raise ValueError(
                    f"material brings model and data, and base has its own {', '.join(own)}: leave one of both out"
                )
        return self

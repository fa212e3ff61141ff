"""Configuration of `ncalign answer` and `ncalign evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from ncalign.core.config import Flat, Frozen, Seed
from ncalign.generation.config import ServerConfig
from ncalign.model.config import DType


class EvalJudgeConfig(Frozen):
    """A language model on a server that judges answers to a question set."""

    server: Annotated[ServerConfig, Flat()] = Field(default_factory=ServerConfig)
    mode: Literal["auto", "logprobs", "labels", "rating"] = Field(
        "auto",
        description="Two answers compared by the log-probs of one letter or by one of five labels (auto: log-probs where the "
        "server gives them), in both orders; or each answer rated from 1 to 10 by itself.",
    )
    template: Path | None = Field(
        None,
        description="File with the judge's prompt; it holds {question}, {answer_a} and {answer_b}, or {conversation} and "
        "{answer}.",
    )
    max_tokens: int = Field(1024, ge=1, description="Of a verdict in words.")
    attempts: int = Field(3, ge=1, description="Times that a verdict that can't be read is asked for.")
    price_in: float | None = Field(None, ge=0, description="Price of a million prompt tokens; none: no costs are told.")
    price_out: float | None = Field(None, ge=0, description="Price of a million tokens of verdicts.")


class AnswerConfig(Frozen):
    """`ncalign answer`: a model's answers to a question set, for any judge."""

    model: str | None = Field(None, description="Model folder or hub id; an adapter folder loads its base model too.")
    server: ServerConfig | None = Field(None, description="A server to ask, in place of a model of one's own.")
    set_name: str = Field(
        "instructions",
        description="Questions (also --set): instructions (ours, bundled), alpaca-eval, arena-hard, mt-bench, or a file.",
    )
    set_file: Path | None = Field(None, description="The set's file, for alpaca-eval, arena-hard and mt-bench.")
    output: Path = Field(description="File to write: .jsonl, or .json for alpaca_eval.")
    form: Literal["ncalign", "alpaca_eval", "fastchat", "arena_hard"] = Field("ncalign", description="Whose reader it is for.")
    name: str | None = Field(None, description="What the model is called in the file; none: its folder's name.")
    max_new_tokens: int = Field(1024, ge=1, description="Of a turn's answer.")
    temperature: float | None = Field(None, ge=0, description="Of the sampling; none: MT-Bench's by category, else 0.")
    batch_size: int = Field(32, ge=1, description="Answers sampled at a time.")
    vllm: bool = Field(False, description="Sample with vLLM in this process (extra vllm).")
    limit: int | None = Field(None, ge=1, description="Questions, at most.")
    dtype: DType = "float32"
    seed: Seed = Field(0, description="Of the sampling.")
    cache_dir: Path | None = Field(None, description="Where answers are kept; default: the user's cache folder.")
    trust_remote_code: bool = Field(False, description="Run code that comes with the model.")

    @model_validator(mode="after")
    def _one_of_both(self) -> AnswerConfig:
        if (self.model is None) == (self.server is None):
            raise ValueError("give model, a folder or hub id, or server, and not both")
        return self


class EvaluateConfig(Frozen):
    """`ncalign evaluate`: a model's answers judged against others', or its scores on reasoning tasks."""

    model: str | None = Field(None, description="Model folder or hub id, or a file of its answers (.json, .jsonl).")
    against: tuple[str, ...] = Field((), description="Models, or files of answers, to compare with; the first is the baseline.")
    set_name: str = Field(
        "instructions",
        description="Questions (also --set): instructions (ours, bundled), alpaca-eval, arena-hard, mt-bench, or a file.",
    )
    set_file: Path | None = Field(None, description="The set's file, for alpaca-eval, arena-hard and mt-bench.")
    reference_answers: Path | None = Field(None, description="MT-Bench's file of reference answers, for the judge.")
    output_dir: Path = Field(
        Path("runs/evaluate"), description="Folder for results.json, tables, charts, answers and verdicts."
    )
    judge: EvalJudgeConfig | None = Field(None, description="A language model on a server as the judge.")
    reward: tuple[str, ...] = Field(
        (), description="Rewards as the judge, as `score` takes them; default without a judge: instructions, for our own set."
    )
    judgements: tuple[Path, ...] = Field(
        (),
        description="Files of verdicts in place of a judge: AlpacaEval's annotations, Arena-Hard's (against names the baseline "
        "where they don't) or FastChat's judgements.",
    )
    compare_games: Path | None = Field(None, description="games.jsonl of another judge, for the agreement of the two.")
    difficulty_table: Path | None = Field(None, description="AlpacaEval's df_gamed.csv, for its length-controlled win rate.")
    max_new_tokens: int | None = Field(None, ge=1, description="Of an answer; none: 160 for our own set, else 1024.")
    temperature: float | None = Field(None, ge=0, description="Of the sampling; none: MT-Bench's by category, else 0.")
    batch_size: int = Field(32, ge=1, description="Answers sampled at a time.")
    vllm: bool = Field(False, description="Sample with vLLM in this process (extra vllm).")
    dtype: DType = "float32"
    tasks: tuple[str, ...] = Field(
        (), description="Reasoning tasks in place of a question set: lm-eval's, svamp, humaneval, ..."
    )
    task_data: tuple[str, ...] = Field((), description="Files of tasks, each as TASK=FILE.")
    limit: int | None = Field(None, ge=1, description="Questions of a set or task, at most; the results say so.")
    num_fewshot: int | None = Field(None, ge=0, description="Examples before a task's question; none: each task's own number.")
    apply_chat_template: bool = Field(False, description="Ask tasks as a user's turn.")
    backend: str = Field("hf", description="lm-eval's backend for tasks.")
    backend_args: tuple[str, ...] = Field((), description="Further arguments of the backend, each as NAME=VALUE.")
    allow_weak: bool = Field(False, description="Run answers that are programs where the sandbox has no walls.")
    num_resamples: int = Field(1000, ge=100, description="Bootstrap resamples and permutations.")
    seed: Seed = Field(0, description="Of sampling, bootstrap and permutation tests.")
    cache_dir: Path | None = Field(None, description="Where answers and verdicts are kept; default: the user's cache folder.")
    trust_remote_code: bool = Field(False, description="Run code that comes with a model.")

"""Configuration of `ncalign answer` and `ncalign evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from ncalign.core.config import Flat, Frozen, Overwrite, Seed
from ncalign.data.config import OnBadRow
from ncalign.generation.config import ServerConfig
from ncalign.model.config import ChatTemplateKwargs, DType, StringPrompts, TemplateDate


class EvalJudgeConfig(Frozen):
    """A language model on a server that judges answers to a question set."""

    server: Annotated[ServerConfig, Flat()] = Field(default_factory=ServerConfig)
    mode: Literal["auto", "logprobs", "labels", "rating"] = Field(
        "auto",
        description="How answers are judged. Two answers are compared, in both orders, by the log-probs of one "
        "letter (logprobs), by one of five labels (labels), or by log-probs where the server gives them "
        "(auto); rating: each answer is rated from 1 to 10 by itself.",
    )
    template: Path | None = Field(
        None,
        description="File with the judge's prompt, which holds {question}, {answer_a} and {answer_b}, or "
        "{conversation} and {answer}, and may hold {mark}; none: the bundled prompt.",
    )
    max_tokens: int = Field(1024, ge=1, description="Maximum number of tokens of a verdict in words.")
    attempts: int = Field(3, ge=1, description="Number of times that a verdict is asked for until one can be read.")
    price_in: float | None = Field(
        None, ge=0, description="Price of a million prompt tokens, for the costs in the results; none: no costs."
    )
    price_out: float | None = Field(
        None, ge=0, description="Price of a million tokens of verdicts, for the costs in the results."
    )


class AnswerConfig(Frozen):
    """`ncalign answer`: a model's answers to a question set, for any judge."""

    model: str | None = Field(None, description="Model folder or hub id; an adapter folder loads its base model too.")
    server: ServerConfig | None = Field(None, description="Ask a model on a server instead of a local one.")
    set_name: str = Field(
        "instructions",
        description="Questions (also --set): instructions (ours, bundled), alpaca-eval, arena-hard, mt-bench, or a file.",
    )
    set_file: Path | None = Field(None, description="The set's file, for alpaca-eval, arena-hard and mt-bench.")
    output: Path = Field(description="File to write: .jsonl, or .json for alpaca_eval.")
    overwrite: Overwrite = False
    form: Literal["ncalign", "alpaca_eval", "fastchat", "arena_hard"] = Field(
        "ncalign", description="Tool that is to read the file."
    )
    name: str | None = Field(None, description="Name of the model in the file; none: the name of its folder.")
    max_new_tokens: int = Field(1024, ge=1, description="Maximum number of tokens of a turn's answer.")
    temperature: float | None = Field(
        None, ge=0, description="Sampling temperature; none: MT-Bench's by category, 0 for other sets."
    )
    string_prompts: StringPrompts = Field(
        "auto",
        description="Questions of one turn that are plain text: given to a model as they are (raw), as a user's turn of its "
        "chat template (user_turn), or as a user's turn where it has a chat template and as they are where it has none (auto).",
    )
    batch_size: int = Field(32, ge=1, description="Number of answers sampled at a time.")
    vllm: bool = Field(False, description="Sample with vLLM in this process (extra vllm).")
    template_date: TemplateDate = None
    chat_template_kwargs: ChatTemplateKwargs = ()
    on_bad_row: OnBadRow = Field(
        "error", description="What to do with questions that a model can't be asked: stop, or leave them out and count them."
    )
    limit: int | None = Field(None, ge=1, description="Maximum number of questions; none: all of them.")
    dtype: DType = "auto"
    seed: Seed = Field(0, description="Random seed of the sampling.")
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
    reference_answers: Path | None = Field(None, description="MT-Bench's file of reference answers, which the judge is shown.")
    output_dir: Path = Field(
        Path("runs/evaluate"), description="Folder for results.json, tables, charts, answers and verdicts."
    )
    overwrite: Overwrite = False
    judge: EvalJudgeConfig | None = Field(None, description="Judge with a language model on a server.")
    reward: tuple[str, ...] = Field(
        (),
        description="Judge with these rewards, named as for `score`; default without a judge: instructions, for our own set.",
    )
    judgements: tuple[Path, ...] = Field(
        (),
        description="Files of verdicts to use instead of a judge: AlpacaEval's annotations, Arena-Hard's (against "
        "names the baseline where they don't) or FastChat's judgements.",
    )
    compare_games: Path | None = Field(
        None, description="games.jsonl of another judge, to measure how far the two judges agree."
    )
    difficulty_table: Path | None = Field(None, description="AlpacaEval's df_gamed.csv, for its length-controlled win rate.")
    max_new_tokens: int | None = Field(
        None, ge=1, description="Maximum number of tokens of an answer; none: 160 for our own set, else 1024."
    )
    temperature: float | None = Field(
        None, ge=0, description="Sampling temperature; none: MT-Bench's by category, 0 for other sets."
    )
    string_prompts: StringPrompts = Field(
        "auto",
        description="Questions of one turn that are plain text: given to a model as they are (raw), as a user's turn of its "
        "chat template (user_turn), or as a user's turn where it has a chat template and as they are where it has none (auto).",
    )
    batch_size: int = Field(32, ge=1, description="Number of answers sampled at a time.")
    vllm: bool = Field(False, description="Sample with vLLM in this process (extra vllm).")
    template_date: TemplateDate = None
    chat_template_kwargs: ChatTemplateKwargs = ()
    on_bad_row: OnBadRow = Field(
        "error", description="What to do with questions that a model can't be asked: stop, or leave them out and count them."
    )
    dtype: DType = "auto"
    tasks: tuple[str, ...] = Field(
        (), description="Reasoning tasks to run instead of a question set: lm-eval's, svamp, humaneval, ..."
    )
    task_data: tuple[str, ...] = Field((), description="Data files of tasks, each as TASK=FILE.")
    limit: int | None = Field(
        None, ge=1, description="Maximum number of questions of a set or task, which the results record; none: all of them."
    )
    num_fewshot: int | None = Field(
        None, ge=0, description="Number of examples before a task's question; none: each task's own number."
    )
    apply_chat_template: bool = Field(False, description="Put each task's question into a user's turn of the chat template.")
    backend: str = Field("hf", description="lm-eval's backend for tasks.")
    backend_args: tuple[str, ...] = Field((), description="Further arguments of the backend, each as NAME=VALUE.")
    allow_weak: bool = Field(False, description="Run programs that the model wrote even where the sandbox can't isolate them.")
    num_resamples: int = Field(1000, ge=100, description="Number of permutations of each permutation test.")
    seed: Seed = Field(0, description="Random seed of sampling and permutation tests.")
    cache_dir: Path | None = Field(None, description="Where answers and verdicts are kept; default: the user's cache folder.")
    trust_remote_code: bool = Field(False, description="Run code that comes with a model.")

"""Frozen, validated configuration: one model per verb, unknown keys refused; the objects stop at the door of each verb.

Nothing here imports torch. The methods' configurations lie beside their losses, in ``objectives/``, and `train`'s, which holds
one of them, in ``training_config.py``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

Strategy = Literal["mc", "max", "min", "uniform", "sweet_spot", "all"]
Pairing = Annotated[
    Literal["best_vs_one", "best_vs_each", "best_vs_worst", "best_vs_hard", "best_vs_sweet_spot", "all_pairs"],
    Field(
        description="The best against one random lower-scored candidate, each of them, the lowest-scored, one drawn by MC-PO's "
        "kernel, or the one nearest to two standard deviations below the mean reward; or all pairs."
    ),
]
Beta = Annotated[float, Field(gt=0, description="Scale of the log-ratio: implicit reward = beta * log(policy/reference).")]
Alpha = Annotated[
    float, Field(gt=0, description="Reward temperature: target weights are softmax(reward / alpha) within a group.")
]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
"""torch's generators take 64 bits, one of them for the sign."""


class Frozen(BaseModel):
    """Base of every configuration model: immutable, and unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)


OnBadRow = Annotated[
    Literal["error", "skip"],
    Field(description="What to do with rows that can't be used: stop with the list of them, or leave them out and count them."),
]
DType = Annotated[
    Literal["float32", "bfloat16", "float64"],
    Field(
        description="Precision of the computation. Full fine-tuning keeps float32 weights and autocasts to bfloat16; "
        "with LoRA the frozen weights are held in this precision and the adapter in float32."
    ),
]
StringPrompts = Annotated[
    Literal["raw", "user_turn"],
    Field(description="Prompts that are plain strings: encoded as they are, or as a user's turn of the chat template."),
]


class LoRA(Frozen):
    """A LoRA adapter (peft); every other weight is frozen, and the reference is the adapter switched off."""

    r: int = Field(16, ge=1, description="Rank.")
    alpha: int = Field(32, ge=1, description="Scale; the adapter's output is multiplied by alpha / r.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on the adapter's input.")
    target_modules: str | tuple[str, ...] = Field("all-linear", description="Module names, or 'all-linear'.")


class EncodingConfig(Frozen):
    """How groups become token ids."""

    max_length: int = Field(1024, ge=2, description="Most tokens of a prompt and its completion together.")
    max_prompt_length: int | None = Field(
        None,
        ge=1,
        description="Prompt tokens kept (its end) when prompt and longest completion exceed max_length; none: half of it.",
    )
    string_prompts: StringPrompts = "raw"

    @model_validator(mode="after")
    def _room_for_completions(self) -> EncodingConfig:
        if self.max_prompt_length is not None and self.max_prompt_length >= self.max_length:
            raise ValueError(
                f"max_prompt_length ({self.max_prompt_length}) must be less than max_length ({self.max_length}): "
                "completions need room"
            )
        return self


class ServerConfig(Frozen):
    """A model on an OpenAI-compatible server (vLLM, SGLang, llama.cpp, an API)."""

    base_url: str = Field("http://localhost:8000/v1", description="Where it listens, with /v1.")
    model: str = Field("default", description="The model's name there.")
    api_key_env: str | None = Field(None, description="Environment variable that holds the key; none: a server without keys.")
    max_concurrency: int = Field(16, ge=1, description="Requests under way at a time, at most.")
    requests_per_minute: float | None = Field(None, gt=0, description="Requests begun in a minute, at most.")
    timeout_seconds: float = Field(600.0, gt=0, description="Of one request.")
    max_retries: int = Field(8, ge=0, description="Times that a failed request, or an answer that is none, is tried again.")
    logprobs: bool = Field(True, description="Ask for log-probs of what is sampled; some servers have none.")


class JudgeConfig(ServerConfig):
    """A language model on a server that scores completions."""

    api_key_env: str | None = Field(None, description="Environment variable that holds the key; none: a server without keys.")
    mode: Literal["pointwise", "pairwise"] = Field(
        "pointwise", description="A rating for each completion, or comparisons of two, each in both orders."
    )
    template: Path | None = Field(
        None,
        description="File with the judge's prompt; it holds {prompt} and {completion}, or {completion_a} and {completion_b}.",
    )
    lowest: float = Field(1.0, description="Lowest rating that counts.")
    highest: float = Field(10.0, description="Highest rating that counts.")
    opponents: int | None = Field(
        None, ge=1, description="Comparisons of a completion with others of its group; none: with all."
    )
    max_tokens: int = Field(512, ge=1, description="Of a verdict.")
    attempts: int = Field(3, ge=1, description="Times that a verdict that can't be read is asked for.")


class EvalJudgeConfig(ServerConfig):
    """A language model on a server that judges answers to a question set."""

    api_key_env: str | None = Field(None, description="Environment variable that holds the key; none: a server without keys.")
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


Rewards = Annotated[
    tuple[str, ...],
    BeforeValidator(lambda value: (value,) if isinstance(value, str) else value),
    Field(
        min_length=1,
        description="Where rewards come from: 'package.module:function' or 'file.py:function', called with (prompt, "
        "completions); 'reasoning_gym', 'math_verify' or 'instructions', which read a group's metadata; 'model:FOLDER', a "
        "reward model; 'judge', as section judge says. Several make an ensemble.",
    ),
]
Combine = Annotated[Literal["mean", "min"], Field(description="How the rewards of several sources become one.")]
Judge = Annotated[JudgeConfig | None, Field(description="The judge, with reward: judge.")]
RewardTimeout = Annotated[
    float | None, Field(gt=0, description="Seconds for a group's rewards, of a function or a verifier; none: no limit.")
]
MaxFailedShare = Annotated[
    float,
    Field(ge=0, le=1, description="Share of the candidates whose rewards may fail, each of which goes without; 0: none may."),
]


SchemaChoice = Annotated[
    Literal[
        "auto",
        "ncalign",
        "nca",
        "ultrafeedback",
        "nectar",
        "simpo",
        "nemo_rl",
        "lmflow",
        "solutions",
        "sharegpt",
        "alpaca",
        "nemo_aligner",
        "alpaca_eval",
        "hh",
        "trl_preference",
        "trl_unpaired",
        "trl_prompts",
    ],
    Field(description="Schema of the input (also --from); auto: recognised by its columns."),
]


DataSource = Annotated[str, BeforeValidator(lambda value: str(value) if isinstance(value, Path) else value)]
"""A file, a folder, a saved dataset or a hub id."""


class ConvertConfig(Frozen):
    """`ncalign convert`: any schema we read → groups in JSONL or Parquet, or pairs."""

    input: DataSource = Field(
        description="File to read (.jsonl, .jsonl.gz, .json or .parquet), a folder of such files, a saved dataset, or a hub id."
    )
    output: Path = Field(
        description="File to write: .jsonl, .jsonl.gz or .parquet; another name is a folder, with a file for each that is read."
    )
    shards: Literal["jsonl", "jsonl.gz", "parquet"] = Field("jsonl", description="Kind of the files in an output folder.")
    schema_name: SchemaChoice = "auto"
    adapter: str | None = Field(
        None, description="'file.py:function' that makes of a row one of our schema, or none to leave it out; its code is run."
    )
    target: Literal["ncalign", "best_vs_random", "best_vs_worst", "all_pairs"] = Field(
        "ncalign", description="What to write (also --to): groups, or TRL's preference pairs made of them."
    )
    seed: Seed = Field(0, description="Of the candidates drawn for best_vs_random.")
    on_bad_row: OnBadRow = "error"


class AdjustConfig(Frozen):
    """`ncalign adjust`: rewards made anew from what is there, with a record of how."""

    input: str = Field(description="Groups to read, in any schema, file, folder or hub id that `convert` reads.")
    output: Path = Field(description="Groups file to write: .jsonl, .jsonl.gz or .parquet; may be the input itself.")
    steps: tuple[str, ...] = Field(
        (),
        description="What is done, in this order: zscore, rank, quantile, clip:LOW:HIGH, scale:FACTOR, length[:UNIT], "
        "length_glm[:UNIT], aspects[:NAME=WEIGHT]..., and merge where files are to be merged later than first.",
    )
    schema_name: SchemaChoice = "auto"
    merge: tuple[str, ...] = Field(
        (), description="Files with the same groups and other rewards; steps before `merge` are done to each file by itself."
    )
    merge_with: Literal["mean", "min", "max", "weights"] = Field("mean", description="How the files' rewards become one.")
    merge_weights: tuple[Annotated[float, Field(gt=0)], ...] = Field(
        (), description="With merge_with: weights, one for the input and one for each file of merge."
    )
    seed: Seed = Field(0, description="Of the rewards drawn for quantile, where there are more than 2**20.")
    on_bad_row: OnBadRow = "error"

    @model_validator(mode="after")
    def _something_to_do(self) -> AdjustConfig:
        if not self.steps and not self.merge:
            raise ValueError("nothing to do: give steps, or files to merge, or both")
        if "merge" in self.steps and not self.merge:
            raise ValueError("steps: merge needs files to merge: give merge, or take the step out")
        if (self.merge_with == "weights") != bool(self.merge_weights):
            raise ValueError("merge_with: weights and merge_weights go together: give both or neither")
        if self.merge_weights and len(self.merge_weights) != len(self.merge) + 1:
            raise ValueError(
                f"merge_weights has {len(self.merge_weights)} numbers, and {len(self.merge) + 1} are needed: one for the input "
                "and one for each file of merge"
            )
        return self


class AuditConfig(Frozen):
    """`ncalign audit`: what a set of scored candidates is like, before anything is trained on it."""

    data: DataSource = Field(description="Scored groups: whatever `convert` reads.")
    output_dir: Path = Field(Path("runs/audit"), description="Folder for audit.json and audit.html.")
    schema_name: SchemaChoice = "auto"
    sample: int = Field(1000, ge=2, description="Groups whose texts are compared, drawn evenly from all.")
    embedder: str | None = Field(None, description="sentence-transformers model for likeness in meaning; none: words alone.")
    bertscore: str | None = Field(
        None, description="Model, or model:layer, for BERTScore of the best candidate and the others; none: not computed."
    )
    model: str | None = Field(None, description="Model whose kernel weights are looked at; none: no kernel.")
    reference_model: str | None = Field(None, description="Reference of its log-ratios; none: its log-probs are the scores.")
    beta: Beta = 0.1
    max_length: int = Field(1024, ge=2, description="Most tokens of a prompt and its completion, for the model.")
    string_prompts: StringPrompts = "raw"
    dtype: DType = "float32"
    seed: Seed = Field(0, description="Of the sample.")
    on_bad_row: OnBadRow = "error"


class CheckConfig(EncodingConfig):
    """`ncalign check`: every group encoded as training will, and a list of what to mend."""

    data: DataSource = Field(description="Groups to check: whatever `convert` reads.")
    model: str = Field(description="Model folder or hub id; only its tokenizer and configuration are read.")
    schema_name: SchemaChoice = "auto"
    against: DataSource | None = Field(None, description="Evaluation set whose prompts must not be among these.")
    trust_remote_code: bool = Field(False, description="Run code that comes with the tokenizer.")


class GenerateConfig(Frozen):
    """`ncalign generate`: sample K candidate completions for each prompt."""

    model: str | None = Field(None, description="Model folder or hub id; an adapter folder loads its base model too.")
    server: ServerConfig | None = Field(None, description="A server to sample from, in place of a model of one's own.")
    prompts: Path = Field(description="Groups whose prompts are answered (candidates may be absent).")
    output: Path = Field(description="Groups file to write.")
    num_samples: int = Field(8, ge=1, description="K, completions per prompt.")
    max_new_tokens: int = Field(256, ge=1, description="Tokens of a completion, at most.")
    temperature: float = Field(1.0, ge=0, description="Sampling temperature; 0: greedy.")
    top_p: float = Field(1.0, gt=0, le=1, description="Sample from the smallest set of tokens with this probability; 1: off.")
    top_k: int = Field(0, ge=0, description="Sample from the k likeliest tokens; 0: off.")
    batch_size: int = Field(64, ge=1, description="Completions sampled at a time.")
    string_prompts: StringPrompts = "raw"
    dtype: DType = "float32"
    seed: Seed = Field(0, description="Of the sampling.")
    on_bad_row: OnBadRow = "error"
    trust_remote_code: bool = Field(False, description="Run code that comes with the model.")

    @model_validator(mode="after")
    def _one_of_both(self) -> GenerateConfig:
        if (self.model is None) == (self.server is None):
            raise ValueError("give model, a folder or hub id, or server, and not both")
        return self


class ScoreConfig(Frozen):
    """`ncalign score`: fill in the candidates' rewards."""

    data: Path = Field(description="Groups to score.")
    output: Path = Field(description="Groups file to write.")
    reward: Rewards
    combine: Combine = "mean"
    judge: Judge = None
    reward_batch_size: int = Field(16, ge=1, description="Completions that a reward model scores at a time.")
    reward_timeout: RewardTimeout = None
    max_failed_share: MaxFailedShare = 0.0
    cache_dir: Path | None = Field(
        None, description="Where a judge's and a reward model's scores are kept; default: the user's cache folder."
    )
    trust_remote_code: bool = Field(False, description="Run code that comes with a reward model.")
    on_bad_row: OnBadRow = "error"


class DemoConfig(Frozen):
    """`ncalign demo`: align a real small model and measure what it gained."""

    model: str | None = Field(None, description="Model folder or hub id; default: SmolLM2-135M-Instruct from its package.")
    objective: Literal["mc_po", "nca", "info_nca", "dpo"] = Field("mc_po", description="The method.")
    output_dir: Path = Field(Path("runs/demo"), description="Run folder; an earlier demo in it is replaced.")
    online: bool = Field(False, description="Compare candidates sampled once with candidates sampled anew every ten steps.")
    fresh: bool = Field(False, description="Sample and score the candidates anew instead of using the shipped ones.")
    num_eval_prompts: int = Field(384, ge=128, description="Held-out prompts that both models answer.")
    seed: Seed = Field(0, description="Of the training.")


class LabConfig(Frozen):
    """`ncalign lab`: check the theory on policies small enough to enumerate."""

    experiment: Literal["theory"] = Field("theory", description="What to run; theory: each statement of the two papers.")
    output_dir: Path | None = Field(None, description="Folder for theory.json, the plots and theory.html; none: print alone.")


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

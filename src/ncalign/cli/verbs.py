"""What the command line can do: each verb's configuration, its work, and what is said when it is stopped.

Nothing here imports torch, transformers or pyarrow: each verb imports its work when it is run, so that help, usage errors
and ``--print-config`` answer at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from pydantic import BaseModel

from ncalign.adjust.config import AdjustConfig
from ncalign.audit.config import AuditConfig, CheckConfig
from ncalign.data.config import ConvertConfig
from ncalign.demo.config import DemoConfig
from ncalign.generation.config import GenerateConfig
from ncalign.judging.config import AnswerConfig, EvaluateConfig
from ncalign.lab.config import LabConfig
from ncalign.rewards.config import ScoreConfig

if TYPE_CHECKING:
    from ncalign.online.config import OnlineConfig
    from ncalign.training.config import TrainConfig

Config = TypeVar("Config", bound=BaseModel)
Result = Mapping[str, object]


@dataclass(frozen=True)
class Verb(Generic[Config]):
    """One verb of the command line.

    Attributes:
        name: the word that is typed.
        purpose: one line for the help.
        config: gives its configuration model, whose fields are its flags; called when the verb is run.
        example: a command line for the help.
        work: does it, and returns what is printed.
        when_interrupted: says what is kept and how to go on.
        plan: does what --dry-run asks for.
        as_json: what --json prints of the result.
        positional: fields that may be given as plain words, in this order.
        groups: titles in the help, each with the field at which it begins.
        aliases: other spellings of fields.
        exit_code: of a command that did its work.
    """

    name: str
    purpose: str
    config: Callable[[], type[Config]]
    example: str
    work: Callable[[Config], Result]
    when_interrupted: Callable[[Config], str]
    plan: Callable[[Config], Result] | None = None
    as_json: Callable[[Result], object] = lambda result: result
    positional: tuple[str, ...] = ()
    groups: tuple[tuple[str, str], ...] = ()
    aliases: tuple[tuple[str, str], ...] = ()
    exit_code: Callable[[Result], int] = lambda result: 0


def _train_config() -> type[TrainConfig]:
    # The methods' configurations lie beside their losses, which need torch.
    from ncalign.training.config import TrainConfig

    return TrainConfig


def _train(config: TrainConfig) -> Result:
    from ncalign.training.train import run_training

    return run_training(config)


def _plan_training(config: TrainConfig) -> Result:
    from ncalign.training.plan import dry_run

    return dry_run(config)


def _online_config() -> type[OnlineConfig]:
    from ncalign.online.config import OnlineConfig

    return OnlineConfig


def _online(config: OnlineConfig) -> Result:
    from ncalign.online.online import run_online, summary

    results = run_online(config)
    return {**results, "text": summary(results)}


def _after_online_stopped(config: OnlineConfig) -> str:
    if not (config.training.output_dir / "config.yaml").exists():
        return "nothing had been written; rerun to start again"
    return f"what {config.training.output_dir} holds is kept; rerun to go on from there"


def _after_training_stopped(config: TrainConfig) -> str:
    folder = config.output_dir / "checkpoints"
    if not (config.output_dir / "config.yaml").exists():
        return "nothing had been written; rerun to start again"
    if next(folder.glob("step-*/state.json"), None) is not None:
        return f"{folder} is kept; rerun with --resume to go on from the last checkpoint"
    if config.save_steps > 0:
        return "no checkpoint had been written yet; rerun with --overwrite to start again"
    return "no checkpoint was kept, because save_steps is 0; rerun with --overwrite, and --save_steps N to be able to resume"


def _convert(config: ConvertConfig) -> Result:
    from ncalign.data.formats.sources import is_folder_name
    from ncalign.data.groups import convert
    from ncalign.data.shards import convert_folder

    options: dict[str, Any] = {
        "schema": config.schema_name,
        "adapter": config.adapter,
        "target": config.target,
        "seed": config.seed,
        "on_bad_row": config.on_bad_row,
    }
    if is_folder_name(config.output):
        report = convert_folder(config.input, config.output, kind=config.shards, **options)
    else:
        report = convert(config.input, config.output, **options)
    text = "\n".join([f"{config.output}: {report.summary()}", *(f"  {example}" for example in report.examples)])
    return {"output": str(config.output), **asdict(report), "text": text}


def _audit(config: AuditConfig) -> Result:
    from ncalign.audit.audit import run_audit

    return run_audit(config)


def _check(config: CheckConfig) -> Result:
    from ncalign.audit.check import run_check

    return run_check(config)


def _generate(config: GenerateConfig) -> Result:
    from ncalign.generation.generate import run_generate

    return run_generate(config)


def _score(config: ScoreConfig) -> Result:
    from ncalign.rewards.score import run_score

    return run_score(config)


def _adjust(config: AdjustConfig) -> Result:
    from ncalign.adjust.adjust import run_adjust

    return run_adjust(config)


def _answer(config: AnswerConfig) -> Result:
    from ncalign.judging.answer import run_answer

    return run_answer(config)


def _after_answer_stopped(config: AnswerConfig) -> str:
    return f"{config.output} was not written; rerun to go on: the answers so far are kept"


def _evaluate(config: EvaluateConfig) -> Result:
    from ncalign.judging.evaluate import run_evaluate

    return run_evaluate(config)


def _after_evaluate_stopped(config: EvaluateConfig) -> str:
    return "answers, verdicts and finished tasks are kept; rerun to go on from there"


def _demo(config: DemoConfig) -> Result:
    from ncalign.demo.demo import run_demo
    from ncalign.demo.online_demo import run_online_demo

    return run_online_demo(config) if config.online else run_demo(config)


def _lab(config: LabConfig) -> Result:
    from ncalign.lab.theory import run_lab

    experiments = {"theory": run_lab}
    return experiments[config.experiment](config.output_dir)


def _after_convert_stopped(config: ConvertConfig) -> str:
    if (config.output / ".ncalign").is_dir():
        return f"the finished files of {config.output} are kept; rerun to go on"
    return _after_writing_stopped(config)


def _nothing_written(_config: BaseModel) -> str:
    return "nothing was written; rerun to start again"


def _after_writing_stopped(config: ConvertConfig | GenerateConfig | ScoreConfig | AdjustConfig) -> str:
    return f"{config.output} was not written, and what was there before is unchanged; rerun to start again"


def _after_demo_stopped(config: DemoConfig) -> str:
    return f"{config.output_dir} holds an unfinished demo; rerun to start again (the model stays in its cache)"


TRAINING_FIELDS = (
    ("model and data", "model"),
    ("encoding", "max_length"),
    ("method", "objective"),
    ("adapter", "lora"),
    ("reference and precision", "reference"),
    ("optimizer", "learning_rate"),
    ("batches and steps", "num_train_epochs"),
    ("run", "seed"),
)
TRAIN = Verb(
    "train",
    "align a model from groups of scored candidates",
    _train_config,
    "ncalign train --config run.yaml --learning_rate 1e-5 --objective nca --objective.beta 0.2 --lora.r 8",
    _train,
    _after_training_stopped,
    plan=_plan_training,
    groups=TRAINING_FIELDS,
)
ONLINE = Verb(
    "online",
    "regenerate and score candidates from the policy while it trains",
    _online_config,
    "ncalign online --config run.yaml --data prompts.jsonl --reward rewards.py:score --regenerate_every 50",
    _online,
    _after_online_stopped,
    groups=(
        *TRAINING_FIELDS,
        ("rounds", "reference_decay"),
        ("rewards", "reward"),
        ("sampling", "generator"),
        ("schedule over rounds", "learning_rate_over"),
    ),
)
CONVERT = Verb(
    "convert",
    "convert data of any supported schema to groups in JSONL or Parquet",
    lambda: ConvertConfig,
    "ncalign convert pairs.parquet groups.jsonl --on_bad_row skip",
    _convert,
    _after_convert_stopped,
    positional=("input", "output"),
    aliases=(("from", "schema_name"), ("to", "target")),
)
CHECK = Verb(
    "check",
    "check data as training will see it, and list what to fix",
    lambda: CheckConfig,
    "ncalign check groups.jsonl --model my-model --against eval.jsonl",
    _check,
    lambda config: "check writes nothing; rerun to start again",
    positional=("data",),
    aliases=(("from", "schema_name"),),
    exit_code=lambda result: 0 if result["ready"] else 1,
)
AUDIT = Verb(
    "audit",
    "describe a set of scored candidates, and suggest a method",
    lambda: AuditConfig,
    "ncalign audit groups.jsonl --output_dir runs/audit",
    _audit,
    _nothing_written,
    positional=("data",),
    aliases=(("from", "schema_name"),),
)
GENERATE = Verb(
    "generate",
    "sample K candidate completions for each prompt",
    lambda: GenerateConfig,
    "ncalign generate --model my-model --prompts prompts.jsonl --output candidates.jsonl --num_samples 8",
    _generate,
    _after_writing_stopped,
)
SCORE = Verb(
    "score",
    "fill in the candidates' rewards",
    lambda: ScoreConfig,
    "ncalign score --data candidates.jsonl --output scored.jsonl --reward rewards.py:length",
    _score,
    _after_writing_stopped,
)
ADJUST = Verb(
    "adjust",
    "transform rewards: z-scores, ranks, clipping, length-bias removal, weighted aspects, merging",
    lambda: AdjustConfig,
    "ncalign adjust scored.jsonl adjusted.jsonl --steps clip:-3:3 length zscore",
    _adjust,
    _after_writing_stopped,
    positional=("input", "output"),
    aliases=(("from", "schema_name"),),
)
ANSWER = Verb(
    "answer",
    "write a model's answers to a question set, for any judge",
    lambda: AnswerConfig,
    "ncalign answer --model my-model --set mt-bench --set_file question.jsonl --output answers.jsonl",
    _answer,
    _after_answer_stopped,
    aliases=(("set", "set_name"),),
)
EVALUATE = Verb(
    "evaluate",
    "measure a model: win rates by a judge, ratings, or reasoning tasks",
    lambda: EvaluateConfig,
    "ncalign evaluate --model my-model --against my-sft-model",
    _evaluate,
    _after_evaluate_stopped,
    groups=(
        ("models and questions", "model"),
        ("the judge", "judge"),
        ("answers", "max_new_tokens"),
        ("reasoning tasks", "tasks"),
        ("all", "num_resamples"),
    ),
    aliases=(("set", "set_name"),),
)
DEMO = Verb(
    "demo",
    "align a real small model and measure what it gained",
    lambda: DemoConfig,
    "ncalign demo --objective nca",
    _demo,
    _after_demo_stopped,
)
LAB = Verb(
    "lab",
    "check the theory on policies small enough to enumerate",
    lambda: LabConfig,
    "ncalign lab theory --output_dir runs/theory",
    _lab,
    _nothing_written,
    as_json=lambda result: result["statements"],
    positional=("experiment",),
)
VERBS: tuple[Verb[Any], ...] = (DEMO, TRAIN, ONLINE, CONVERT, CHECK, AUDIT, GENERATE, SCORE, ADJUST, ANSWER, EVALUATE, LAB)

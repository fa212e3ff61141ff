"""What the command line can do: each verb's configuration, its work, and what is said when it is interrupted.

Configurations and work are named as ``module:name`` and imported when a verb is run: help, usage errors and
``--print-config`` answer before torch, transformers or pyarrow are loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from ncalign.core.outputs import claim

if TYPE_CHECKING:
    from ncalign.adjust.config import AdjustConfig
    from ncalign.data.config import ConvertConfig
    from ncalign.demo.config import DemoConfig
    from ncalign.generation.config import GenerateConfig
    from ncalign.lab.config import LabConfig
    from ncalign.online.config import OnlineConfig
    from ncalign.rewards.config import ScoreConfig
    from ncalign.study.config import StudyConfig
    from ncalign.training.config import TrainConfig

Result = Mapping[str, object]
Work = Callable[[Any], Result]
"""Takes a verb's configuration and returns what is printed."""


def resolve(name: str) -> Any:
    """Import what ``module:name`` names."""
    module, _, attribute = name.partition(":")
    return getattr(import_module(module), attribute)


@dataclass(frozen=True)
class Verb:
    """One verb of the command line.

    Attributes:
        name: the word that is typed.
        purpose: one line for the help.
        model: its configuration model, as ``module:name``.
        example: a command line for the help.
        work: the function that does it, or its ``module:name``.
        interrupted: what is kept and how to go on, or a function of the configuration that says so.
        plan: ``module:name`` of the function that does what --dry-run asks for.
        as_json: what --json prints of the result.
        positional: fields that may be given as plain words, in this order; a last one that is a list takes all that are left.
        groups: titles in the help, each with the field at which it begins.
        aliases: other spellings of fields.
        exit_code: of a command that did its work.
    """

    name: str
    purpose: str
    model: str
    example: str
    work: str | Work
    interrupted: str | Callable[[Any], str]
    plan: str | None = None
    as_json: Callable[[Result], object] = lambda result: result
    positional: tuple[str, ...] = ()
    groups: tuple[tuple[str, str], ...] = ()
    aliases: tuple[tuple[str, str], ...] = ()
    exit_code: Callable[[Result], int] = lambda result: 0

    def config(self) -> type[BaseModel]:
        """Its configuration model, whose fields are its flags."""
        model: type[BaseModel] = resolve(self.model)
        return model

    def run(self, config: BaseModel, *, dry_run: bool) -> Result:
        """Do the work, or what --dry-run asks for."""
        work: str | Work = self.plan if dry_run and self.plan is not None else self.work
        function: Work = resolve(work) if isinstance(work, str) else work
        return function(config)

    def when_interrupted(self, config: BaseModel) -> str:
        """What is kept and how to go on."""
        return self.interrupted if isinstance(self.interrupted, str) else self.interrupted(config)


def _online(config: OnlineConfig) -> Result:
    from ncalign.online.online import run_online, summary

    results = run_online(config)
    return {**results, "text": summary(results)}


def _convert(config: ConvertConfig) -> Result:
    from ncalign.data.formats.sources import is_folder_name
    from ncalign.data.groups import convert
    from ncalign.data.shards import Recipe, convert_folder

    options: dict[str, Any] = {
        "schema": config.schema_name,
        "adapter": config.adapter,
        "target": config.target,
        "seed": config.seed,
        "on_bad_row": config.on_bad_row,
        "join_rows": config.join_rows,
    }
    if is_folder_name(config.output):
        report = convert_folder(config.input, config.output, Recipe(kind=config.shards, **options), overwrite=config.overwrite)
    else:
        inputs = {"input": config.input, "adapter": config.adapter}
        claim(config.output, verb="convert", inputs=inputs, overwrite=config.overwrite)
        report = convert(config.input, config.output, **options)
    lines = [f"{config.output}: {report.summary()}", *(f"  {line}" for line in (*report.examples, *report.counted_notes()))]
    return {"output": str(config.output), **asdict(report), "text": "\n".join(lines)}


def _demo(config: DemoConfig) -> Result:
    from ncalign.demo.demo import run_demo
    from ncalign.demo.online_demo import run_online_demo

    return run_online_demo(config) if config.online else run_demo(config)


def _lab(config: LabConfig) -> Result:
    from ncalign.lab.theory import run_lab

    return {"theory": run_lab}[config.experiment](config.output_dir, overwrite=config.overwrite)


def _study(config: StudyConfig) -> Result:
    from ncalign.cli import settings
    from ncalign.study.study import run_study

    return run_study(config, load=settings.load)


def _plan_study(config: StudyConfig) -> Result:
    from ncalign.cli import settings
    from ncalign.study.study import plan_study

    return plan_study(config, load=settings.load)


def _after_training_stopped(config: TrainConfig) -> str:
    folder = config.output_dir / "checkpoints"
    if not (config.output_dir / "config.yaml").exists():
        return "nothing had been written; rerun to start again"
    if next(folder.glob("step-*/state.json"), None) is not None:
        return f"{folder} is kept; rerun with --resume to go on from the last checkpoint"
    if config.save_steps > 0:
        return "no checkpoint had been written yet; rerun with --overwrite to start again"
    return "no checkpoint was kept, because save_steps is 0; rerun with --overwrite, and --save_steps N to be able to resume"


def _after_online_stopped(config: OnlineConfig) -> str:
    if not (config.training.output_dir / "config.yaml").exists():
        return "nothing had been written; rerun to start again"
    return f"what {config.training.output_dir} holds is kept; rerun to go on from there"


def _after_convert_stopped(config: ConvertConfig) -> str:
    if (config.output / ".ncalign").is_dir():
        return f"the finished files of {config.output} are kept; rerun to go on"
    return _after_writing_stopped(config)


def _after_writing_stopped(config: ConvertConfig | GenerateConfig | ScoreConfig | AdjustConfig) -> str:
    return f"{config.output} was not written, and what was there before is unchanged; rerun to start again"


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
    "ncalign.training.config:TrainConfig",
    "ncalign train --config run.yaml --learning_rate 1e-5 --objective nca --objective.beta 0.2 --lora.r 8",
    "ncalign.training.train:run_training",
    _after_training_stopped,
    plan="ncalign.training.plan:dry_run",
    groups=TRAINING_FIELDS,
    aliases=(("from", "schema_name"),),
)
ONLINE = Verb(
    "online",
    "regenerate and score candidates from the policy while it trains",
    "ncalign.online.config:OnlineConfig",
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
    "ncalign.data.config:ConvertConfig",
    "ncalign convert pairs.parquet groups.jsonl --on_bad_row skip",
    _convert,
    _after_convert_stopped,
    positional=("input", "output"),
    aliases=(("from", "schema_name"), ("to", "target")),
)
CHECK = Verb(
    "check",
    "check data as training will see it, and list what to fix",
    "ncalign.audit.config:CheckConfig",
    "ncalign check groups.jsonl --model my-model --against eval.jsonl",
    "ncalign.audit.check:run_check",
    "check writes nothing; rerun to start again",
    positional=("data",),
    aliases=(("from", "schema_name"),),
    exit_code=lambda result: 0 if result["ready"] else 1,
)
AUDIT = Verb(
    "audit",
    "describe a set of scored candidates, and suggest a method",
    "ncalign.audit.config:AuditConfig",
    "ncalign audit groups.jsonl --output_dir runs/audit",
    "ncalign.audit.audit:run_audit",
    "nothing was written; rerun to start again",
    positional=("data",),
    aliases=(("from", "schema_name"),),
)
VIEW = Verb(
    "view",
    "browse candidates: filter, search and sort them in a page or, if there are many, from a local server",
    "ncalign.view.config:ViewConfig",
    "ncalign view groups.jsonl --output groups.html",
    "ncalign.view.view:run_view",
    "a page or an index that was begun was not written, and a finished index is kept; rerun to start again",
    as_json=lambda result: {name: value for name, value in result.items() if name != "text"},
    positional=("data",),
    aliases=(("from", "schema_name"),),
)
GENERATE = Verb(
    "generate",
    "sample K candidate completions for each prompt",
    "ncalign.generation.config:GenerateConfig",
    "ncalign generate --model my-model --prompts prompts.jsonl --output candidates.jsonl --num_samples 8",
    "ncalign.generation.generate:run_generate",
    _after_writing_stopped,
)
SCORE = Verb(
    "score",
    "fill in the candidates' rewards",
    "ncalign.rewards.config:ScoreConfig",
    "ncalign score --data candidates.jsonl --output scored.jsonl --reward rewards.py:length",
    "ncalign.rewards.score:run_score",
    _after_writing_stopped,
)
ADJUST = Verb(
    "adjust",
    "transform rewards: z-scores, ranks, clipping, length-bias removal, weighted aspects, merging",
    "ncalign.adjust.config:AdjustConfig",
    "ncalign adjust scored.jsonl adjusted.jsonl --steps clip:-3:3 length zscore",
    "ncalign.adjust.adjust:run_adjust",
    _after_writing_stopped,
    positional=("input", "output"),
    aliases=(("from", "schema_name"),),
)
ANSWER = Verb(
    "answer",
    "write a model's answers to a question set, for any judge",
    "ncalign.judging.config:AnswerConfig",
    "ncalign answer --model my-model --set mt-bench --set_file question.jsonl --output answers.jsonl",
    "ncalign.judging.answer:run_answer",
    lambda config: f"{config.output} was not written; rerun to go on: the answers so far are kept",
    aliases=(("set", "set_name"),),
)
EVALUATE = Verb(
    "evaluate",
    "measure a model: win rates by a judge, ratings, or reasoning tasks",
    "ncalign.judging.config:EvaluateConfig",
    "ncalign evaluate my-model my-sft-model",
    "ncalign.judging.evaluate:run_evaluate",
    "answers, verdicts and finished tasks are kept; rerun to go on from there",
    groups=(
        ("models and questions", "model"),
        ("the judge", "judge"),
        ("answers", "max_new_tokens"),
        ("reasoning tasks", "tasks"),
        ("all", "num_resamples"),
    ),
    positional=("model", "against"),
    aliases=(("set", "set_name"),),
)
DEMO = Verb(
    "demo",
    "align a real small model and measure what it gained",
    "ncalign.demo.config:DemoConfig",
    "ncalign demo --objective nca",
    _demo,
    lambda config: f"{config.output_dir} holds an unfinished demo; rerun to start again (the model stays in its cache)",
)
STUDY = Verb(
    "study",
    "compare methods and settings over several seeds, with intervals and verdicts",
    "ncalign.study.config:StudyConfig",
    "ncalign study my-study.yaml --seeds 5 --workers 2",
    _study,
    "finished runs are kept; rerun to go on from there",
    plan="ncalign.cli.verbs:_plan_study",
    as_json=lambda result: {name: value for name, value in result.items() if name != "text"},
    positional=("study",),
    exit_code=lambda result: 1 if result.get("failed") else 0,
)
LAB = Verb(
    "lab",
    "check the theory on policies small enough to enumerate",
    "ncalign.lab.config:LabConfig",
    "ncalign lab theory --output_dir runs/theory",
    _lab,
    "nothing was written; rerun to start again",
    as_json=lambda result: result["statements"],
    positional=("experiment",),
)
REPORT = Verb(
    "report",
    "show a run as a page, or compare several on one",
    "ncalign.cli.config:ReportConfig",
    "ncalign report runs/nca runs/dpo runs/evaluation",
    "ncalign.cli.report:run_report",
    "the page was not written; rerun to start again",
    as_json=lambda result: {name: value for name, value in result.items() if name != "text"},
    positional=("runs",),
)
CHAT = Verb(
    "chat",
    "talk to a model, or to two at once",
    "ncalign.chat.config:ChatConfig",
    "ncalign chat runs/first --against my-model --temperature 0",
    "ncalign.chat.chat:run_chat",
    "the conversation is not kept",
    as_json=lambda result: {name: value for name, value in result.items() if name != "text"},
    positional=("model",),
)
MERGE = Verb(
    "merge",
    "write an adapter and its base model as one ordinary model folder",
    "ncalign.model.config:MergeConfig",
    "ncalign merge runs/first my-aligned-model --dtype bfloat16",
    "ncalign.model.merge:run_merge",
    lambda config: f"{config.output} was not written, and what was there before is unchanged; rerun to start again",
    as_json=lambda result: {name: value for name, value in result.items() if name != "text"},
    positional=("model", "output"),
)
PUSH = Verb(
    "push",
    "upload a model with a card to the Hugging Face hub",
    "ncalign.training.config:PushConfig",
    "ncalign push runs/first owner/my-model --evaluations runs/evaluate --dry-run",
    "ncalign.training.push:run_push",
    "what was uploaded by then is in no commit; rerun to start again",
    plan="ncalign.training.push:plan_push",
    as_json=lambda result: {name: value for name, value in result.items() if name != "text"},
    positional=("model", "repo"),
)
DOCTOR = Verb(
    "doctor",
    "show what is installed, what this machine has, and what is missing",
    "ncalign.cli.config:DoctorConfig",
    "ncalign doctor --json",
    "ncalign.cli.doctor:run_doctor",
    "doctor writes nothing; rerun to start again",
    as_json=lambda result: {name: value for name, value in result.items() if name != "text"},
    exit_code=lambda result: 1 if result["problems"] else 0,
)
COMPLETION = Verb(
    "completion",
    "print the script with which a shell completes verbs, flags and values",
    "ncalign.cli.config:CompletionConfig",
    "ncalign completion bash > ~/.local/share/bash-completion/completions/ncalign",
    "ncalign.cli.completion:run_completion",
    "nothing was printed; rerun to start again",
    as_json=lambda result: {name: value for name, value in result.items() if name != "text"},
    positional=("shell",),
)
VERBS: tuple[Verb, ...] = (
    *(DEMO, TRAIN, ONLINE, CONVERT, CHECK, AUDIT, GENERATE, SCORE, ADJUST, ANSWER, EVALUATE, STUDY, LAB),
    *(REPORT, VIEW, CHAT, MERGE, PUSH, DOCTOR, COMPLETION),
)

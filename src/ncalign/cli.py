"""The command line: parse, call one function, print what it returns.

Nothing here imports torch, transformers or pyarrow: each verb imports its work when it is run, so that help, usage errors
and ``--print-config`` answer at once.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from types import FrameType
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from pydantic import BaseModel

from ncalign import __version__, settings
from ncalign.config import (
    AdjustConfig,
    AuditConfig,
    CheckConfig,
    ConvertConfig,
    DemoConfig,
    GenerateConfig,
    LabConfig,
    ScoreConfig,
)
from ncalign.flags import Arguments, Layout, parse
from ncalign.settings import ConfigError

if TYPE_CHECKING:
    from ncalign.online_config import OnlineConfig
    from ncalign.training_config import TrainConfig

Config = TypeVar("Config", bound=BaseModel)
Result = Mapping[str, object]

DONE, FAILED, BAD_USAGE, INTERRUPTED, BROKEN_PIPE, TERMINATED = 0, 1, 2, 130, 141, 143


class Terminated(KeyboardInterrupt):
    """SIGTERM, raised where Ctrl-C would be, so that both leave the same things behind."""


# --- The verbs -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verb(Generic[Config]):
    """One verb: its configuration (loaded when it is run), its work, and what to say when it is interrupted."""

    name: str
    purpose: str
    config: Callable[[], type[Config]]
    example: str
    work: Callable[[Config], Result]
    when_interrupted: Callable[[Config], str]
    plan: Callable[[Config], Result] | None = None  # --dry-run
    as_json: Callable[[Result], object] = lambda result: result  # what --json prints
    positional: tuple[str, ...] = ()
    groups: tuple[tuple[str, str], ...] = ()
    aliases: tuple[tuple[str, str], ...] = ()
    exit_code: Callable[[Result], int] = lambda result: DONE

    @property
    def layout(self) -> Layout:
        """What its command line has besides the fields."""
        return Layout(
            self.name, self.purpose, self.example, self.positional, self.groups, self.aliases, dry_run=self.plan is not None
        )


def _train_config() -> type[TrainConfig]:
    # The methods' configurations lie beside their losses, which need torch.
    from ncalign.training_config import TrainConfig

    return TrainConfig


def _train(config: TrainConfig) -> Result:
    from ncalign.training import run_training

    return run_training(config)


def _plan_training(config: TrainConfig) -> Result:
    from ncalign.training import dry_run

    return dry_run(config)


def _online_config() -> type[OnlineConfig]:
    from ncalign.online_config import OnlineConfig

    return OnlineConfig


def _online(config: OnlineConfig) -> Result:
    from ncalign.online import run_online, summary

    results = run_online(config)
    return {**results, "text": summary(results)}


def _after_online_stopped(config: OnlineConfig) -> str:
    if not (config.output_dir / "config.yaml").exists():
        return "nothing had been written; rerun to start again"
    return f"what {config.output_dir} holds is kept; rerun to go on from there"


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
    from ncalign.formats.sources import is_folder_name
    from ncalign.groups import convert
    from ncalign.shards import convert_folder

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
    from ncalign.audit import run_audit

    return run_audit(config)


def _check(config: CheckConfig) -> Result:
    from ncalign.preflight import run_check

    return run_check(config)


def _after_check_stopped(config: CheckConfig) -> str:
    return "check writes nothing; rerun to start again"


def _after_audit_stopped(config: AuditConfig) -> str:
    return "nothing was written; rerun to start again"


def _generate(config: GenerateConfig) -> Result:
    from ncalign.generation import run_generate

    return run_generate(config)


def _score(config: ScoreConfig) -> Result:
    from ncalign.rewards import run_score

    return run_score(config)


def _adjust(config: AdjustConfig) -> Result:
    from ncalign.rewards import run_adjust

    return run_adjust(config)


def _demo(config: DemoConfig) -> Result:
    from ncalign.demo import run_demo, run_online_demo

    return run_online_demo(config) if config.online else run_demo(config)


def _lab(config: LabConfig) -> Result:
    from ncalign.lab import run_lab

    experiments = {"theory": run_lab}
    return experiments[config.experiment](config.output_dir)


def _after_lab_stopped(config: LabConfig) -> str:
    return "nothing was written; rerun to start again"


def _after_convert_stopped(config: ConvertConfig) -> str:
    if (config.output / ".ncalign").is_dir():
        return f"the finished files of {config.output} are kept; rerun to go on"
    return _after_writing_stopped(config)


def _after_writing_stopped(config: ConvertConfig | GenerateConfig | ScoreConfig | AdjustConfig) -> str:
    return f"{config.output} was not written, and what was there before is unchanged; rerun to start again"


def _after_demo_stopped(config: DemoConfig) -> str:
    return f"what {config.output_dir} holds is not a whole demo; rerun to start again (the model stays in its cache)"


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
    groups=(*TRAINING_FIELDS, ("rounds", "reference_decay"), ("rewards", "reward"), ("sampling", "num_samples")),
)
CONVERT = Verb(
    "convert",
    "any schema we read → groups in JSONL or Parquet",
    lambda: ConvertConfig,
    "ncalign convert pairs.parquet groups.jsonl --on_bad_row skip",
    _convert,
    _after_convert_stopped,
    positional=("input", "output"),
    aliases=(("from", "schema_name"), ("to", "target")),
)
CHECK = Verb(
    "check",
    "look at data as training will see them, and say what to mend",
    lambda: CheckConfig,
    "ncalign check groups.jsonl --model my-model --against eval.jsonl",
    _check,
    _after_check_stopped,
    positional=("data",),
    aliases=(("from", "schema_name"),),
    exit_code=lambda result: DONE if result["ready"] else FAILED,
)
AUDIT = Verb(
    "audit",
    "what a set of scored candidates is like, and which method suits it",
    lambda: AuditConfig,
    "ncalign audit groups.jsonl --output_dir runs/audit",
    _audit,
    _after_audit_stopped,
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
    "z-scores, ranks, clipping, length-bias removal, weighted aspects, several sources: rewards made anew",
    lambda: AdjustConfig,
    "ncalign adjust scored.jsonl adjusted.jsonl --steps clip:-3:3 length zscore",
    _adjust,
    _after_writing_stopped,
    positional=("input", "output"),
    aliases=(("from", "schema_name"),),
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
    _after_lab_stopped,
    as_json=lambda result: result["statements"],
    positional=("experiment",),
)
VERBS: tuple[Verb[Any], ...] = (DEMO, TRAIN, ONLINE, CONVERT, CHECK, AUDIT, GENERATE, SCORE, ADJUST, LAB)

_HELP = """usage: ncalign VERB [--config FILE] [--FIELD VALUE ...]

Align language models from prompts with K scored candidate completions.

verbs:
{verbs}

options:
  --help     this text; 'ncalign VERB --help' lists the fields of a verb
  --version  the version

exit codes: 0 done, 1 failed, 2 bad usage or configuration, 130 interrupted
"""


def _configure(model: type[Config], arguments: Arguments) -> Config:
    """Load the configuration; problems of the command line and of the values are reported together."""
    try:
        config = settings.load(model, arguments.config, arguments.flags, guessed=arguments.guessed)
    except ConfigError as error:
        raise ConfigError([*arguments.problems, *error.problems]) from None
    if arguments.problems:
        raise ConfigError(arguments.problems)
    return config


# --- Running ---------------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0 done, 1 failed, 2 bad usage, 130 Ctrl-C, 143 SIGTERM.

    Args:
        argv: Arguments after the program's name; default: those of this process.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        with _sigterm_interrupts():
            code = _dispatch(arguments)
        sys.stdout.flush()
    except ConfigError as error:
        _tell(_listed(error.problems))
        return BAD_USAGE
    except BrokenPipeError:
        # The reader (head, less) has gone: nothing more to say, also not when Python flushes stdout at its end.
        _drop_stdout()
        return BROKEN_PIPE
    except OSError as error:
        _drop_stdout()
        _tell(f"error: can't write to standard output: {_worded(error)}")
        return FAILED
    except KeyboardInterrupt as stop:
        _tell("interrupted")
        return TERMINATED if isinstance(stop, Terminated) else INTERRUPTED
    return code


def _drop_stdout() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _dispatch(arguments: list[str]) -> int:
    first = arguments[0] if arguments else ""
    if first in ("-h", "--help"):
        print(_overview(), end="")
        return DONE
    if first == "--version":
        print(f"ncalign {__version__}")
        return DONE
    names = [verb.name for verb in VERBS]
    if not first:
        raise ConfigError([f"no verb given; needed is one of {', '.join(names)} (see ncalign --help)"])
    if first.startswith("-"):
        raise ConfigError([f"unknown flag '{first}' before the verb; write ncalign VERB [--FIELD VALUE ...]"])
    verb = next((verb for verb in VERBS if verb.name == first), None)
    if verb is None:
        guess = settings.nearest(first, names)
        hint = f"did you mean '{guess}'?" if guess else f"must be one of {', '.join(names)}"
        raise ConfigError([f"unknown verb '{first}'; {hint}"])
    return _run(verb, arguments[1:])


def _overview() -> str:
    return _HELP.format(verbs="\n".join(f"  {verb.name:<10} {verb.purpose}" for verb in VERBS))


def _run(verb: Verb[Config], rest: Sequence[str]) -> int:
    model = verb.config()
    arguments = parse(model, verb.layout, rest)
    if arguments.help is not None:
        _show(arguments.help)
        return DONE
    config = _configure(model, arguments)
    if arguments.print_config:
        _show(settings.to_yaml(config))
        return DONE
    work = verb.plan if arguments.dry_run and verb.plan is not None else verb.work
    try:
        # stdout is for the result alone: what libraries print on the way goes where progress goes.
        with contextlib.redirect_stdout(sys.stderr), _thread_failures_are_lines():
            result = work(config)
    except KeyboardInterrupt as stop:
        _tell(f"interrupted; {verb.when_interrupted(config)}")
        return TERMINATED if isinstance(stop, Terminated) else INTERRUPTED
    except ConfigError:
        raise
    except (NotImplementedError, RecursionError):
        return _failed_by_a_bug()
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        if arguments.debug:
            traceback.print_exc()
        _tell(f"error: {_worded(error)}", every_rank=True)
        return FAILED
    except Exception:
        return _failed_by_a_bug()
    _show(_as_json(verb.as_json(result)) if arguments.json else _summary(result))
    return verb.exit_code(result)


def _failed_by_a_bug() -> int:
    traceback.print_exc()
    _tell("error: this is a bug in ncalign; please report it with the command and the lines above", every_rank=True)
    return FAILED


def _thread_failed(arguments: threading.ExceptHookArgs) -> None:
    """A library's writer thread that meets a full disk gets a line; what it means for the work, the work says."""
    if isinstance(arguments.exc_value, OSError):
        name = arguments.thread.name if arguments.thread is not None else "a thread"
        _tell(f"warning: a library failed in the background ({name}): {_worded(arguments.exc_value)}")
    else:
        threading.__excepthook__(arguments)


@contextlib.contextmanager
def _thread_failures_are_lines() -> Iterator[None]:
    before, threading.excepthook = threading.excepthook, _thread_failed
    try:
        yield
    finally:
        threading.excepthook = before


@contextlib.contextmanager
def _sigterm_interrupts() -> Iterator[None]:
    def stop(_number: int, _frame: FrameType | None) -> None:
        raise Terminated

    # Only the main thread may set handlers; elsewhere (a notebook's worker) SIGTERM stays what it was.
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _is_first_rank() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _show(text: str) -> None:
    """Write to stdout, once however many processes there are."""
    if _is_first_rank():
        print(text.rstrip("\n"))


def _tell(message: str, *, every_rank: bool = False) -> None:
    """Write to stderr: from the first process of a torchrun, or from each under its rank (a failure may be one's own)."""
    if _is_first_rank():
        print(message, file=sys.stderr)
    elif every_rank:
        print(f"[rank {os.environ['RANK']}] {message}", file=sys.stderr)


def _listed(problems: Sequence[str]) -> str:
    if len(problems) == 1:
        return f"error: {problems[0]}"
    return "\n  ".join([f"error: {len(problems)} problems", *problems])


def _worded(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"
    return str(error) or type(error).__name__


def _as_json(value: object) -> str:
    return json.dumps(_finite(value), ensure_ascii=False, allow_nan=False)


def _finite(value: object) -> object:
    """Replace NaN and infinities, which JSON doesn't have, by null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(inner) for key, inner in value.items()}
    return [_finite(inner) for inner in value] if isinstance(value, list | tuple) else value


def _summary(result: Result) -> str:
    """Return the result's own text, or a line for each thing in it."""
    text = result.get("text")
    return text.rstrip("\n") if isinstance(text, str) else "\n".join(_lines(result))


def _lines(result: Mapping[Any, object], indent: str = "") -> Iterator[str]:
    for key, value in result.items():
        if isinstance(value, Mapping) and value:
            yield f"{indent}{key}:"
            yield from _lines(value, indent + "  ")
        elif isinstance(value, float):
            yield f"{indent}{key}: {value:.6g}"
        elif isinstance(value, Mapping | list | tuple):
            yield f"{indent}{key}: {_as_json(value)}"
        else:
            yield f"{indent}{key}: {'none' if value is None else value}"

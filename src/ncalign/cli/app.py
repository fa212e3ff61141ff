"""The command line: parse, call one function, print what it returns.

Nothing here imports torch, transformers or pyarrow, so that help, usage errors and ``--print-config`` answer at once.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import json
import os
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from types import FrameType
from typing import Any

from pydantic import BaseModel

from ncalign import __version__
from ncalign.cli import other_names, settings
from ncalign.cli.failures import failure
from ncalign.cli.flags import Arguments, parse
from ncalign.cli.verbs import VERBS, Result, Verb
from ncalign.core.errors import ConfigError
from ncalign.core.json import json_ready
from ncalign.core.terminal import ReaderGoneError, visible, visible_json, visible_output, visible_trace

DONE, FAILED, BAD_USAGE, INTERRUPTED, BROKEN_PIPE, TERMINATED = 0, 1, 2, 130, 141, 143

# A process that is told to end ends at once: a last look for garbage in all that torch brings takes seconds on a busy machine.
atexit.register(gc.freeze)


class Terminated(KeyboardInterrupt):
    """SIGTERM, raised where Ctrl-C would be, so that both leave the same things behind."""


_HELP = """usage: ncalign VERB [--config FILE] [--FIELD VALUE ...]

Align language models from prompts with K scored candidate completions.

verbs:
{verbs}

options:
  --help     this text; 'ncalign VERB --help' lists the fields of a verb
  --version  the version

exit codes: 0 done, 1 failed, 2 bad usage or configuration, 130 interrupted
"""


def _configure(model: type[BaseModel], arguments: Arguments) -> BaseModel:
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
        return _failed(arguments, error.problems, BAD_USAGE)
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
        return _failed(arguments, ["interrupted"], TERMINATED if isinstance(stop, Terminated) else INTERRUPTED)
    return code


def _failed(arguments: Sequence[str], problems: Sequence[str], code: int, error: BaseException | None = None) -> int:
    """Print the failure as the one object that ``--json`` promises; returns the exit code."""
    if "--json" in arguments:
        named = error.filename if isinstance(error, OSError) else None
        verb = next((verb.name for verb in VERBS if verb.name == arguments[0]), None)
        found = failure(verb, problems, code=code, where=None if named is None else str(named))
        with contextlib.suppress(BrokenPipeError):
            _show(_as_json(found))
            sys.stdout.flush()
    return code


def _drop_stdout() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _dispatch(arguments: list[str]) -> int:
    first = arguments[0] if arguments else ""
    if first in ("-h", "--help"):
        print(_HELP.format(verbs="\n".join(f"  {verb.name:<10} {verb.purpose}" for verb in VERBS)), end="")
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
        theirs = other_names.verbs().get(first)
        advice = f"did you mean '{theirs}'?" if theirs else settings.hint(first, names)
        raise ConfigError([f"unknown verb '{first}'; {advice}"])
    return _run(verb, arguments)


def _run(verb: Verb, words: Sequence[str]) -> int:
    arguments = parse(verb, words[1:])
    if arguments.help is not None:
        _show(arguments.help)
        return DONE
    config = _configure(verb.config(), arguments)
    if arguments.print_config:
        _show(settings.to_yaml(config))
        return DONE
    try:
        # stdout is for the result alone: what libraries print on the way goes where progress goes.
        talk_to = sys.stderr if arguments.json else sys.stdout
        with visible_output(sys.stderr, talk_to), _thread_failures_are_lines():
            result = verb.run(config, dry_run=arguments.dry_run)
    except KeyboardInterrupt as stop:
        kept = f"interrupted; {verb.when_interrupted(config)}"
        _tell(kept)
        return _failed(words, [kept], TERMINATED if isinstance(stop, Terminated) else INTERRUPTED)
    except (ConfigError, ReaderGoneError):
        raise
    except (NotImplementedError, RecursionError) as error:
        return _failed_by_a_bug(error, words)
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        if arguments.debug:
            print(visible_trace(error), file=sys.stderr, end="")
        _tell(f"error: {_worded(error)}", every_rank=True)
        return _failed(words, [_worded(error)], FAILED, error)
    except Exception as error:
        return _failed_by_a_bug(error, words)
    shown = _as_json(verb.as_json(result)) if arguments.json else _summary(result)
    # A verb that talks has said all there is.
    if shown:
        _show(shown)
    return verb.exit_code(result)


def _failed_by_a_bug(error: BaseException, words: Sequence[str]) -> int:
    print(visible_trace(error), file=sys.stderr, end="")
    _tell("error: this is a bug in ncalign; please report it with the command and the lines above", every_rank=True)
    found = f"{type(error).__name__}: {_worded(error)}"
    return _failed(words, [f"{found}; this is a bug in ncalign; report it with the command and what is on stderr"], FAILED)


def _thread_failed(arguments: threading.ExceptHookArgs) -> None:
    """A library's writer thread that meets a full disk gets a line; what it means for the work, the work says."""
    if isinstance(arguments.exc_value, OSError):
        name = arguments.thread.name if arguments.thread is not None else "a thread"
        _tell(f"warning: a library failed in the background ({name}): {_worded(arguments.exc_value)}")
    elif arguments.exc_value is not None and not isinstance(arguments.exc_value, SystemExit):
        print(visible_trace(arguments.exc_value), file=sys.stderr, end="")


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
        print(visible(text.rstrip("\n")))


def _tell(message: str, *, every_rank: bool = False) -> None:
    """Write to stderr: from the first process of a torchrun, or from each under its rank (a failure may be one's own)."""
    message = visible(message)
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
    return visible_json(json.dumps(json_ready(value), ensure_ascii=False, allow_nan=False))


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

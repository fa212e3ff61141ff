"""Two processes on one machine (gloo): an online run under DDP and FSDP2 is that of one process, and goes on after kills."""

from __future__ import annotations

import json
import math
import random
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from torch.distributed import DistNetworkError

from conftest import relative_distance, weights
from kill_runs import Commands, Done
from ncalign.training.config import TrainConfig
from ncalign.training.launch import make_accelerator
from online_runs import outcome, settings, words_of, write_inputs

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are forked")
NUM_KILLS = 24
KINDS = ["replicated", "sharded"]
Launch = Callable[..., Done]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The inputs of all runs."""
    found = tmp_path_factory.mktemp("online")
    write_inputs(found)
    return found


@pytest.fixture(scope="module")
def launch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launch]:
    """``launch(fields, processes=2, kind="replicated", …)`` runs `ncalign online`."""
    paths, opened = str(Path(__file__).parent), dict[str, Commands]()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", paths, prepend=":")

        def start(fields: dict[str, Any], *, processes: int = 2, kind: str = "replicated", **wish: Any) -> Done:
            # Two kinds of processes: patched and not.
            if kind not in opened:
                modules = ["sharded_online"] if kind == "sharded" else []
                opened[kind] = Commands(tmp_path_factory.mktemp(kind) / "log", *modules)
            return opened[kind].run(["online", *words_of(fields)], processes=processes, **wish)

        yield start
    for commands in opened.values():
        commands.close()


def run_of(folder: Path, model: Path, name: str, *, processes: int = 2, **changes: Any) -> dict[str, Any]:
    """Fields of a run of 4 groups a step, of which each process has its share."""
    changes = {"per_device_train_batch_size": 4 // processes, "dtype": "float64", "scoring_dtype": "float64", **changes}
    return settings(folder, model, name, **changes)


def texts(run: Path) -> dict[str, Any]:
    """What was sampled, and its rewards."""
    files = sorted(path for path in run.glob("rounds/**/*") if path.name.startswith(("pool.", "scored-", "evaluation.")))
    return {str(path.relative_to(run)): path.read_bytes() for path in files}


def assert_same_run(alone: Path, together: Path) -> None:
    """Two float64 runs have the same pools to the byte, and agree otherwise up to the order of sums."""
    found = texts(alone)
    assert sum("pool.jsonl" in name for name in found) == len(list(alone.glob("rounds/*/round.json"))) > 1
    assert texts(together) == found
    assert relative_distance(weights(alone), weights(together)) <= 1e-12
    rows = [[json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in (alone, together)]
    for expected, other in zip(*rows, strict=True):
        for name in ("step", "round", "loss", "grad_norm", "logps/chosen"):
            assert other[name] == pytest.approx(expected[name], rel=1e-9, abs=1e-9)
    rounds = [[json.loads(path.read_text()) for path in sorted(run.glob("rounds/*/round.json"))] for run in (alone, together)]
    for expected, other in zip(*rounds, strict=True):
        assert other["drift"]["kl"] == pytest.approx(expected["drift"]["kl"], rel=1e-6, abs=1e-9)
        assert {**other, "drift": None, "seconds": None, "health": None} == {
            **expected,
            "drift": None,
            "seconds": None,
            "health": None,
        }
        assert other["health"] == pytest.approx(expected["health"], rel=1e-9)


CHANGES: dict[str, dict[str, Any]] = {
    "plain": {},
    "ema and drift": {"reference": "ema", "regenerate_on_drift": 0.02, "drift_steps": 1, "reference_decay": 0.5},
    "adapter": {"lora.r": 4, "objective": "kto", "objective.threshold": 0.1},
    "importance": {"objective": "nca", "on_model": "importance", "learning_rate_over": "round", "chunk_size": 64},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "name", ["plain", *(pytest.param(name, marks=pytest.mark.slow) for name in CHANGES if name != "plain")]
)
def test_two_processes_are_one(name: str, kind: str, folder: Path, launch: Launch, tiny_model_dir: Path) -> None:
    changes = CHANGES[name]
    alone = run_of(folder, tiny_model_dir, f"alone for {kind} {name}", processes=1, **changes)
    together = run_of(folder, tiny_model_dir, f"{kind} {name}", **changes)
    for fields, processes in ((alone, 1), (together, 2)):
        done = launch(fields, processes=processes, kind=kind if processes > 1 else "replicated")
        assert done.code == 0, done.said
    assert_same_run(alone["output_dir"], together["output_dir"])


@pytest.fixture(scope="module", params=KINDS)
def whole(
    request: pytest.FixtureRequest, folder: Path, launch: Launch, tiny_model_dir: Path
) -> tuple[str, dict[str, Any], float, dict[str, Any]]:
    """A kind of run that nothing disturbs: its name, fields and seconds, and what it came to."""
    kind = str(request.param)
    fields = run_of(folder, tiny_model_dir, f"whole, {kind}", dtype="float32", scoring_dtype="float32", reference="ema")
    done = launch(fields, kind=kind)
    assert done.code == 0, done.said
    return kind, fields, done.seconds, outcome(fields["output_dir"])


@pytest.mark.parametrize(
    "number", [number if number < 3 else pytest.param(number, marks=pytest.mark.slow) for number in range(NUM_KILLS // 2)]
)
def test_killed_and_resumed_is_bitwise_the_same(
    number: int, whole: tuple[str, dict[str, Any], float, dict[str, Any]], launch: Launch
) -> None:
    kind, undisturbed, seconds, expected = whole
    chance, victims = random.Random(f"{kind} {number}"), [[0], [1], None][number % 3]
    after = chance.uniform(0.1, 1.0) * seconds
    for attempt in range(8):
        # A run that is over before it is killed is killed sooner.
        place = undisturbed["output_dir"].with_name(f"killed {number}-{attempt}, {kind}")
        fields = {**undisturbed, "output_dir": place, "ddp_timeout": 60}
        # Of processes that have not met, none can be told of another's end: the run folder is made once they have.
        killed = launch(fields, kind=kind, kill_after=after * 0.7**attempt, victims=victims, begun=place)
        if killed.code != 0:
            break
    assert killed.code == -9, killed.said
    if victims is not None:
        # The other one ends by itself, long before the timeout, and says why.
        assert killed.seconds < seconds + 30
        assert "another process of this run has stopped; its own message says why" in killed.said
    # A second kill on the way, sooner or later.
    launch(fields, kind=kind, kill_after=chance.uniform(0.1, 1.0) * seconds)
    last = launch(fields, kind=kind)
    assert last.code == 0, last.said
    assert outcome(fields["output_dir"]) == expected


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (DistNetworkError("The client socket has timed out"), r"^the first process of this run is not reached at there:1: .*"),
        (DistNetworkError("recvValue: Connection reset by peer"), "^another process of this run has stopped"),
    ],
)
def test_a_process_that_can_not_join_says_so(
    error: Exception, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**_options: Any) -> None:
        raise error

    monkeypatch.setattr("ncalign.training.launch.Accelerator", refuse)
    monkeypatch.setenv("MASTER_ADDR", "there")
    monkeypatch.setenv("MASTER_PORT", "1")
    with pytest.raises(ValueError, match=message):
        make_accelerator(TrainConfig(model="m", data=tmp_path / "data", output_dir=tmp_path / "run", report_to=()))


@pytest.mark.slow
def test_a_first_process_that_is_not_there_is_told(folder: Path, launch: Launch, tiny_model_dir: Path) -> None:
    fields = run_of(folder, tiny_model_dir, "alone at the start", ddp_timeout=1)
    done = launch(fields, kill_after=0.0, victims=[0])
    assert done.code == -9
    assert "[rank 1] error: the first process of this run is not reached at 127.0.0.1:" in done.said


@pytest.mark.slow
def test_a_process_that_says_nothing_is_waited_for_no_longer_than_the_timeout(
    whole: tuple[str, dict[str, Any], float, dict[str, Any]], launch: Launch
) -> None:
    kind, undisturbed, seconds, _ = whole
    place = undisturbed["output_dir"].with_name(f"stopped, {kind}")
    fields = {**undisturbed, "output_dir": place, "ddp_timeout": 5, "max_steps": 60}
    stopped = launch(fields, kind=kind, kill_after=seconds, victims=[1], stop=True)
    assert stopped.code == -9
    assert stopped.seconds < 2 * seconds + 30
    assert "error: another process of this run has not answered within ddp_timeout" in stopped.said


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_resumed_on_another_number_of_processes(kind: str, folder: Path, launch: Launch, tiny_model_dir: Path) -> None:
    changes: dict[str, Any] = {"reference": "ema", "save_total_limit": 9}
    alone = run_of(folder, tiny_model_dir, f"alone, to resume {kind}", processes=1, **changes)
    together = run_of(folder, tiny_model_dir, f"resumed {kind}", **changes)
    for fields, processes in ((alone, 1), (together, 2)):
        done = launch(fields, processes=processes, kind=kind if processes > 1 else "replicated")
        assert done.code == 0, done.said
    run = together["output_dir"]
    # As it was after the third step of six, in the second round of three.
    (run / "results.json").unlink()
    (run / "rounds" / "evaluation.json").unlink()
    for gone in (run / "model", run / "rounds" / "002", *sorted((run / "checkpoints").iterdir())[3:]):
        shutil.rmtree(gone)
    (run / "rounds" / "001" / "round.json").unlink()
    done = launch(together, processes=1)
    assert done.code == 0, done.said
    assert "the run goes on with 4 groups in a step, as it began, now split over 1 process(es)" in done.said
    assert_same_run(alone["output_dir"], run)


@pytest.mark.slow
def test_sharded_weights_in_bfloat16_sample_as_they_train(folder: Path, launch: Launch, tiny_model_dir: Path) -> None:
    changes = {"dtype": "bfloat16", "scoring_dtype": "bfloat16", "probe_tolerance": 0.01, "objective": "dpo"}
    fields = run_of(folder, tiny_model_dir, "bfloat16", reference="last_round", **changes)
    # What is gathered for sampling is rounded as in training: the probe before each round finds them equal.
    done = launch(fields, kind="sharded")
    assert done.code == 0, done.said
    rows = [json.loads(line) for line in (fields["output_dir"] / "metrics.jsonl").read_text().splitlines()]
    assert [row["loss"] for row in rows][::2] == pytest.approx([math.log(2)] * 3, abs=0.01)

"""All weights sent to servers by vLLM's weight transfer, of which the tests have a stand-in: there is no GPU here."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from conftest import weights
from kill_runs import Commands
from ncalign.model.logprobs import LogprobModel
from ncalign.online import transfer
from ncalign.online.config import OnlineConfig
from ncalign.online.online import run_online
from ncalign.training.saved_weights import SavedWeights
from online_runs import settings, words_of, write_inputs
from server_double import serving
from test_moe import MODELS, moe_folder
from test_several_servers import Policy, nested, pools
from transfer_double import Group, put_in_place


class Receiver(Policy):
    """A server of vLLM that answers from its weights, and receives others; ``workers`` of them, which hold the same.

    ``told`` is what it was told, by path; ``refusal`` answers an order in its place.
    """

    def __init__(self, folder: Path, *, workers: int = 1) -> None:
        super().__init__(folder, 0.0)
        self.workers, self.version, self.paused, self.active = workers, "default", False, False
        self.start = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        self.groups: list[Group] = []
        self.told: list[str] = []
        self.infos: list[dict[str, Any]] = []
        self.refusal: Callable[[str], tuple[int, dict[str, Any]] | None] = lambda path: None

    @property
    def model(self) -> torch.nn.Module:
        return self._generator._model

    def start_anew(self) -> None:
        """As after a crash: with the weights that it was started with, and without a word of what it was told."""
        self.model.load_state_dict(self.start)
        self.version, self.paused, self.active, self.groups = "default", False, False, []

    def got(self, path: str) -> dict[str, Any]:
        return {"/get_world_size": {"world_size": self.workers}, "/weight_info": {"weight_version": self.version}}.get(path, {})

    def choices(self, path: str, body: dict[str, Any], n: int) -> list[dict[str, Any]]:
        assert not self.paused
        assert not self.active
        with self.lock:
            return super().choices(path, body, n)

    def ordered(self, path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        self.told.append(path)
        refusal = self.refusal(path)
        if refusal is not None:
            return refusal
        match path.partition("?")[0]:
            case "/init_weight_transfer_engine":
                self._join(body["init_info"])
            case "/pause":
                self.paused = True
            case "/resume":
                self.paused = False
            case "/start_weight_update":
                assert self.paused
                assert not self.active
                self.active = True
            case "/update_weights":
                assert self.active
                self._receive(body["update_info"])
            case "/finish_weight_update":
                self.active, self.version = False, body["weight_version"]
            case "/shutdown_weight_transfer_engine":
                assert not self.active
                self.groups = []
        return 200, {}

    def _join(self, info: dict[str, Any]) -> None:
        self.infos.append(info)
        ranks = range(info["rank_offset"], info["rank_offset"] + self.workers)
        with ThreadPoolExecutor(self.workers) as pool:
            place = (info["master_address"], info["master_port"])
            self.groups = list(pool.map(lambda rank: Group(*place, rank, info["world_size"]), ranks))

    def _receive(self, info: dict[str, Any]) -> None:
        own = self.model.state_dict()
        for group in self.groups:
            for name, dtype, shape in zip(info["names"], info["dtype_names"], info["shapes"], strict=True):
                tensor = group.receive()
                assert (tensor.dtype, list(tensor.shape)) == (getattr(torch, dtype), shape)
                own[name].copy_(tensor)
            group.received()


@pytest.fixture(autouse=True)
def _in_place(monkeypatch: pytest.MonkeyPatch, no_pauses: None) -> None:
    """The stand-in is found in vLLM's place, and nothing is waited for."""
    monkeypatch.setattr(transfer, "_DEVICE", transfer._DEVICE)
    monkeypatch.setitem(sys.modules, transfer._ENGINE, ModuleType("replaced"))
    put_in_place()
    monkeypatch.setattr("ncalign.generation.hosts.LOOK_EVERY", 0.05)


@pytest.fixture
def servers(tmp_path: Path, tiny_model_dir: Path) -> Iterator[tuple[list[Receiver], list[str]]]:
    """A server with two workers and one with one, and their URLs; and the inputs of a run."""
    write_inputs(tmp_path)
    found = [Receiver(tiny_model_dir, workers=2), Receiver(tiny_model_dir)]
    with ExitStack() as stack:
        yield found, [stack.enter_context(serving(double)) for double in found]


def fields_of(folder: Path, model: Path, name: str, urls: list[str], **changes: Any) -> dict[str, Any]:
    """A run that sends all weights, and whose servers report log-probs of the weights that they hold."""
    server = {"server.base_urls": tuple(urls), "server.model": "base", "server.max_concurrency": 2}
    # A step this long changes log-probs by far more than the probe allows.
    given = {"generator": "server", "push": "nccl", **server, "probe_tolerance": 1e-4, "learning_rate": 0.03}
    given |= {"max_steps": 4, "regenerate_at": (0.5,), "eval_fraction": 0.0}
    return settings(folder, model, name, **{**given, **changes})


def run(fields: dict[str, Any]) -> None:
    run_online(OnlineConfig.model_validate(nested(fields)))


def assert_holds(double: Receiver, run: Path) -> None:
    """A server has the weights that the run ended with."""
    final = weights(run)
    assert final.keys() == dict(double.model.named_parameters()).keys()
    assert all(torch.equal(double.model.state_dict()[name], tensor) for name, tensor in final.items())


LIFE = ["init_weight_transfer_engine", "pause?mode=wait", "start_weight_update", "update_weights", "finish_weight_update"]
LIFE = [f"/{name}" for name in (*LIFE, "shutdown_weight_transfer_engine", "reset_prefix_cache", "resume")]


def test_all_servers_get_each_round_s_weights(
    servers: tuple[list[Receiver], list[str]], tmp_path: Path, tiny_model_dir: Path
) -> None:
    (first, second), urls = servers
    run(fields_of(tmp_path, tiny_model_dir, "run", urls))
    assert len(pools(tmp_path / "run")) == 2
    for double in (first, second):
        # Two rounds, and the end.
        assert double.told == LIFE * 3
        assert_holds(double, tmp_path / "run")
        assert any("prompt" in body for _, body in double.requests)
    # The first process is rank 0 of 4, and no two workers have one rank.
    assert {(info["rank_offset"], info["world_size"]) for info in first.infos} == {(1, 4)}
    assert {(info["rank_offset"], info["world_size"]) for info in second.infos} == {(3, 4)}
    assert first.version == second.version
    assert first.version.startswith("run-rounds-")
    # Nothing was written for the servers to read.
    assert not list((tmp_path / "run" / "rounds").rglob("weights"))


@pytest.mark.skipif(sys.platform != "linux", reason="processes are forked")
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["replicated", "sharded"])
def test_two_processes_send_what_one_sends(
    kind: str,
    servers: tuple[list[Receiver], list[str]],
    tmp_path: Path,
    tiny_model_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=":")
    (first, second), urls = servers
    changes = {"dtype": "float64", "scoring_dtype": "float64", "probe_tolerance": 1e-5}
    for double in (first, second):
        double.model.double()
    commands = Commands(tmp_path / "log", "transfer_in_place", *(["sharded_online"] if kind == "sharded" else []))
    try:
        fields = fields_of(tmp_path, tiny_model_dir, "two", urls, per_device_train_batch_size=2, **changes)
        done = commands.run(["online", *words_of(fields)], processes=2)
        assert done.code == 0, done.said
    finally:
        commands.close()
    for double in (first, second):
        assert double.told == LIFE * 3
        assert_holds(double, tmp_path / "two")
        double.start_anew()
    run(fields_of(tmp_path, tiny_model_dir, "one", urls, per_device_train_batch_size=4, **changes))
    assert pools(tmp_path / "two") == pools(tmp_path / "one")


def restarting(double: Receiver, after: int) -> None:
    """Start a server anew, once, right before it gives the answer of this number, the probe's not counted."""
    count = 0

    def anew(body: dict[str, Any]) -> None:
        nonlocal count
        if body.get("max_tokens") == 6:
            count += 1
            if count == after:
                double.start_anew()

    double.fault_of = anew


def test_a_server_that_was_started_anew_is_not_asked_before_it_has_weights(
    servers: tuple[list[Receiver], list[str]], tmp_path: Path, tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (first, second), urls = servers
    # All but the first round's weights differ from those that a server is started with.
    fields = fields_of(tmp_path, tiny_model_dir, "run", urls)
    run({**fields, "output_dir": tmp_path / "whole"})
    asked = sum(body.get("max_tokens") == 6 for _, body in first.requests)
    for double in (first, second):
        double.start_anew()
        double.told.clear()
    restarting(first, max(2, asked // 2 + 2))
    run(fields)
    assert pools(tmp_path / "run") == pools(tmp_path / "whole")
    assert f"warning: server {urls[0]} has lost the weights of run-001-" in (said := capsys.readouterr().err)
    assert "what it was asked is asked elsewhere (1 of 2 are in service)" in said
    # At the end it gets weights as the other does.
    for double in (first, second):
        assert double.told == LIFE * 3
        assert_holds(double, tmp_path / "run")


@pytest.mark.slow
def test_a_run_whose_only_server_was_started_anew_stops_and_goes_on(
    servers: tuple[list[Receiver], list[str]], tmp_path: Path, tiny_model_dir: Path
) -> None:
    (first, _), urls = servers
    fields = fields_of(tmp_path, tiny_model_dir, "run", urls[:1])
    run({**fields, "output_dir": tmp_path / "whole"})
    first.start_anew()
    restarting(first, 8)
    with pytest.raises(RuntimeError, match=rf"server {urls[0]} has lost the weights of run-00\d-\w+: it was started anew"):
        run(fields)
    run(fields)
    assert pools(tmp_path / "run") == pools(tmp_path / "whole")
    assert_holds(first, tmp_path / "run")


def test_a_server_that_is_down_is_left_out_until_the_next_round(
    servers: tuple[list[Receiver], list[str]], tmp_path: Path, tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (first, second), urls = servers
    first.down = True

    def comes_back(body: dict[str, Any]) -> None:
        first.down = False

    second.fault_of = comes_back
    run(fields_of(tmp_path, tiny_model_dir, "run", urls))
    assert "(1 of 2 are in service)" in capsys.readouterr().err
    # Not in the first round, for all that it was healthy again.
    assert first.told == LIFE * 2
    assert second.told == LIFE * 3
    assert [info["world_size"] for info in second.infos] == [2, 4, 4]
    assert_holds(first, tmp_path / "run")


# --- What goes wrong --------------------------------------------------------------------------------------------------


REFUSALS = {
    "/init_weight_transfer_engine": r"status 500: Weight transfer not configured.*--weight-transfer-config",
    "/start_weight_update": "status 500: Weight transfer not configured.*: start the servers anew",
    "/update_weights": "status 500: Weight transfer not configured.*: start the servers anew",
    "/finish_weight_update": "status 500: Weight transfer not configured.*: start the servers anew",
}


@pytest.mark.parametrize("path", REFUSALS)
def test_a_server_that_refuses_is_named_at_once(
    path: str, servers: tuple[list[Receiver], list[str]], tmp_path: Path, tiny_model_dir: Path
) -> None:
    (_, second), urls = servers
    said = {"error": {"message": "Weight transfer not configured."}}
    second.refusal = lambda told: (500, said) if told == path else None
    # The stand-in waits for a minute for whoever does not come, and the run for two hours.
    with pytest.raises(ValueError, match=rf"^push: nccl: server {urls[1]}: {REFUSALS[path]}"):
        run(fields_of(tmp_path, tiny_model_dir, "run", urls))


def test_servers_that_receive_nothing_are_waited_for_no_longer_than_the_timeout(
    servers: tuple[list[Receiver], list[str]], tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (_, second), urls = servers
    monkeypatch.setattr(second, "_receive", lambda info: None)
    with pytest.raises(ValueError, match=r"^push: nccl: the servers have not taken the weights within ddp_timeout \(2 s\)"):
        run(fields_of(tmp_path, tiny_model_dir, "run", urls, ddp_timeout=2))


def test_a_server_without_the_way_in_is_told_how_to_start(
    servers: tuple[list[Receiver], list[str]], tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (_, second), urls = servers
    monkeypatch.setattr(second, "got", lambda path: {})
    with pytest.raises(ValueError, match=rf"server {urls[1]} does not say how many workers .* VLLM_SERVER_DEV_MODE=1"):
        run(fields_of(tmp_path, tiny_model_dir, "run", urls))


def test_without_vllm_or_a_gpu(
    servers: tuple[list[Receiver], list[str]], tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = fields_of(tmp_path, tiny_model_dir, "run", servers[1])
    monkeypatch.setitem(sys.modules, transfer._ENGINE, None)
    with pytest.raises(ValueError, match=r"needs the package vllm, 0\.32 or later.*pip install.*or set push: folder"):
        run(fields)
    monkeypatch.setattr(transfer, "_DEVICE", "cuda")
    with pytest.raises(ValueError, match="from GPU to GPU, and this process trains on cpu: set push: folder"):
        run(fields)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora.r": 2}, "lora trains an adapter: set push: lora"),
        ({"generator": "transformers", "server": None}, "generator is transformers: leave push out"),
        ({"generator": "vllm", "server": None}, "generator is vllm: set push: folder"),
    ],
)
def test_settings_that_do_not_go_with_it(changes: dict[str, Any], message: str, tmp_path: Path, tiny_model_dir: Path) -> None:
    fields = fields_of(tmp_path, tiny_model_dir, "run", ["http://localhost:1/v1"], **changes)
    if "server" in changes:
        fields = {name: value for name, value in fields.items() if not name.startswith("server.")}
    with pytest.raises(ValueError, match=message):
        OnlineConfig.model_validate(nested(fields))


def test_the_address_that_leads_to_the_servers(monkeypatch: pytest.MonkeyPatch) -> None:
    assert transfer._address_towards(["http://localhost:80/v1"]) == "127.0.0.1"
    monkeypatch.setenv(transfer.ADDRESS, "10.0.0.7")
    assert transfer._address_towards(["http://localhost:80/v1"]) == "10.0.0.7"
    # A block for documents: no machine has one of its addresses.
    with pytest.raises(ValueError, match=r"192\.0\.2\.1 is no address of this machine .*: name one in VLLM_HOST_IP"):
        transfer._free_port("192.0.2.1")


# --- Weights as files have them ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*MODELS, "llama"])
def test_weights_are_those_of_a_saved_folder(name: str, tmp_path: Path, tiny_model_dir: Path) -> None:
    folder = str(tiny_model_dir) if name == "llama" else moe_folder(name, tmp_path / "start")
    if name == "llama":
        given = AutoConfig.from_pretrained(folder)
        given.tie_word_embeddings = True
        model = AutoModelForCausalLM.from_config(given)
    else:
        model = AutoModelForCausalLM.from_pretrained(folder)
    accelerator = Accelerator(cpu=True)
    sent = SavedWeights(model, accelerator.prepare(LogprobModel(model)), accelerator.device)
    for _ in range(2):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.01)
        model.save_pretrained(tmp_path / "saved")
        files = load_file(tmp_path / "saved" / "model.safetensors")
        found = list(sent)
        assert [(one, tensor.dtype, tuple(tensor.shape)) for one, tensor in found] == sent.described
        assert len(found) == len(files)
        assert all(torch.equal(files[one], tensor) for one, tensor in found)
    assert ("lm_head.weight" in files) == (name != "llama")

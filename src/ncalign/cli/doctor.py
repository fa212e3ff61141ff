"""`ncalign doctor`: what is installed, what this machine has, and what ncalign makes of it.

Nothing in it names a folder, a user or the value of a variable that may hold a secret: it can be put into a report as it is.
"""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Iterator
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

from ncalign import __version__
from ncalign.cli.config import DoctorConfig
from ncalign.cli.verbs import Result
from ncalign.core.install import install_pattern

GIVES = {
    "demo": "the demonstration on a real model, reasoning-gym's verifiers, and the tiny model's tasks",
    "eval": "reasoning tasks by lm-eval, and length control and style control of win rates",
    "vllm": "candidates sampled by vLLM in the rounds of `online`",
    "server": "models and judges on OpenAI-compatible servers",
    "hub": "data sets by their hub id, and saved data sets",
    "audit": "near-copies and likeness by meaning in `check` and `audit`",
    "math": "the verifier `math_verify` of mathematical answers",
    "qlora": "weights in 4 bits under an adapter (`quantization`)",
    "ray": "studies whose runs are shared out over a Ray cluster",
    "gpu": "a faster vocabulary head on Hopper GPUs",
}
"""What each extra brings; `dev` is for working on ncalign itself."""
_VARIABLES = ("HF_HUB_OFFLINE", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "TOKENIZERS_PARALLELISM", "NCALIGN_DEBUG")
"""Variables that change what ncalign does, and hold no secret and no folder."""


def run_doctor(config: DoctorConfig) -> Result:
    """What is installed, what the machine has, what `dtype: auto` is here, and what each missing extra would give."""
    found: dict[str, Any] = {"ncalign": __version__, "python": platform.python_version(), "system": _system()}
    problems: list[str] = []
    found["packages"] = {name: entry for name, entry in _packages("")}
    for name, entry in found["packages"].items():
        if not entry["fits"]:
            there = f"version {entry['version']} is there" if entry["version"] else "it is not installed"
            problems.append(f"{name}{entry['needed']} is needed, and {there}: pip install '{name}{entry['needed']}'")
    found["processor"] = _processor()
    try:
        found |= _torch()
    # A build for another machine fails in ways of its own, often in loading a library.
    except (ImportError, OSError, RuntimeError) as error:
        problems.append(f"torch can't be loaded: {_without_folders(str(error))}")
    found["extras"] = {name: _extra(name, gives) for name, gives in GIVES.items()}
    found["environment"] = {name: os.environ[name] for name in _VARIABLES if name in os.environ}
    found["problems"] = problems
    return {**found, "text": "\n".join(_lines(found))}


def _without_folders(text: str) -> str:
    """A message with the last part of each path alone.

    >>> _without_folders("no /home/me/lib/libcudart.so here")
    'no libcudart.so here'
    """
    return re.sub(r"(?:/[^\s/:'\"]+)+/", "", text.split("\n", 1)[0])


def _system() -> str:
    return f"{platform.system()} {platform.release()} ({platform.machine()})"


def _needed(extra: str) -> Iterator[Requirement]:
    """What ncalign itself needs here, or what an extra of it does."""
    for line in requires("ncalign") or ():
        needed = Requirement(line)
        for_extra = needed.marker is not None and "extra" in str(needed.marker)
        if for_extra == bool(extra) and (needed.marker is None or needed.marker.evaluate({"extra": extra})):
            yield needed


def _packages(extra: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for needed in sorted(_needed(extra), key=lambda one: one.name):
        there = None
        with suppress(PackageNotFoundError):
            there = version(needed.name)
        fits = there is not None and needed.specifier.contains(there, prereleases=True)
        yield needed.name, {"version": there, "needed": str(needed.specifier), "fits": fits}


def _extra(name: str, gives: str) -> dict[str, Any]:
    packages = dict(_packages(name))
    missing = [f"{package}{entry['needed']}" for package, entry in packages.items() if not entry["fits"]]
    known = name in (metadata("ncalign").get_all("Provides-Extra") or ())
    why = f"needs {', '.join(missing)}" if missing else "not for this system"
    if not known:
        # An installation that runs from its source keeps the list of extras of the day on which it was made.
        why = "ncalign was installed before this extra came: install it again"
    return {
        "installed": bool(packages) and not missing,
        "missing": missing,
        "why": why if missing or not packages else None,
        "gives": gives,
    }


def _processor() -> dict[str, Any]:
    name = platform.processor()
    with suppress(OSError):
        models = re.findall(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
        name = models[0] if models else name
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = None
    with suppress(AttributeError, ValueError, OSError):
        memory = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    return {"name": name or platform.machine(), "cores": cores, "memory_gib": memory}


def _torch() -> dict[str, Any]:
    """What torch says of the devices, and what `dtype: auto` picks on the one that computes."""
    # Imported here, so that a torch that can't be loaded is a line of the report.
    import torch

    from ncalign.model.precision import fast_precision

    accelerator = torch.accelerator.current_accelerator(check_available=True)
    device = accelerator.type if accelerator is not None else "cpu"
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else f"ROCm {torch.version.hip}" if torch.version.hip else None
    picked = fast_precision(device)
    return {
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch_built_for": build or "processors alone",
        "device": device,
        "gpus": [_gpu(number) for number in range(torch.cuda.device_count())] if device == "cuda" else [],
        "dtype_auto": {"device": device, "precision": picked.precision, "reason": picked.reason},
    }


def _gpu(number: int) -> dict[str, Any]:
    import torch

    properties = torch.cuda.get_device_properties(number)
    return {
        "name": properties.name,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "compute_capability": f"{properties.major}.{properties.minor}",
    }


def _lines(found: dict[str, Any]) -> Iterator[str]:
    """The report for people."""
    yield f"ncalign {found['ncalign']}, Python {found['python']}, {found['system']}"
    there = [f"{name} {entry['version']}" for name, entry in found["packages"].items() if entry["version"]]
    yield f"packages   {', '.join(there)}"
    processor = found["processor"]
    memory = f", {processor['memory_gib']:g} GiB" if processor["memory_gib"] else ""
    yield f"processor  {processor['name']}, {processor['cores']} cores{memory}"
    if "dtype_auto" in found:
        yield f"           torch uses {found['instructions']} and {found['threads']} threads"
        yield f"GPU        {_gpu_line(found)}"
        auto = found["dtype_auto"]
        yield f"dtype      auto is {auto['precision']} here: {auto['reason']}"
    for name, value in found["environment"].items():
        yield f"variable   {name}={value}"
    yield f"extras     {', '.join(name for name, extra in found['extras'].items() if extra['installed']) or 'none'} installed"
    missing = [(name, extra) for name, extra in found["extras"].items() if not extra["installed"]]
    for name, extra in missing:
        yield f"           {name} is missing: {extra['gives']} ({extra['why']})"
    if missing:
        yield f"           to install one: {install_pattern()}"
    yield from (f"problem    {problem}" for problem in found["problems"])
    yield "nothing is wrong" if not found["problems"] else f"{len(found['problems'])} to fix"


def _gpu_line(found: dict[str, Any]) -> str:
    if found["gpus"]:
        return ", ".join(
            f"{gpu['name']} ({gpu['memory_gib']:g} GiB, compute capability {gpu['compute_capability']})"
            for gpu in found["gpus"]
        )
    if found["device"] != "cpu":
        return str(found["device"])
    built = found["torch_built_for"]
    if built == "processors alone":
        return "none that torch could use: this torch is built for processors alone"
    return (
        f"none that torch finds, though it is built for {built}: is there one, and does `nvidia-smi` (or `rocm-smi`) list it?"
    )

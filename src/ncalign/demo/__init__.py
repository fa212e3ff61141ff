"""The demonstrations: a real small model, aligned and measured in a few minutes, from shipped candidates or online."""

from ncalign.demo.rounds import run_online_demo
from ncalign.demo.run import run_demo

__all__ = ["run_demo", "run_online_demo"]

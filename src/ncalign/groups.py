"""The public name of :mod:`ncalign.data.groups`: groups of candidates, read and written."""

from ncalign.data.groups import (
    JSON,
    Candidate,
    DataError,
    Group,
    Message,
    ReadReport,
    Text,
    check_output,
    convert,
    read_groups,
    recorded_steps,
    rewards_origin,
    write_groups,
)

__all__ = [
    "Candidate",
    "DataError",
    "Group",
    "JSON",
    "Message",
    "ReadReport",
    "Text",
    "check_output",
    "convert",
    "read_groups",
    "recorded_steps",
    "rewards_origin",
    "write_groups",
]

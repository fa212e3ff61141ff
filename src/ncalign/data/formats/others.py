"""AlpacaEval's annotations: two answers a row, and which one a judge prefers."""

from __future__ import annotations

from ncalign.core.errors import DataError
from ncalign.data.formats.group import Group
from ncalign.data.formats.parsing import Row, row_id, row_metadata
from ncalign.data.formats.ranked import candidate
from ncalign.data.formats.values import read_number

ANNOTATION = ("instruction", "output_1", "output_2", "preference")
ANNOTATION_KNOWN = ("id", *ANNOTATION, "generator_1", "generator_2", "metadata")


def parse_annotation(row: Row, default_id: str, origin: str) -> Group:
    """Read an AlpacaEval annotation: 1 prefers the first output, 2 the second, between them in part; 0 and 1.5 are ties."""
    preference = read_number(row["preference"], "preference")
    if preference is not None and preference != 0 and not 1 <= preference <= 2:
        raise DataError(f"preference is {preference:g}: 1 to 2, 0 for a tie, or null is needed", reason="out of range")
    second = None if preference is None else 0.5 if preference == 0 else preference - 1
    first = None if second is None else 1 - second
    pair = [
        candidate(f"output_{k}", row[f"output_{k}"], reward, row.get(f"generator_{k}"))
        for k, reward in ((1, first), (2, second))
    ]
    return Group(row_id(row, default_id), row["instruction"], pair, row_metadata(row, ANNOTATION_KNOWN), origin)

"""Public data schemas → groups: one small pure function each, from a row to a group."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal, TypeAlias

from ncalign.core.errors import DataError, names, nearest, shown
from ncalign.core.user_code import load_named
from ncalign.data.config import PublicSchema
from ncalign.data.formats import argilla, distilabel, native, nca, openai, others, ranked, transcripts, trl, ultrafeedback
from ncalign.data.formats.columns import HISTORY, SYSTEMS, completed, unread
from ncalign.data.formats.group import TEMPLATE_KWARGS, Group
from ncalign.data.formats.messages import DESCRIPTIONS, spelled
from ncalign.data.formats.parsing import Row, as_conversation, require_columns

SchemaName: TypeAlias = PublicSchema | Literal["adapter"]
REWARDS_OF: dict[SchemaName, str] = {
    "nca": "scores",
    "ultrafeedback": "overall_score",
    "ultrafeedback_aspects": "mean of the aspects' ratings",
    "argilla": "annotators' rankings or ratings",
    "distilabel": "ratings",
    "nectar": "rank",
    "simpo": "scores of the reward model",
    "nemo_rl": "rank",
    "lmflow": "score",
    "solutions": "is_correct",
    "sharegpt": "scores of the pair, or chosen 1, rejected 0",
    "alpaca": "scores of the pair, or chosen 1, rejected 0",
    "nemo_aligner": "scores of the pair, or chosen 1, rejected 0",
    "alpaca_eval": "preference",
    "hh": "chosen 1, rejected 0",
    "trl_preference": "scores of the pair, or chosen 1, rejected 0",
    "trl_unpaired": "label",
    "openai": "preferred 1, not preferred 0",
}
"""What the rewards of a public schema are."""
Columns: TypeAlias = Callable[[Row], tuple[str, ...]]


def _any_row(row: Row) -> bool:
    return True


def _no_notes(row: Row) -> dict[str, int]:
    return {}


@dataclass(frozen=True)
class Schema:
    """How rows of one kind are recognised and read.

    Args:
        name: What the configuration calls it.
        required: The columns a row must have, given the ones it has.
        known: The columns that are read, given the ones there are; others go to the metadata.
        parse: Row, default id and origin → group.
        joins: Whether a row is one completion or one pair, so that several rows may belong to one prompt.
        recognises: What a row's values must be besides; others share these columns.
        notes: What a user should know of a row that was read otherwise than it is written: a text, and how often it applies.
        instructions: Whether prompts are instructions to a chat model: strings become a user's turn, answers the assistant's.
    """

    name: SchemaName
    required: Columns
    known: Columns
    parse: Callable[[Row, str, str], Group]
    joins: bool = False
    recognises: Callable[[Row], bool] = _any_row
    notes: Callable[[Row], dict[str, int]] = _no_notes
    instructions: bool = False

    def read(self, row: Row, default_id: str, origin: str) -> Group:
        """Return the row's group, or raise a ValueError that says what is wrong with it."""
        if self.name == "adapter":
            return self.parse(row, default_id, origin)
        known = self.known(row)
        require_columns(row, self.required(row), known, self.name)
        read = {name: spelled(row[name], name) for name in known if name in row and name not in ("id", "metadata")}
        group = self.parse({**row, **read}, default_id, origin)
        return completed(as_conversation(group) if self.instructions else group, row, known)

    def unread(self, group: Group, row: Row) -> list[str]:
        """A row's columns that no model sees, though it might be meant to."""
        return [] if self.name == "adapter" else unread(group, row, self.known(row), pair=self.joins)


NATIVE = Schema("ncalign", lambda _: ("prompt", "candidates"), lambda _: native.COLUMNS, native.parse)
PROMPTS = Schema("ncalign", lambda _: ("prompt",), lambda _: native.COLUMNS, native.parse)
PREFERENCE = Schema("trl_preference", trl.pair_columns, trl.known_pair_columns, trl.parse_pair, joins=True)
NCA = Schema("nca", nca.required_columns, nca.known_columns, nca.parse, instructions=True)


TRL_PROMPTS = Schema(
    "trl_prompts",
    lambda _: ("prompt",),
    lambda _: native.COLUMNS,
    native.parse,
    # A row with other columns is one of another schema, misspelt: by itself a prompt is a part of each.
    recognises=lambda row: row.keys() <= {"id", "prompt", "metadata", *SYSTEMS, HISTORY, *DESCRIPTIONS, TEMPLATE_KWARGS},
)


def _fixed(
    name: SchemaName,
    required: tuple[str, ...],
    known: tuple[str, ...],
    parse: Callable[[Row, str, str], Group],
    recognises: Callable[[Row], bool] = _any_row,
    *,
    joins: bool = False,
    instructions: bool = False,
) -> Schema:
    """A schema whose columns have fixed names."""
    return Schema(name, lambda _: required, lambda _: known, parse, joins, recognises, instructions=instructions)


def _pair(
    name: SchemaName, required: tuple[str, ...], recognises: Callable[[Row], bool] = _any_row, *, instructions: bool = False
) -> Schema:
    """A schema of pairs, by the names that one tool gives their columns."""
    return Schema(name, lambda _: required, trl.known_pair_columns, trl.parse_pair, True, recognises, instructions=instructions)


def _ultrafeedback(name: SchemaName, reward: ultrafeedback.Reward) -> Schema:
    """UltraFeedback's schema, with one of its two rewards."""
    return Schema(
        name,
        lambda _: ultrafeedback.COLUMNS,
        lambda _: ultrafeedback.KNOWN,
        partial(ultrafeedback.parse, reward=reward),
        recognises=ultrafeedback.is_row,
        notes=partial(ultrafeedback.notes, reward=reward),
        instructions=True,
    )


# Those with more columns, or told by their values, come before those whose columns they hold too.
PUBLIC = (
    NCA,
    _ultrafeedback("ultrafeedback", "overall_score"),
    # Named, never recognised: the columns are the same.
    _ultrafeedback("ultrafeedback_aspects", "aspect_mean"),
    Schema(
        "argilla",
        argilla.required_columns,
        argilla.known_columns,
        argilla.parse,
        recognises=argilla.is_record,
        notes=argilla.notes,
    ),
    Schema(
        "distilabel",
        distilabel.required_columns,
        distilabel.known_columns,
        distilabel.parse,
        recognises=distilabel.is_row,
        notes=distilabel.notes,
    ),
    _fixed("nectar", ranked.NECTAR, ranked.NECTAR_KNOWN, ranked.parse_nectar, ranked.is_nectar, instructions=True),
    Schema("simpo", ranked.list_columns, ranked.known_list_columns, ranked.parse_lists, instructions=True),
    _fixed("nemo_rl", ranked.NEMO_RL, ("id", *ranked.NEMO_RL, "metadata"), ranked.parse_nemo_rl),
    _fixed("lmflow", ranked.LMFLOW, ("id", *ranked.LMFLOW, "metadata"), ranked.parse_lmflow, ranked.is_lmflow),
    _fixed(
        "solutions",
        ranked.SOLUTIONS,
        ("id", *ranked.SOLUTIONS, "metadata"),
        ranked.parse_solutions,
        lambda row: bool(ranked.solution_columns(row)),
    ),
    _pair("sharegpt", ("conversations", *trl.PAIR), trl.is_sharegpt),
    _pair("alpaca", ("instruction", *trl.PAIR), lambda row: trl.asks_by(row, "instruction"), instructions=True),
    _pair("nemo_aligner", ("prompt", "chosen_response", "rejected_response")),
    _fixed("alpaca_eval", others.ANNOTATION, others.ANNOTATION_KNOWN, others.parse_annotation, instructions=True),
    _fixed("hh", ("chosen", "rejected"), transcripts.COLUMNS, transcripts.parse, transcripts.is_pair, joins=True),
    PREFERENCE,
    Schema(
        "trl_unpaired",
        trl.unpaired_columns,
        trl.known_unpaired_columns,
        trl.parse_unpaired,
        joins=True,
        recognises=trl.is_labelled,
    ),
    Schema("openai", openai.required_columns, openai.known_columns, openai.parse, joins=True, recognises=openai.is_row),
)


def schemas(schema: SchemaName, allow_empty: bool) -> tuple[Schema, ...]:
    """Return the schemas that rows may have, in the order in which they are tried."""
    choices: dict[str, tuple[Schema, ...]] = {
        # Rows with candidates come first: a prompt alone is a part of every other schema.
        "auto": (NATIVE, *PUBLIC, *((PROMPTS,) if allow_empty else ())),
        "ncalign": (PROMPTS if allow_empty else NATIVE,),
        "trl_prompts": (TRL_PROMPTS,),
        **{one.name: (one,) for one in PUBLIC},
    }
    if schema not in choices:
        raise DataError(f"unknown schema {schema!r}: known are {names(choices)}", reason="unknown schema")
    return choices[schema]


class LeftOut(Exception):
    """A row that the user's adapter leaves out."""


def adapted(name: str) -> Schema:
    """The schema of rows that the user's own function reads: ``file.py:function``, from a row to a row of our schema, or None.

    Raises:
        ValueError: the function can't be had; while reading, what it raises, with the row.
    """
    function = load_named(name, what="adapter")

    def parse(row: Row, default_id: str, origin: str) -> Group:
        try:
            found = function(row)
        except Exception as error:  # the user's code may raise anything; it is reported with the row that it failed on
            raise DataError(f"the adapter raised {type(error).__name__}: {error}", reason="adapter failed") from error
        if found is None:
            raise LeftOut
        if not isinstance(found, dict) or not {"prompt", "candidates"} <= found.keys():
            raise DataError(
                f"the adapter returned {shown(found)}: an object with `prompt` and `candidates`, or None, is needed",
                reason="adapter failed",
            )
        return NATIVE.read(found, default_id, origin)

    # It may read whatever a row holds.
    return Schema("adapter", lambda _: (), tuple, parse)


def recognise(columns: Row, tried: tuple[Schema, ...]) -> Schema:
    """Return the first schema whose columns are all there; an only choice is not questioned.

    Raises:
        ValueError: None matches; the message has the columns found and the nearest schema with what it lacks.
    """
    if len(tried) == 1:
        return tried[0]
    for schema in tried:
        if all(name in columns for name in schema.required(columns)) and schema.recognises(columns):
            # A prompts file takes rows of either kind from then on.
            return PROMPTS if schema is NATIVE and PROMPTS in tried else schema
    # Of equally near ones, those that are told by their columns alone; not those whose columns are there beside others.
    lacking_some = [schema for schema in tried if any(name not in columns for name in schema.required(columns))]
    closest = min(lacking_some or tried, key=lambda schema: (_distance(schema, columns), schema.recognises is not _any_row))
    lacking = [name for name in closest.required(columns) if name not in columns]
    renames = [(nearest(name, _unknown(closest, columns)), name) for name in lacking]
    hints = "".join(f"; did you mean `{name}` by `{found}`?" for found, name in renames if found)
    raise DataError(
        f"the columns match no schema: found {names(columns) or 'none'}; the nearest schema, `{closest.name}`, "
        f"lacks {names(lacking)}{hints}",
        reason="unknown schema",
    )


def _unknown(schema: Schema, columns: Row) -> list[str]:
    known = schema.known(columns)
    return [name for name in columns if name not in known]


def _distance(schema: Schema, columns: Row) -> float:
    """Share of required columns that are missing; one that is there under a similar name counts as half."""
    required = schema.required(columns)
    unknown = _unknown(schema, columns)
    missing = [0.5 if nearest(name, unknown) else 1.0 for name in required if name not in columns]
    return sum(missing) / len(required)

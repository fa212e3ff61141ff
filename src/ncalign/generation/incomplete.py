"""Completions that are empty or cut: when there are too many of them, and what helps."""

from __future__ import annotations

from ncalign.data.rendering import Rendering

_ONE_IN = 10
"""More than one completion in so many is worth a warning."""


def incomplete_warning(empty: int, cut: int, total: int, *, for_empty: str, for_cut: str) -> str | None:
    """What to say where more than a tenth of the completions are empty or cut; None where fewer are.

    Args:
        empty: completions without text.
        cut: completions with text that generation cut.
        total: all completions.
        for_empty: what helps against empty ones.
        for_cut: what helps against cut ones.

    >>> incomplete_warning(1, 0, 10, for_empty="…", for_cut="…") is None
    True
    >>> incomplete_warning(2, 0, 10, for_empty="try another prompt", for_cut="…")
    '2 of 10 completions are empty: try another prompt'
    """
    if _ONE_IN * (empty + cut) <= total:
        return None
    counts = f"{empty} of {total} completions are empty" if empty else f"{cut} of {total} completions are cut"
    if empty and cut:
        counts += f" and {cut} are cut"
    return f"{counts}: {'; '.join(dict.fromkeys([for_empty] * bool(empty) + [for_cut] * bool(cut)))}"


def remedies(
    rendering: Rendering | None, *, has_template: bool | None, max_new_tokens: int, spent: bool = False
) -> tuple[str, str]:
    """What helps against empty and against cut completions.

    Args:
        rendering: how prompts that are plain strings were put to the model; None where there were none.
        has_template: whether the model has a chat template; None where that is not known, as for a server.
        max_new_tokens: of the sampling.
        spent: whether empty completions were cut: their tokens went into thoughts that a server keeps apart.
    """
    longer = f"raise --max_new_tokens (now {max_new_tokens})"
    if spent:
        thinks = f"{longer}: the tokens ended in the model's thoughts, before its answer"
        return thinks, longer
    if rendering == "raw" and has_template:
        given = "the prompts were given raw to a model that has a chat template; try --string_prompts user_turn"
        return given, f"{given}, or {longer}"
    if rendering == "raw" and has_template is None:
        given = "the prompts were given raw; if the model has a chat template, try --string_prompts user_turn"
        return given, f"{longer}, or {given}"
    if rendering == "raw":
        return (
            "the model has no chat template and ends the text of these prompts at once; write prompts that break off where the "
            "answer begins, or use a model with a chat template",
            longer,
        )
    return "the model ends its turn at once; check its chat template and EOS token, or raise --temperature", longer

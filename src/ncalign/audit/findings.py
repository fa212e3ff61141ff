"""From numbers to plain words: which failures show, and which method and settings suit."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Finding:
    """One thing that a user should know.

    Attributes:
        name: for programs.
        level: ``problem`` for what spoils training, ``note`` for what is worth knowing, ``advice`` for what to do.
        text: for people.
    """

    name: str
    level: Literal["problem", "note", "advice"]
    text: str


def findings(numbers: Mapping[str, Any]) -> list[Finding]:
    """The findings of an audit's numbers; no problem among them means that none of the known failures shows."""
    found = [*_problems(numbers), *_notes(numbers), *_advice(numbers)]
    if not any(finding.level == "problem" for finding in found):
        found.insert(
            0, Finding("healthy", "note", "none of the known failures shows: real alternatives with rewards that differ")
        )
    return found


def _problems(n: Mapping[str, Any]) -> list[Finding]:
    found = []
    if n["groups/with_spread"] < 0.2:
        found.append(
            Finding(
                "no_spread",
                "problem",
                f"only {n['groups/with_spread']:.0%} of the groups have two different rewards: the rest "
                "teach nothing. Score with "
                "a finer reward, or take harder or easier prompts",
            )
        )
    if n["likeness/duplicates"] > 0.2:
        found.append(
            Finding(
                "near_duplicates",
                "problem",
                f"{n['likeness/duplicates']:.0%} of the candidates are near-copies of an earlier one of their group (97 % of "
                "their words in the same order): they count as several samples of one completion. Sample at a higher "
                "temperature, from several models, or drop the copies",
            )
        )
    if n["likeness/swapped"] > 0.3:
        found.append(
            Finding(
                "token_swap",
                "problem",
                f"{n['likeness/swapped']:.0%} of the lower-scored candidates are the best one with words "
                "moved or exchanged: noise "
                "on the surface, not alternatives. Such negatives teach to tell noise from text (the "
                "DPO(-) failure); sample "
                "real completions instead",
            )
        )
    if n["length/correlation"] > 0.75 and n["length/explained"] > 0.5:
        found.append(
            Finding(
                "length_bias",
                "problem",
                f"rewards follow length: within a group their rank correlation is {n['length/correlation']:.2f}, and "
                f"length explains {n['length/explained']:.0%} of their variance. A policy trained on them learns to be "
                f"{'longer' if n['length/slope'] > 0 else 'shorter'}: remove the bias, or score anew",
            )
        )
    if n["length/correlation"] < -0.75 and n["length/explained"] > 0.5:
        found.append(
            Finding(
                "length_bias",
                "problem",
                "rewards follow brevity: within a group their rank correlation with length is "
                f"{n['length/correlation']:.2f}, and "
                f"length explains {n['length/explained']:.0%} of their variance. A policy trained on them "
                "learns to stop early",
            )
        )
    return found


def _notes(n: Mapping[str, Any]) -> list[Finding]:
    found = []
    if n["rewards/missing"] > 0:
        found.append(
            Finding("missing", "note", f"{n['rewards/missing']:.1%} of the candidates have no reward and are not trained on")
        )
    if n["rewards/tied_best"] > 0.2:
        found.append(
            Finding(
                "ties",
                "note",
                f"in {n['rewards/tied_best']:.0%} of the groups several candidates share the best reward: "
                "one of them, drawn anew at "
                "each visit, is the positive, and the others are never its negatives",
            )
        )
    if n["prompts/duplicates"] > 0.01:
        text = f"{n['prompts/duplicates']:.1%} of the prompts occur more than once, but for case and punctuation"
        found.append(Finding("repeated_prompts", "note", f"{text}: held-out splits must keep them together"))
    if 0.4 < abs(n["length/correlation"]) <= 0.75:
        text = f"rewards lean on length (rank correlation {n['length/correlation']:.2f})"
        found.append(Finding("length", "note", f"{text}: watch the length of what the policy writes"))
    return found


def _advice(n: Mapping[str, Any]) -> list[Finding]:
    found = []
    graded = n["rewards/distinct"] > 2.5
    spread = n["rewards/within_sd"]
    if graded and spread > 0:
        found.append(
            Finding(
                "method",
                "advice",
                f"rewards are graded ({n['rewards/distinct']:.1f} different ones a group): nca and "
                "info_nca use all of them. An alpha "
                f"between {spread / 2:.2g} and {2 * spread:.2g} (the rewards' spread within a group is "
                f"{spread:.2g}) makes targets that are "
                "neither one-hot nor flat; beta 0.1 to 0.5",
            )
        )
    elif spread > 0:
        found.append(
            Finding(
                "method",
                "advice",
                "rewards take two values in most groups: mc_po or rnce, which contrast the best with the "
                "others, lose nothing of "
                "them; beta 0.1",
            )
        )
    if n["likeness/best_to_others"] > n["likeness/random"] + 0.4:
        found.append(
            Finding(
                "anchor",
                "advice",
                "the lower-scored candidates are much like the best one: contrasts alone lower both "
                "(likelihood displacement). Prefer nca, "
                "or an anchor (rpo, dpop), to hard negatives",
            )
        )
    keep, most = n["candidates/worth_keeping"], n["candidates/mean"]
    if math.isfinite(keep) and keep < most - 0.5:
        found.append(
            Finding(
                "keep",
                "advice",
                f"{keep:.0f} of {most:.1f} candidates a group give 95 % of what the best of all gains over one at random",
            )
        )
    return found

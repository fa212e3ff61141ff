"""From numbers to plain words: which failures show, and which method and settings suit."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
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


LENGTH_AGREEMENT, LENGTH_EXPLAINED = 0.65, 0.4
NOTED_AGREEMENT = 0.3
NEAR_COPIES, SWAPPED, LEAST_SPREAD = 0.2, 0.3, 0.2


def findings(numbers: Mapping[str, Any]) -> list[Finding]:
    """The findings of an audit's numbers; no problem among them means that none of the known failures shows."""
    problems = list(_problems(numbers))
    found = [*problems, *_reward_notes(numbers), *_likeness_notes(numbers), *_kernel_notes(numbers), *_advice(numbers)]
    if not problems:
        text = "none of the known failures shows: real alternatives with rewards that differ"
        found.insert(0, Finding("healthy", "note", text))
    return found


def _problems(n: Mapping[str, Any]) -> Iterator[Finding]:
    if n["groups/with_spread"] < LEAST_SPREAD:
        yield Finding(
            "no_spread",
            "problem",
            f"only {n['groups/with_spread']:.0%} of the groups have two different rewards: the rest teach nothing. Score with "
            f"a finer reward, or take harder or easier prompts",
        )
    if _near_copies(n):
        yield Finding(
            "near_duplicates",
            "problem",
            f"{n['likeness/duplicates']:.0%} of the candidates are near-copies of an earlier one of their group (the same "
            f"words in "
            "the same order, but for one or a tenth of them): they count as several samples of one completion. Sample at a "
            "higher temperature, from several models, or drop the copies",
        )
    if n["likeness/swapped"] > SWAPPED:
        yield Finding(
            "token_swap",
            "problem",
            f"{n['likeness/swapped']:.0%} of the lower-scored candidates are the best one with words moved or exchanged: "
            f"noise on "
            "the surface, not alternatives. Such negatives teach to tell noise from text (the DPO(-) failure); sample real "
            "completions instead",
        )
    agreement = n["length/agreement"]
    if abs(agreement) >= LENGTH_AGREEMENT and (n["length/explained"] >= LENGTH_EXPLAINED or abs(agreement) >= 0.85):
        way = "longer" if agreement > 0 else "shorter"
        yield Finding(
            "length_bias",
            "problem",
            f"rewards follow {'length' if agreement > 0 else 'brevity'}: of two candidates the {way} has the higher reward in "
            f"{(1 + abs(agreement)) / 2:.0%} of the cases, and length explains {n['length/explained']:.0%} of the variance "
            f"within "
            f"groups. A policy trained on them learns to be {way}: remove the bias (ncalign adjust --steps length), or score "
            f"anew",
        )


def _near_copies(n: Mapping[str, Any]) -> bool:
    """Whether near-copies are the failure: among texts of few words some swaps undo each other, and are not it."""
    swaps = n["likeness/swapped"] > SWAPPED and n["likeness/swapped"] > 2 * n["likeness/duplicates"]
    return bool(n["likeness/duplicates"] > NEAR_COPIES and not swaps)


def _reward_notes(n: Mapping[str, Any]) -> Iterator[Finding]:
    if n["rewards/missing"] > 0:
        yield Finding("missing", "note", f"{n['rewards/missing']:.1%} of the candidates have no reward and are not trained on")
    if n["rewards/tied_best"] > 0.2:
        yield Finding(
            "ties",
            "note",
            f"in {n['rewards/tied_best']:.0%} of the groups several candidates share the best reward: one of them, drawn anew "
            f"at each visit, is the positive, and the others are never its negatives",
        )
    noise, spread = n["rewards/noise_sd"], n["rewards/within_sd"]
    if n["rewards/noise_pairs"] >= 20 and noise > 0.5 * spread:
        yield Finding(
            "noise",
            "note",
            f"near-copies get rewards that differ by {noise:.2g} (one standard deviation, from {n['rewards/noise_pairs']:.0f} "
            f"pairs), against a spread of {spread:.2g} within a group: part of the ranking is chance. Score several times and "
            f"take the mean, or use a larger alpha",
        )
    agreement = n["length/agreement"]
    if NOTED_AGREEMENT < abs(agreement) < LENGTH_AGREEMENT:
        way = "longer" if agreement > 0 else "shorter"
        yield Finding(
            "length",
            "note",
            f"rewards lean on length: of two candidates the {way} has the higher reward in {(1 + abs(agreement)) / 2:.0%} of "
            f"the cases. Watch the length of what the policy writes",
        )
    if n["sources/most_best"] > 0.8 and n["sources/number"] > 1:
        yield Finding(
            "one_source",
            "note",
            f"one source wrote the best candidate in {n['sources/most_best']:.0%} of the groups: a policy can tell good from "
            f"bad by that source's style alone",
        )
    if n["prompts/duplicates"] > 0.01:
        yield Finding(
            "repeated_prompts",
            "note",
            f"{n['prompts/duplicates']:.1%} of the prompts occur more than once, but for case and punctuation: the pool is "
            f"smaller than it looks (it may be exhausted after an epoch), and held-out splits must keep them together",
        )


def _likeness_notes(n: Mapping[str, Any]) -> Iterator[Finding]:
    if n["likeness/duplicates"] > 0.02 and not _near_copies(n):
        yield Finding(
            "some_duplicates",
            "note",
            f"{n['likeness/duplicates']:.1%} of the candidates are near-copies of an earlier one of their group",
        )
    if n["copies/across"] > 0.02:
        yield Finding(
            "copies_across",
            "note",
            f"{n['copies/across']:.1%} of the candidates are near-copies of candidates of other groups: stock answers, such as "
            "refusals",
        )
    within, unrelated = n.get("meaning/best_to_others"), n.get("meaning/random")
    if within is None or unrelated is None:
        within, unrelated = n["likeness/best_to_others"], n["likeness/random"]
    if math.isfinite(within) and math.isfinite(unrelated) and within < unrelated + 0.02:
        yield Finding(
            "easy_negatives",
            "note",
            f"the lower-scored candidates are no more like the best one ({within:.2f}) than unrelated texts are "
            f"({unrelated:.2f}): "
            "easy negatives, from which little is learnt (the paper's `min` variant). Sample candidates for the prompt itself",
        )


def _kernel_notes(n: Mapping[str, Any]) -> Iterator[Finding]:
    share = n.get("kernel/effective_share")
    if share is None or not math.isfinite(share):
        return
    if share > 0.95:
        yield Finding(
            "flat_kernel",
            "note",
            f"at this beta the kernel draws almost evenly (effective sample size {share:.0%} of the candidates): mc_po is dpo "
            f"with a random negative here, until the policy has moved. A larger beta sharpens it",
        )
    if n["kernel/effective_size"] < 1.2:
        yield Finding(
            "sharp_kernel",
            "note",
            f"at this beta the kernel draws nearly always the same candidate (effective sample size "
            f"{n['kernel/effective_size']:.1f}): "
            "mc_po is its `max` variant here. A smaller beta, or scores by log-ratio (reference_model), flattens it",
        )
    for name in ("meaning", "bertscore", "words"):
        gain = n.get(f"kernel/likeness_gain/{name}")
        if gain is None or not math.isfinite(gain):
            continue
        low, high = n[f"kernel/likeness_gain_low/{name}"], n[f"kernel/likeness_gain_high/{name}"]
        verdict = "more like the best one than" if low > 0 else "less like it than" if high < 0 else "as like it as"
        yield Finding(
            "hard_negatives",
            "note",
            f"what the kernel draws is {verdict} a random negative (by {name}: {gain:+.3f}, 95 % interval {low:+.3f} to "
            f"{high:+.3f}): "
            f"{'hard negatives, as the paper has them' if low > 0 else 'the premise of hard negatives does not show here'}",
        )
        break
    if n["kernel/false_negatives"] > 0.25:
        yield Finding(
            "false_negatives",
            "note",
            f"{n['kernel/false_negatives']:.0%} of the kernel's weight lies on candidates whose reward is within a tenth of "
            f"the group's spread of the best: negatives that may be as good. Explicit rewards (nca, info_nca) treat them so",
        )
    if abs(n["kernel/length_drawn"] - 1) > 0.25:
        yield Finding(
            "kernel_length",
            "note",
            f"drawn negatives have {n['kernel/length_drawn']:.2f} times the length of random ones: what is contrasted is "
            "length, too. Without reference_model the scores are log-probs, which favour what is short",
        )


def _advice(n: Mapping[str, Any]) -> Iterator[Finding]:
    yield from _method(n)
    if n["likeness/best_to_others"] > n["likeness/random"] + 0.4:
        yield Finding(
            "anchor",
            "advice",
            "the lower-scored candidates are much like the best one: contrasts alone lower both (likelihood displacement). "
            "Prefer nca, or an anchor (rpo, dpop), to hard negatives",
        )
    keep, most = n["candidates/worth_keeping"], n["candidates/mean"]
    if math.isfinite(keep) and keep < most - 0.5:
        yield Finding(
            "keep",
            "advice",
            f"{keep:.0f} of {most:.1f} candidates a group give 95 % of what the best of all gains over one at random",
        )


def _method(n: Mapping[str, Any]) -> Iterator[Finding]:
    """Which method suits, with the alphas and betas that these data give."""
    low, high = n.get("beta/low"), n.get("beta/high")
    beta = "beta 0.1"
    if low is not None and high is not None and math.isfinite(low):
        beta = f"beta {low:.2g} to {high:.2g} keeps the kernel between even and one-hot under this model"
    alpha_low, alpha_high = n["alpha/low"], n["alpha/high"]
    if not math.isfinite(alpha_low):
        return
    alpha = f"alpha {alpha_low:.2g} to {alpha_high:.2g} makes targets that are neither one-hot nor flat"
    if n["candidates/mean"] < 2.5:
        yield Finding(
            "method",
            "advice",
            "there are two candidates a group: dpo, or nca_pair where the likelihood of the best must not fall; with rewards "
            f"whose size means something info_nca ({alpha}); beta 0.1. A kernel has nothing to choose from",
        )
    elif n["rewards/distinct"] > 2.5:
        yield Finding(
            "method",
            "advice",
            f"rewards are graded ({n['rewards/distinct']:.1f} different ones a group): nca and info_nca use all of them; "
            f"{alpha}; {beta}",
        )
    else:
        yield Finding(
            "method",
            "advice",
            "rewards take two values in most groups: mc_po or rnce, which contrast the best with the others, lose nothing of "
            f"them; {beta}. With nca or info_nca, {alpha}",
        )

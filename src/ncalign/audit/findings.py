"""From numbers to sentences: which known failures show, and which method and settings suit."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ncalign.generation.incomplete import incomplete_warning

Numbers = Mapping[str, Any]
Named = Iterator[tuple[str, str]]
"""Names and texts of findings."""


LENGTH_AGREEMENT, LENGTH_EXPLAINED = 0.65, 0.4
NOTED_AGREEMENT = 0.3
NEAR_COPIES, SWAPPED, LEAST_SPREAD = 0.2, 0.3, 0.2


def findings(numbers: Numbers) -> list[dict[str, str]]:
    """The findings of an audit's numbers; no problem among them means that none of the known failures shows.

    Each has a ``name`` for programs, a ``text`` for people, and a ``level``: ``problem`` for what spoils training, ``warning``
    for what went wrong when the candidates were made, ``note`` for what is worth knowing, ``advice`` for what to do.
    """
    found = [{"name": name, "level": level, "text": text} for level, find in _FINDERS for name, text in find(numbers)]
    if not any(finding["level"] in ("problem", "warning") for finding in found):
        text = "none of the known failures shows: candidates are real alternatives, and their rewards differ"
        found.insert(0, {"name": "healthy", "level": "note", "text": text})
    return found


def _problems(n: Numbers) -> Named:
    if n["groups/with_spread"] < LEAST_SPREAD:
        yield (
            "no_spread",
            f"only {n['groups/with_spread']:.0%} of the groups have two different rewards: nothing is learnt from the others. "
            "Score with a finer reward, or take harder or easier prompts",
        )
    if _near_copies(n):
        yield (
            "near_duplicates",
            f"{n['likeness/duplicates']:.0%} of the candidates are near-copies of an earlier one of their group (the same "
            "words in the same order, except for one word or a tenth of them): they count as several samples of one "
            "completion. Sample at a higher temperature or from several models, or drop the copies",
        )
    if n["likeness/swapped"] > SWAPPED:
        yield (
            "token_swap",
            f"{n['likeness/swapped']:.0%} of the lower-scored candidates are the best one with words moved or exchanged, not "
            "alternatives to it. From such negatives a policy learns to tell noise from text (the DPO(-) failure); sample real "
            "completions instead",
        )
    agreement, explained = n["length/agreement"], n["length/explained"]
    if abs(agreement) >= LENGTH_AGREEMENT and (explained >= LENGTH_EXPLAINED or abs(agreement) >= 0.85):
        yield (
            "length_bias",
            f"rewards follow {'length' if agreement > 0 else 'brevity'}: {_pairs_by_length(agreement)}, and length explains "
            f"{explained:.0%} of the variance within groups. A policy trained on them learns to write {_way(agreement)} "
            "completions: remove the bias (ncalign adjust --steps length), or score with another reward",
        )


def _warnings(n: Numbers) -> Named:
    again = "string prompts belong in a user's turn (--string_prompts user_turn) where the model has a chat template"
    if n["candidates/made_raw"]:
        again = (
            f"in {n['candidates/made_raw']} groups the prompts were given raw; if the model that answered has a chat template, "
            "generate them again with --string_prompts user_turn"
        )
    warning = incomplete_warning(
        n["candidates/empty"],
        n["candidates/cut"],
        n["candidates"],
        for_empty=f"training can't use a group with an empty completion, so leave these out or generate them again; {again}",
        for_cut="their ends are not learnt from; generate them again with a larger --max_new_tokens",
    )
    if warning is not None:
        yield "incomplete", warning


def _near_copies(n: Numbers) -> bool:
    """Whether near-copies are the failure, and not swapped words that in short texts came out alike."""
    swaps = n["likeness/swapped"] > SWAPPED and n["likeness/swapped"] > 2 * n["likeness/duplicates"]
    return bool(n["likeness/duplicates"] > NEAR_COPIES and not swaps)


def _way(agreement: float) -> str:
    return "longer" if agreement > 0 else "shorter"


def _pairs_by_length(agreement: float) -> str:
    return f"of two candidates the {_way(agreement)} has the higher reward in {(1 + abs(agreement)) / 2:.0%} of the cases"


def _reward_notes(n: Numbers) -> Named:
    if n["rewards/missing"] > 0:
        yield "missing", f"{n['rewards/missing']:.1%} of the candidates have no reward and are not trained on"
    if n["rewards/tied_best"] > 0.2:
        yield (
            "ties",
            f"in {n['rewards/tied_best']:.0%} of the groups several candidates share the best reward: each time such a group "
            "is trained on, one of them is drawn as the positive, and the others are never its negatives",
        )
    noise, spread = n["rewards/noise_sd"], n["rewards/within_sd"]
    if n["rewards/noise_pairs"] >= 20 and noise > 0.5 * spread:
        yield (
            "noise",
            f"rewards are noisy: those of near-copies differ with a standard deviation of {noise:.2g} (from "
            f"{n['rewards/noise_pairs']:.0f} pairs), those of a group with one of {spread:.2g}. Part of the ranking is chance: "
            "score several times and take the mean, or use a larger alpha",
        )
    agreement = n["length/agreement"]
    if NOTED_AGREEMENT < abs(agreement) < LENGTH_AGREEMENT:
        yield (
            "length",
            f"rewards lean on length: {_pairs_by_length(agreement)}. Watch the length of the policy's completions in training",
        )
    if n["sources/most_best"] > 0.8 and n["sources/number"] > 1:
        yield (
            "one_source",
            f"one source wrote the best candidate in {n['sources/most_best']:.0%} of the groups: a policy can tell good from "
            "bad by that source's style alone",
        )
    if n["prompts/duplicates"] > 0.01:
        yield (
            "repeated_prompts",
            f"{n['prompts/duplicates']:.1%} of the prompts occur more than once, ignoring case and punctuation: there are "
            "fewer different prompts than groups, and a held-out split must keep groups of one prompt together",
        )


def _likeness_notes(n: Numbers) -> Named:
    if n["likeness/duplicates"] > 0.02 and not _near_copies(n):
        share = n["likeness/duplicates"]
        yield "some_duplicates", f"{share:.1%} of the candidates are near-copies of an earlier one of their group"
    if n["copies/across"] > 0.02:
        yield (
            "copies_across",
            f"{n['copies/across']:.1%} of the candidates are near-copies of candidates of other groups: stock answers, such as "
            "refusals",
        )
    within, unrelated = n.get("meaning/best_to_others"), n.get("meaning/random")
    if within is None or unrelated is None:
        within, unrelated = n["likeness/best_to_others"], n["likeness/random"]
    if math.isfinite(within) and math.isfinite(unrelated) and within < unrelated + 0.02:
        yield (
            "easy_negatives",
            f"the lower-scored candidates are no more like the best one ({within:.2f}) than unrelated texts are "
            f"({unrelated:.2f}): easy negatives, from which little is learnt (the paper's `min` variant). Sample the "
            "candidates for their own prompt",
        )


def _kernel_notes(n: Numbers) -> Named:
    share = n.get("kernel/effective_share")
    if share is None or not math.isfinite(share):
        return
    if share > 0.95:
        yield (
            "flat_kernel",
            f"at this beta the kernel draws almost evenly (effective sample size {share:.0%} of the candidates): until the "
            "policy has moved, mc_po is dpo with a random negative. A larger beta draws less evenly",
        )
    if n["kernel/effective_size"] < 1.2:
        yield (
            "sharp_kernel",
            f"at this beta the kernel draws nearly always the same candidate (effective sample size "
            f"{n['kernel/effective_size']:.1f}): mc_po is its `max` variant here. A smaller beta draws more evenly, and so do "
            "scores by log-ratio (reference_model)",
        )
    yield from _hard_negatives(n)
    if n["kernel/false_negatives"] > 0.25:
        yield (
            "false_negatives",
            f"{n['kernel/false_negatives']:.0%} of the kernel's weight lies on candidates whose reward is within a tenth of "
            "the group's spread of the best: negatives that may be as good as the positive. nca and info_nca weight candidates "
            "by their rewards and have no such negatives",
        )
    if abs(n["kernel/length_drawn"] - 1) > 0.25:
        yield (
            "kernel_length",
            f"drawn negatives have {n['kernel/length_drawn']:.2f} times the length of random ones, so length is contrasted "
            "too. Without reference_model the scores are log-probs, which are higher for short completions",
        )


def _hard_negatives(n: Numbers) -> Named:
    """By the best measure of likeness that there is."""
    for name in ("meaning", "bertscore", "words"):
        gain = n.get(f"kernel/likeness_gain/{name}")
        low, high = (n.get(f"kernel/likeness_gain_{bound}/{name}", math.nan) for bound in ("low", "high"))
        if gain is None or not math.isfinite(low):
            continue
        verdict = "more like the best than" if low > 0 else "less like the best than" if high < 0 else "as like the best as"
        yield (
            "hard_negatives",
            f"what the kernel draws is {verdict} a random negative (by {name}: {gain:+.3f}, 95 % interval {low:+.3f} to "
            f"{high:+.3f}): {'hard negatives, as in the paper' if low > 0 else 'no hard negatives like those of the paper'}",
        )
        return


def _advice(n: Numbers) -> Named:
    if math.isfinite(n["alpha/low"]):
        yield "method", _method(n)
    if n["likeness/best_to_others"] > n["likeness/random"] + 0.4:
        yield (
            "anchor",
            "the lower-scored candidates are much like the best one: losses that only contrast them lower the likelihood of "
            "both (likelihood displacement). Prefer nca, or a loss with an anchor (rpo, dpop), to hard negatives",
        )
    keep, most = n["candidates/worth_keeping"], n["candidates/mean"]
    if math.isfinite(keep) and keep < most - 0.5:
        yield (
            "keep",
            f"{keep:.0f} candidates a group, of {most:.1f}, give 95 % of what the best of all gains over one at random",
        )


_PAYS = (
    ("negatives", "M", "mc_po and rnce"),
    ("drawn_info_nca", "S", "info_nca with an estimator"),
    ("drawn_nca", "S", "nca with an estimator"),
    ("candidates", "K", "nca"),
)


def _sizes(n: Numbers) -> Named:
    """How many candidates pay."""
    for name, letter, methods in _PAYS:
        if f"pays/{name}" not in n:
            continue
        best, enough, most = (f"{n[f'pays/{name}{end}']:.0f}" for end in ("", "_enough", "_most"))
        if best == most:
            pays = f"all, {letter} = {most}, give the least noise for the compute"
        else:
            variance, compute = n[f"pays/{name}_variance"], 1 / n[f"pays/{name}_efficiency"]
            pays = (
                f"{letter} = {best} gives the least noise for the compute: {variance:.2f} times the variance of all ("
                f"{letter} = {most}), and {compute:.0%} of their compute for the same noise"
            )
        beyond = f"beyond {letter} = {enough} nothing is gained (under 2 % of the variance)"
        if enough == most:
            beyond = f"fewer than {most} have a variance more than 2 % above that"
        yield f"pays_{name}", f"{methods}: {pays}; {beyond}"


def _method(n: Numbers) -> str:
    """Which method suits, with the alphas and betas that these data give."""
    low, high = n.get("beta/low"), n.get("beta/high")
    beta = "beta 0.1"
    if low is not None and high is not None and math.isfinite(low):
        beta = f"with beta {low:.2g} to {high:.2g} the kernel draws neither evenly nor always the same under this model"
    alpha = f"alpha {n['alpha/low']:.2g} to {n['alpha/high']:.2g} makes targets that are neither one-hot nor flat"
    if n["candidates/mean"] < 2.5:
        return (
            "there are two candidates a group: take dpo, or nca_pair if the likelihood of the best must not fall; if the size "
            f"of the rewards means something, info_nca ({alpha}); beta 0.1. A kernel has nothing to choose from"
        )
    if n["rewards/distinct"] > 2.5:
        return (
            f"rewards are graded ({n['rewards/distinct']:.1f} different ones a group): take nca or info_nca, which use all of "
            f"them; {alpha}; {beta}"
        )
    return (
        "rewards take two values in most groups: take mc_po or rnce, which contrast the best with the others and lose nothing; "
        f"{beta}. For nca or info_nca, {alpha}"
    )


_FINDERS: tuple[tuple[str, Callable[[Numbers], Named]], ...] = (
    ("problem", _problems),
    ("warning", _warnings),
    ("note", _reward_notes),
    ("note", _likeness_notes),
    ("note", _kernel_notes),
    ("advice", _advice),
    ("advice", _sizes),
)

"""The data's own candidates as they are mixed into a round's groups, where a setting leaves some out or spoils them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from typing import Any

from ncalign.data.groups import Candidate, Group
from ncalign.model.encoding import DroppedGroupError, EncodedGroup, Encoder, EncodingReport
from ncalign.training.config import TrainConfig
from ncalign.training.variants import vary_groups


@dataclass(frozen=True)
class Offline:
    """What became of prompts' own candidates.

    Attributes:
        variants: by the prompt's id: which of its scored candidates are kept, and these as they are trained on.
        counts: for results.json.
    """

    variants: Mapping[str, tuple[tuple[int, ...], EncodedGroup]] = field(default_factory=dict)
    counts: Mapping[str, Any] = field(default_factory=dict)

    def mixed_in(self, encoded: EncodedGroup, candidates: Sequence[Candidate]) -> tuple[EncodedGroup, list[Candidate]]:
        """A group whose last completions are the prompt's own scored ones, and these, as they are trained on."""
        if encoded.id not in self.variants or not candidates:
            return encoded, list(candidates)
        columns, varied = self.variants[encoded.id]
        completions = (*encoded.completions[: len(encoded.completions) - len(candidates)], *varied.completions)
        unknown = (None,) * len(completions)
        kept = [replace(candidates[k], reward=reward) for k, reward in zip(columns, varied.rewards, strict=True)]
        scored = (*encoded.masks[: len(encoded.completions) - len(candidates)], *varied.masks)
        return replace(encoded, completions=completions, rewards=unknown, reference_logprobs=unknown, scored=scored), kept


def offline_variants(prompts: Sequence[Group], encoder: Encoder, training: TrainConfig) -> Offline:
    """Apply ``max_candidates`` and ``corrupt`` to the scored candidates of prompts to train on.

    Raises:
        ValueError: a setting changes nothing.
    """
    if training.max_candidates is None and training.corrupt is None:
        return Offline()
    encoder = copy(encoder)
    encoder.report = EncodingReport()
    groups = []
    for prompt in prompts:
        scored = [replace(c, reference_logprob=None) for c in prompt.candidates if c.reward is not None]
        try:
            groups += [encoder.encode(replace(prompt, candidates=scored))] if scored else []
        except DroppedGroupError:
            continue  # such a prompt is left out of every round
    varied = vary_groups(
        groups,
        max_candidates=training.max_candidates,
        corrupt=training.corrupt,
        seed=training.seed,
        max_length=training.encoding.max_length,
        # With its fresh candidates a group is another: whether it can be used is seen in each round.
        refuse=lambda rewards: None,
    )
    made = zip(varied.columns, varied.groups, strict=True)
    return Offline(
        {group.id: (columns, group) for columns, group in made}, varied.counts(training.max_candidates, training.corrupt)
    )

"""What MC-PO's kernel would draw under a given model: how sharp it is, and whether it draws near-copies or unranked rivals."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ncalign.audit.measures import likeness, mean, words
from ncalign.batching import collate, split_by_tokens
from ncalign.config import AuditConfig
from ncalign.encoding import DroppedGroupError, EncodedGroup, Encoder, completion_text
from ncalign.groups import Group
from ncalign.logprobs import completion_logprobs
from ncalign.policy import load_policy
from ncalign.progress import Bar

_FALSE_MARGIN = 0.1


def kernel_numbers(groups: Sequence[Group], config: AuditConfig) -> dict[str, float]:
    """Numbers of the kernel's weights ``softmax(beta r)`` over each group's lower-scored candidates.

    The score r is the log-ratio of ``model`` to ``reference_model`` or, without one, the model's log-prob itself.

    Returns:
        Entropy as a share of the largest possible, effective sample size as a share of the candidates, likeness to the best of
        what is drawn and of a random draw, length of what is drawn over the mean, and the weight on false negatives, whose
        reward is within a tenth of the group's spread of the best.
    """
    assert config.model is not None
    usable = [group for group in groups if len({c.reward for c in group.candidates if c.reward is not None}) > 1]
    scores = _logprobs(usable, config.model, config)
    if config.reference_model is not None:
        base = _logprobs(usable, config.reference_model, config)
        scores = {key: [a - b for a, b in zip(values, base[key], strict=True)] for key, values in scores.items() if key in base}
    entropy, effective, drawn, uniform, longer, false = [], [], [], [], [], []
    for number, group in enumerate(usable):
        if number not in scores:
            continue
        rewards = [candidate.reward for candidate in group.candidates]
        top = max(reward for reward in rewards if reward is not None)
        low = min(reward for reward in rewards if reward is not None)
        best = rewards.index(top)
        lower = [k for k, reward in enumerate(rewards) if reward is not None and reward < top]
        weights = (config.beta * torch.tensor([scores[number][k] for k in lower], dtype=torch.float64)).softmax(0)
        if len(lower) > 1:
            entropy.append(float(-(weights * weights.clamp_min(1e-300).log()).sum()) / float(torch.tensor(len(lower)).log()))
            effective.append(float(1 / weights.square().sum()) / len(lower))
        texts = [words(completion_text(candidate, group)) for candidate in group.candidates]
        alike = torch.tensor([likeness(texts[best], texts[k]).edit for k in lower], dtype=torch.float64)
        lengths = torch.tensor([float(len(texts[k])) for k in lower], dtype=torch.float64)
        near = torch.tensor(
            [float(top - (rewards[k] or 0.0) <= _FALSE_MARGIN * (top - low)) for k in lower], dtype=torch.float64
        )
        drawn.append(float(weights @ alike))
        uniform.append(float(alike.mean()))
        longer.append(float(weights @ lengths / lengths.mean().clamp_min(1)))
        false.append(float(weights @ near))
    return {
        "kernel/entropy": mean(entropy),
        "kernel/effective_share": mean(effective),
        "kernel/likeness_drawn": mean(drawn),
        "kernel/likeness_random": mean(uniform),
        "kernel/length_drawn": mean(longer),
        "kernel/false_negatives": mean(false),
    }


@torch.no_grad()
def _logprobs(groups: Sequence[Group], model: str, config: AuditConfig) -> dict[int, list[float]]:
    """Log-probs of each group's candidates, by the group's place; groups that can't be encoded are left out."""
    policy = load_policy(model, dtype=config.dtype)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.nn.Module.to(policy.model, device).eval()
    encoder = Encoder(policy.tokenizer, max_length=config.max_length, string_prompts=config.string_prompts)
    encoded: list[tuple[int, EncodedGroup]] = []
    for number, group in enumerate(groups):
        try:
            encoded.append((number, encoder.encode(group)))
        except DroppedGroupError:
            continue
    found: dict[int, list[float]] = {}
    sizes = [(len(group.completions), group.length) for _, group in encoded]
    with Bar("Log-probs", len(encoded)) as bar:
        for part in split_by_tokens(sizes, max_groups=8, max_tokens=4096, padded=True):
            batch = collate([encoded[i][1] for i in part], pad_token_id=int(policy.tokenizer.pad_token_id)).to(
                torch.device(device)
            )
            values = completion_logprobs(policy.model, batch).double().cpu()
            for row, i in enumerate(part):
                found[encoded[i][0]] = values[row, : len(encoded[i][1].completions)].tolist()
            bar.advance(len(part))
    return found

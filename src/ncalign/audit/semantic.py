"""Likeness in meaning, by a sentence-transformers model."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np

from ncalign.audit.measures import mean
from ncalign.encoding import completion_text
from ncalign.groups import Group
from ncalign.progress import say


def semantic_numbers(groups: Sequence[Group], embedder: str, *, seed: int) -> dict[str, float]:
    """Cosine likeness of the best candidate to each lower-scored one, and to candidates of other groups.

    Raises:
        ValueError: sentence-transformers is missing, or the model can't be loaded.
    """
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError:
        raise ValueError("embedder needs the package sentence-transformers: pip install 'ncalign[audit]'") from None
    try:
        model = SentenceTransformer(embedder)
    except Exception as error:  # the library raises classes of several packages
        raise ValueError(f"embedder {embedder!r} can't be loaded: {str(error).strip().splitlines()[0]}") from error
    usable = [group for group in groups if len({c.reward for c in group.candidates if c.reward is not None}) > 1]
    texts = [[completion_text(c, group) for c in group.candidates] for group in usable]
    say(f"Embedding {sum(map(len, texts))} candidates")
    flat = np.asarray(model.encode([text for group in texts for text in group], normalize_embeddings=True))
    edges = np.cumsum([0, *map(len, texts)])
    within, across, chance = [], [], random.Random(seed)
    for g, group in enumerate(usable):
        vectors = flat[edges[g] : edges[g + 1]]
        rewards = [c.reward for c in group.candidates]
        best = max(range(len(rewards)), key=lambda k: -np.inf if rewards[k] is None else float(rewards[k] or 0.0))
        top = float(rewards[best] or 0.0)
        within += [float(vectors[best] @ vectors[k]) for k, r in enumerate(rewards) if r is not None and r < top]
        if len(usable) > 1:
            other = chance.choice([h for h in range(len(usable)) if h != g])
            across.append(float(vectors[best] @ flat[chance.randrange(edges[other], edges[other + 1])]))
    return {"meaning/best_to_others": mean(within), "meaning/random": mean(across)}

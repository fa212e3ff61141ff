"""Likeness in meaning: by a sentence-transformers model, and by BERTScore."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ncalign.audit.measures import ranked
from ncalign.core.progress import say
from ncalign.data.groups import Group
from ncalign.model.encoding import completion_text


@dataclass(frozen=True)
class Meaning:
    """How alike in meaning texts are.

    Attributes:
        to_best: by a group's place, its best candidate's likeness to each lower-scored one, the highest-scored first.
        random: likeness of best candidates to candidates of other groups.
    """

    to_best: dict[int, list[float]]
    random: list[float]


def by_embeddings(groups: Sequence[Group], embedder: str, *, seed: int) -> Meaning:
    """Cosines of sentence embeddings.

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
    pairs, places, across = _pairs(groups, seed)
    texts = list(dict.fromkeys(text for pair in (*pairs, *across) for text in pair))
    say(f"Embedding {len(texts)} candidates")
    vectors = np.asarray(model.encode(texts, normalize_embeddings=True)) if texts else np.zeros((0, 1))
    row = {text: vector for text, vector in zip(texts, vectors, strict=True)}
    return _meaning([float(row[a] @ row[b]) for a, b in pairs], places, [float(row[a] @ row[b]) for a, b in across])


def by_bertscore(groups: Sequence[Group], name: str, *, seed: int) -> Meaning:
    """BERTScore's F1, without rescaling (arXiv 1904.09675).

    Args:
        groups: whose candidates are compared.
        name: a model's folder or hub id; ``:N`` at its end takes the N-th layer, else the last.
        seed: of the random pairs.

    Raises:
        ValueError: bert-score is missing, or the model can't be loaded.
    """
    try:
        from bert_score import BERTScorer
    except ImportError:
        raise ValueError("bertscore needs the package bert-score: pip install 'ncalign[audit]'") from None
    folder, colon, layer = name.rpartition(":")
    model, layers = (folder, int(layer)) if colon and layer.isdigit() else (name, None)
    try:
        scorer: Any = BERTScorer(model_type=model, num_layers=layers or _num_layers(model), batch_size=32)
    except Exception as error:  # the library raises classes of several packages
        raise ValueError(f"bertscore: {model!r} can't be loaded: {str(error).strip().splitlines()[0]}") from error
    pairs, places, across = _pairs(groups, seed)
    say(f"BERTScore of {len(pairs) + len(across)} pairs")
    every = [*pairs, *across]
    # The package can't encode a text without any; it is like nothing.
    filled = [k for k, pair in enumerate(every) if all(text.strip() for text in pair)]
    scores = [0.0] * len(every)
    if filled:
        found = scorer.score([every[k][0] for k in filled], [every[k][1] for k in filled])[2].tolist()
        for k, score in zip(filled, found, strict=True):
            scores[k] = score
    return _meaning(scores[: len(pairs)], places, scores[len(pairs) :])


def _num_layers(model: str) -> int:
    from transformers import AutoConfig

    return int(AutoConfig.from_pretrained(Path(model) if Path(model).is_dir() else model).num_hidden_layers)


def _pairs(groups: Sequence[Group], seed: int) -> tuple[list[tuple[str, str]], list[int], list[tuple[str, str]]]:
    """Best and lower-scored texts, the group of each pair, and best texts with candidates of other groups."""
    pairs, places, across, chance = [], [], [], random.Random(seed)
    usable = [(number, group, order) for number, group in enumerate(groups) if (order := ranked(group)) is not None]
    for number, group, order in usable:
        best = completion_text(group.candidates[order.best], group)
        for k in order.lower:
            pairs.append((best, completion_text(group.candidates[k], group)))
            places.append(number)
        others = [other for other in usable if other[0] != number]
        if others:
            _, other, _ = chance.choice(others)
            across.append((best, completion_text(chance.choice(other.candidates), other)))
    return pairs, places, across


def _meaning(scores: Sequence[float], places: Sequence[int], across: Sequence[float]) -> Meaning:
    found: dict[int, list[float]] = {}
    for score, place in zip(scores, places, strict=True):
        found.setdefault(place, []).append(score)
    return Meaning(found, list(across))

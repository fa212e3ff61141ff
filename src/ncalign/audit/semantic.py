"""Likeness in meaning: by a sentence-transformers model, and by BERTScore."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ncalign.audit.measures import ranked
from ncalign.core.install import install_hint
from ncalign.core.progress import say
from ncalign.data.groups import Group
from ncalign.data.rendering import completion_text
from ncalign.model.pickles import without_pickles

Score = Callable[[Sequence[tuple[str, str]]], list[float]]
"""How alike the two texts of each pair are."""


@dataclass(frozen=True)
class Meaning:
    """How alike in meaning texts are.

    Attributes:
        to_best: for each group, its best candidate's likeness to each lower-scored one, the highest-scored first; empty where
            no two rewards differ.
        random: likeness of best candidates to candidates of other groups.
    """

    to_best: list[list[float]]
    random: list[float]


def measure_meaning(groups: Sequence[Group], score: Score, *, seed: int) -> Meaning:
    """Score each group's best candidate against its lower-scored ones, and against a candidate of another group."""
    pairs: list[tuple[str, str]] = []
    across: list[tuple[str, str]] = []
    chance = random.Random(seed)
    orders = [ranked(group) for group in groups]
    usable = [(group, order) for group, order in zip(groups, orders, strict=True) if order is not None]
    for group, order in usable:
        best = completion_text(group.candidates[order.best].completion)
        pairs += [(best, completion_text(group.candidates[k].completion)) for k in order.lower]
        others = [other for other, _ in usable if other is not group]
        if others:
            other = chance.choice(others)
            across.append((best, completion_text(chance.choice(other.candidates).completion)))
    scores = score([*pairs, *across])
    left = iter(scores)
    to_best = [[] if order is None else [next(left) for _ in order.lower] for order in orders]
    return Meaning(to_best, list(left))


def embedding_cosine(embedder: str) -> Score:
    """Cosines of the sentence embeddings of a sentence-transformers model.

    Raises:
        ValueError: sentence-transformers is missing, or the model can't be loaded.
    """
    with _optional("embedder", embedder, package="sentence-transformers"):
        from sentence_transformers import SentenceTransformer

        # The library completes short names so.
        full = embedder if "/" in embedder or Path(embedder).exists() else f"sentence-transformers/{embedder}"
        model = SentenceTransformer(without_pickles(full, what="model"))

    def score(pairs: Sequence[tuple[str, str]]) -> list[float]:
        texts = list(dict.fromkeys(text for pair in pairs for text in pair))
        say(f"Embedding {len(texts)} candidates")
        vectors = np.asarray(model.encode(texts, normalize_embeddings=True)) if texts else np.zeros((0, 1))
        row = dict(zip(texts, vectors, strict=True))
        return [float(row[a] @ row[b]) for a, b in pairs]

    return score


def bertscore_f1(name: str) -> Score:
    """BERTScore's F1, without rescaling (arXiv 1904.09675).

    Args:
        name: a model's folder or hub id; ``:N`` at its end takes the N-th layer, else the last.

    Raises:
        ValueError: bert-score is missing, or the model can't be loaded.
    """
    folder, colon, layer = name.rpartition(":")
    model, layers = (folder, int(layer)) if colon and layer.isdigit() else (name, None)
    with _optional("bertscore", model, package="bert-score"):
        from bert_score import BERTScorer
        from transformers import AutoConfig

        model = without_pickles(model, what="model")
        layers = layers or int(AutoConfig.from_pretrained(model).num_hidden_layers)
        scorer: Any = BERTScorer(model_type=model, num_layers=layers, batch_size=32)

    def score(pairs: Sequence[tuple[str, str]]) -> list[float]:
        say(f"BERTScore of {len(pairs)} pairs")
        # The package can't encode a text of white space; such a text is like nothing.
        filled = [k for k, pair in enumerate(pairs) if all(text.strip() for text in pair)]
        scores = np.zeros(len(pairs))
        if filled:
            scores[filled] = scorer.score([pairs[k][0] for k in filled], [pairs[k][1] for k in filled])[2].tolist()
        return scores.tolist()

    return score


@contextmanager
def _optional(option: str, model: str, *, package: str) -> Iterator[None]:
    """Say what is missing where a package of the extra `audit`, or a model of its own, can't be loaded."""
    try:
        yield
    except Exception as error:  # the libraries raise classes of several packages
        if isinstance(error, ImportError) and error.name == package.replace("-", "_"):
            raise ValueError(f"{option} needs the package {package}: {install_hint('audit')}") from None
        raise ValueError(f"{option} {model!r} can't be loaded: {str(error).strip().splitlines()[0]}") from error

r"""Estimates of a whole group's gradient from a few of its candidates, exact on average.

The gradient of a group's loss is a sum over its candidates, $\nabla \ell = \sum_i c_i \nabla \log \pi_\theta(y_i|x)$, whose
coefficients are known once all candidates are scored. A few candidates, drawn with known probabilities and weighted by their
inverses, have that sum as their expectation (Horvitz and Thompson 1952), at the price of their own backward passes alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ncalign.objectives.inclusion import inclusion_probabilities, systematic

__all__ = ["coefficients", "relative_variance", "best_number", "draw_candidates", "surrogate_loss", "Draw"]
__all__ += ["proposal_sizes", "reweighted", "difference_estimate"]

_TINY = 1e-300


@dataclass(frozen=True)
class Draw:
    r"""The candidates that stand for their groups.

    Attributes:
        columns: indices of those drawn, in the groups' order; -1 for none.
        weights: $c_i / \pi_i$ of each, float64; 0 for none.
        probabilities: $\pi_i$ of each; 1 for none.
        num_candidates: how many were drawn of each group.
        relative_variance: `relative_variance` of the draw.
    """

    columns: Int[Tensor, "B S"]
    weights: Float[Tensor, "B S"]
    probabilities: Float[Tensor, "B S"]
    num_candidates: Int[Tensor, " B"]
    relative_variance: Float[Tensor, " B"]


def coefficients(
    loss: Callable[[Float[Tensor, "B K"]], Float[Tensor, " B"]], logprobs: Float[Tensor, "B K"]
) -> Float[Tensor, "B K"]:
    r"""How much each candidate's log-prob counts in the gradient of its group's loss.

    $$c_i = \frac{\partial \ell}{\partial \log \pi_\theta(y_i|x)}$$

    Args:
        loss: of each group, from the log-probs of its candidates; a group's reads no other group's.
        logprobs: at which it is differentiated, in nats.

    Returns:
        One over nats; 0 for a candidate that the loss does not read. For an implicit reward of beta times the log-ratio it is
        beta times the derivative by that: $\beta (p_i - w_i)$ for InfoNCA, with $p = \mathrm{softmax}(r)$.

    Example:
        >>> r = torch.zeros(1, 4, dtype=torch.float64)
        >>> coefficients(lambda r: r.logsumexp(dim=1) - r[:, 0], r)  # RNCE: p_0 - 1, then p_i
        tensor([[-0.7500,  0.2500,  0.2500,  0.2500]], dtype=torch.float64)
    """
    at = logprobs.detach().requires_grad_()
    with torch.enable_grad():
        (found,) = torch.autograd.grad(loss(at).sum(), at)
    return found


def relative_variance(coefficients: Float[Tensor, "B K"], probabilities: Float[Tensor, "B K"]) -> Float[Tensor, " B"]:
    r"""Variance that the draw adds, over the squared length of the group's own gradient.

    $$\frac{\sum_i c_i^2 (1/\pi_i - 1)}{\sum_i c_i^2}$$

    It takes the candidates' gradients for equally long and orthogonal to one another.

    Args:
        coefficients: $c_i$.
        probabilities: $\pi_i$, above 0 wherever the coefficient is not 0.

    Returns:
        Dimensionless; 0 where all enter surely, and for a group without a gradient.

    Example:
        >>> c = torch.tensor([[-0.5, 0.25, 0.25]], dtype=torch.float64)
        >>> probabilities = torch.tensor([[1.0, 0.5, 0.5]], dtype=torch.float64)
        >>> relative_variance(c, probabilities)  # (2 - 1) * (1/16 + 1/16) / (1/4 + 1/16 + 1/16)
        tensor([0.3333], dtype=torch.float64)
    """
    squares = coefficients.double().square()
    added = torch.where(probabilities > 0, squares * (1 / probabilities.clamp(min=_TINY) - 1), 0.0).sum(dim=1)
    total = squares.sum(dim=1)
    return torch.where(total > 0, added / total, 0.0)


def enter(coefficients: Float[Tensor, "B K"], candidates: int) -> Float[Tensor, "B K"]:
    """The probability with which each candidate enters; 0 where its coefficient is 0."""
    sizes = coefficients.double().abs()
    broken = ~sizes.isfinite()
    sizes = torch.where(broken.any(dim=1, keepdim=True), broken.double(), sizes)
    return inclusion_probabilities(sizes, torch.ones_like(broken), candidates)


def draw_candidates(
    coefficients: Float[Tensor, "B K"],
    sizes: Sequence[int],
    *,
    candidates: int,
    generators: Sequence[torch.Generator],
) -> Draw:
    r"""Draw the candidates that stand for each group, with probabilities in proportion to their coefficients.

    $$\pi_i = \min(1, \lambda |c_i|), \qquad \sum_i \pi_i = \min(S, \#\{i : c_i \ne 0\})$$

    With gradients of one length, orthogonal to one another, no other probabilities with this sum give less variance. What
    the gradients of a group have in common cancels where coefficients add up to 0, as it does in the whole sum: of candidates
    to raise and of those to lower as many are drawn as are expected, rounded down or up. For RNCE and S = 2 the positive
    enters surely, and one negative as MC-PO's kernel draws it.

    Args:
        coefficients: $c_i$ of `coefficients`; 0 where there is no candidate. Where some of a group are not finite only these
            enter, and the loss is not finite either.
        sizes: of each group, the number of its candidates: its first columns.
        candidates: S, how many of a group enter; fewer where fewer have a coefficient, but at least one.
        generators: of each group, the source of its random numbers.

    Returns:
        Columns and weights, on the host.

    Raises:
        ValueError: candidates is below 1.

    Example:
        >>> c = torch.tensor([[-0.5, 0.5, 0.0], [-0.5, 0.5, 0.0]], dtype=torch.float64)
        >>> draw_candidates(c, [3, 2], candidates=2, generators=[torch.Generator(), torch.Generator()]).weights
        tensor([[-0.5000,  0.5000],
                [-0.5000,  0.5000]], dtype=torch.float64)
    """
    found = coefficients.detach().double().cpu()
    probabilities, rows = enter(found, candidates), []
    for row, raised, size, generator in zip(probabilities, found < 0, sizes, generators, strict=True):
        # A group without a gradient gives its first candidate, with weight 0: a pass has something to differentiate.
        drawn = systematic(row[:size].unsqueeze(0), generator, sides=raised[:size].unsqueeze(0))[0]
        rows.append(drawn.nonzero().squeeze(1).tolist() or [0])
    width = max(map(len, rows))
    columns = torch.tensor([row + [-1] * (width - len(row)) for row in rows])
    drawn = torch.where(columns >= 0, probabilities.gather(1, columns.clamp(min=0)), 1.0)
    drawn = torch.where(drawn > 0, drawn, 1.0)
    return Draw(
        columns,
        found.gather(1, columns.clamp(min=0)).masked_fill(columns < 0, 0.0) / drawn,
        drawn,
        (columns >= 0).sum(dim=1),
        relative_variance(found, probabilities),
    )


def proposal_sizes(outdated: Float[Tensor, "B K"], exists: Bool[Tensor, "B K"]) -> Float[Tensor, "B K"]:
    r"""What candidates are drawn by where their current coefficients are not known: outdated ones, and a share of all alike.

    $$|s_i| = 0.9\, \frac{|c_i|}{\sum_j |c_j|} + 0.1\, \frac1K$$

    The share keeps the weight of a candidate bounded whose coefficient was small and no longer is. Without any outdated
    coefficient all are alike.

    Args:
        outdated: $c_i$ as they were.
        exists: True for the candidates that the loss reads; K counts these.

    Returns:
        Of each one's sign, float64; 0 for those that don't exist.

    Example:
        >>> proposal_sizes(torch.tensor([[-0.3, 0.1, 0.0, 0.0]]), torch.tensor([[True, True, True, False]]))
        tensor([[-0.7083,  0.2583,  0.0333,  0.0000]], dtype=torch.float64)

    Source:
        Defensive mixtures, Hesterberg (1995).
    """
    sizes = torch.where(exists, outdated.double().abs(), 0.0)
    alike = exists.double() / exists.sum(dim=1, keepdim=True).clamp(min=1)
    shares = sizes / sizes.sum(dim=1, keepdim=True).clamp(min=_TINY)
    found = torch.where(sizes.sum(dim=1, keepdim=True) > 0, 0.9 * shares + 0.1 * alike, alike)
    return torch.where(exists & (outdated < 0), -found, found)


def reweighted(draw: Draw, coefficients: Float[Tensor, "B K"]) -> Draw:
    """A draw by other numbers, with the weights that current coefficients give those drawn.

    Args:
        draw: made without them.
        coefficients: $c_i$; those of candidates that were not drawn are not read.

    Returns:
        The draw; its relative variance is estimated from those drawn.
    """
    found = coefficients.double().cpu().gather(1, draw.columns.clamp(min=0)).masked_fill(draw.columns < 0, 0.0)
    squares = found.square() / draw.probabilities
    variance = (squares * (1 / draw.probabilities - 1)).sum(dim=1) / squares.sum(dim=1).clamp(min=_TINY)
    return replace(draw, weights=found / draw.probabilities, relative_variance=variance)


def difference_estimate(
    loss: Callable[[Float[Tensor, "B K"]], Float[Tensor, " B"]],
    before: Float[Tensor, "B K"],
    now: Float[Tensor, "B S"],
    draw: Draw,
) -> Float[Tensor, " B"]:
    r"""The loss of a whole group of which only those drawn are known as they are now; the loss is a sum over candidates.

    $$\hat\ell = \ell(b) + \sum_{i \in A} \frac{\ell(b \text{ with } y_i \text{ as it is now}) - \ell(b)}{\pi_i}$$

    Args:
        loss: as `coefficients` takes it.
        before: log-probs b of all candidates as they were.
        now: log-probs of those drawn.
        draw: which they are.

    Returns:
        A number of each group; on average over the draws the loss of the whole group as it is now.

    Example:
        >>> draw = draw_candidates(torch.ones(1, 2), [2], candidates=2, generators=[torch.Generator()])
        >>> difference_estimate(lambda r: r.exp().sum(dim=1), torch.zeros(1, 2), torch.tensor([[0.0, 1.0]]), draw)  # 1 + e
        tensor([3.7183], dtype=torch.float64)

    Source:
        The difference estimator; Särndal, Swensson and Wretman, Model Assisted Survey Sampling, section 6.3.
    """
    at, values = before.double(), now.double()
    start = loss(at)
    total = start
    for place in range(draw.columns.shape[1]):
        column = draw.columns[:, place : place + 1]
        moved = torch.where(column >= 0, at.scatter(1, column.clamp(min=0), values[:, place : place + 1]), at)
        total = total + (loss(moved) - start) / draw.probabilities[:, place]
    return total


def best_number(
    coefficients: Float[Tensor, "N K"],
    prompt_tokens: Float[Tensor, " N"],
    completion_tokens: Float[Tensor, "N K"],
    *,
    prompt_passes: float,
) -> tuple[int, float]:
    r"""The number of candidates at which the variance of the gradient, times the cost of computing it, is least.

    $$\min_S \; \sum_n \sum_i \frac{c_{ni}^2}{\pi_{ni}(S)} \cdot
    \sum_n \left( f P_n + \sum_i T_{ni} + 3 \min(S, K_n) \bar T_n \right)$$

    against all candidates with gradients and no scores, $\sum_n \sum_i c_{ni}^2 \cdot \sum_n (3 P_n + 3 \sum_i T_{ni})$. The
    first factor is the variance between groups and that of the draw in one: the mean gradient is taken for small beside
    a group's own, and candidates' gradients for equally long and orthogonal to one another.

    Args:
        coefficients: $c$ of a data set's groups; 0 where there is no candidate.
        prompt_tokens: P of each group.
        completion_tokens: T of each candidate, in units of a prompt token's cost; 0 where there is none.
        prompt_passes: f, what a prompt costs in forward passes: 3 where scoring and training share it, 4 otherwise.

    Returns:
        S, K where fewer pay nowhere; and the product there, over that of all candidates.

    Example:
        >>> c = torch.tensor([[-0.5] + [0.5 / 15] * 15], dtype=torch.float64)
        >>> best_number(c, torch.tensor([100.0]), torch.full((1, 16), 100.0), prompt_passes=3.0)[0]
        4

    Source:
        Efficiency as one over variance times work: Hammersley and Handscomb (1964), Glynn and Whitt (1992).
    """
    width, exists = coefficients.shape[1], completion_tokens > 0
    sizes, tokens, prompts = exists.sum(dim=1), completion_tokens.sum(dim=1), float(prompt_tokens.sum())
    squares = coefficients.double().square()
    whole = float(squares.sum()) * (3 * prompts + 3 * float(tokens.sum()))
    best = (width, 1.0)
    for number in [n for n in range(1, width) if n <= 16 or n % (n // 16) == 0]:
        probabilities = enter(coefficients, number)
        variance = float(torch.where(probabilities > 0, squares / probabilities.clamp(min=_TINY), 0.0).sum())
        entering = (tokens * torch.minimum(sizes, torch.tensor(number)) / sizes.clamp(min=1)).sum()
        cost = prompt_passes * prompts + float(tokens.sum()) + 3 * float(entering)
        if whole and variance * cost < best[1] * whole:
            best = (number, variance * cost / whole)
    return best


def surrogate_loss(
    loss: Float[Tensor, " B"], logprobs: Float[Tensor, "B S"], weights: Float[Tensor, "B S"]
) -> Float[Tensor, " B"]:
    r"""A loss with the value of the whole group's, and the gradient of those drawn.

    $$\mathrm{stop}(\ell) + \sum_{i \in A} \mathrm{stop}\left(\frac{c_i}{\pi_i}\right)
    \bigl(\log \pi_\theta(y_i|x) - \mathrm{stop}(\log \pi_\theta(y_i|x))\bigr)$$

    Args:
        loss: of the whole group.
        logprobs: of those drawn, with gradients.
        weights: $c_i / \pi_i$ of each.

    Returns:
        The loss of each group. Over the draws its gradient is on average that of the loss.

    Example:
        >>> logprobs = torch.tensor([[-3.0, -4.0]], requires_grad=True)
        >>> loss = surrogate_loss(torch.tensor([0.7]), logprobs, torch.tensor([[-0.5, 0.5]]))
        >>> loss.sum().backward()
        >>> loss.detach(), logprobs.grad
        (tensor([0.7000]), tensor([[-0.5000,  0.5000]]))

    Source:
        Horvitz and Thompson (1952).
    """
    return loss.detach() + (weights.detach().to(logprobs.dtype) * (logprobs - logprobs.detach())).sum(dim=1)

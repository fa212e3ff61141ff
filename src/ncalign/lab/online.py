"""What happens while a policy trains: pair gradients, the beta mismatch, rounds of best-of-n, likelihood displacement."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ncalign.lab.policies import (
    Loss,
    RewardLoss,
    every,
    firsts,
    info_nca,
    mean_gradient,
    nca,
    numbers,
    sequence_probabilities,
    total_variation,
    tuples,
    value_and_gradient,
)
from ncalign.lab.results import Curve, Findings, Line, fitted_exponent
from ncalign.objectives import DPO, MCPO, RPO, LossInputs, NCAPair, ObjectiveConfig, build_method, dpo_loss, rnce_loss
from ncalign.objectives.kernels import eligible_negatives, pick_positive


def pair_gradient() -> Findings:
    """The weight of a pair's gradient grows with the negative's lead and does not peak at a tie."""
    found, gaps = Findings("gradient of DPO, arXiv 2305.18290"), torch.linspace(-10, 10, 41, dtype=torch.float64)
    weight = -value_and_gradient(lambda chosen: dpo_loss(chosen, gaps), torch.zeros_like(gaps))[1]
    found.equal("weight of a pair's gradient at a tie: one half", 0.5, weight[20])
    found.equal("weight of a pair's gradient with the negative 10 ahead: towards 1", 1.0, weight[-1], 1e-4)
    statement = "weight of a pair's gradient: share of 40 steps up in the negative's lead that raise it"
    found.share(statement, 1.0, weight.diff() > 0)
    found.curves.append(
        Curve(
            "pair_gradient",
            "Weight of a pair's gradient",
            "implicit reward of the negative minus that of the positive",
            "weight",
            {"DPO": list(zip(gaps.tolist(), weight.tolist(), strict=True))},
            note="One half at a tie, and more the further the negative is ahead.",
        )
    )
    return found


COPIES = (3, 1, 2, 2)
"""How often each completion is in a group of 8: the reference of `beta_mismatch` draws it as often."""


def beta_mismatch() -> Findings:
    """Completions of the policy follow the model only at beta = 1, which is what Proposition 3.3 needs of the positive."""
    found, assumption = Findings("definition of the model"), "MC-PO Proposition 3.3"
    copies = torch.tensor(COPIES)
    reference, policy = (copies.double() / copies.sum()).log(), numbers(4, seed=61, scale=2.0).log_softmax(dim=0)
    betas = (1.0, 0.5, 0.1, 0.01)
    distances, biases, mixtures, slopes = [], [], [], []
    for beta in betas:
        r, model = _kernels_model(reference, policy, copies, beta)
        mixture = reference.exp() ** (1 - beta) * policy.exp() ** beta
        mixture = mixture / mixture.sum()
        mixtures.append(model - mixture)
        slopes.append(mean_gradient(rnce_loss, r, mixture, reference.exp(), 1))
        distances.append(float(total_variation(model, policy.exp())))
        estimate = mean_gradient(rnce_loss, r, policy.exp(), reference.exp(), 1) + policy.exp()
        biases.append(float((estimate - mixture).norm()))
    # At beta = 0 the model is the reference.
    limit = float(total_variation(reference.exp(), policy.exp()))
    statement = (
        "the kernel over completions of the reference draws reference^(1-beta) policy^beta, normalised: largest distance"
    )
    found.zero(statement, torch.stack(mixtures))
    statement = "RNCE's expected gradient with positives from reference^(1-beta) policy^beta, every beta: largest entry"
    found.zero(statement, torch.stack(slopes), source=assumption)
    found.zero("total variation of policy and model at beta = 1", distances[0])
    statement = "total variation of policy and model at beta = 0.01: that of policy and reference"
    found.equal(statement, limit, distances[-1], 0.005)
    statement = "bias of the gradient of log Z, M = 1 and positive from the policy, at beta = 1"
    found.zero(statement, biases[0], source=assumption)
    statement = "positive from the policy at beta = 0.5, 0.1 and 0.01: share with a bias above 0.01"
    found.share(statement, 1.0, [bias > 0.01 for bias in biases[1:]], source=assumption)
    lines = {
        "total variation of policy and model": list(zip(betas, distances, strict=True)),
        "bias of the gradient, M = 1": list(zip(betas, biases, strict=True)),
    }
    found.curves.append(
        Curve(
            "beta_mismatch",
            "Completions of the policy, and the model that the loss assumes",
            "beta",
            "distance",
            lines,
            log="x",
            note="Both are 0 at beta = 1 alone.",
        )
    )
    return found


def _kernels_model(
    reference: Float[Tensor, " V"], policy: Float[Tensor, " V"], copies: Int[Tensor, " V"], beta: float
) -> tuple[Float[Tensor, " V"], Float[Tensor, " V"]]:
    """Implicit rewards, and the model as MC-PO's kernel draws it from a group with copies of each completion."""
    method = build_method(MCPO(beta=beta, include_positive=True))
    assert method.sampler is not None
    assert method.sampler.kernel is not None
    group = torch.arange(len(copies)).repeat_interleave(copies)
    scores = method.kernel_scores(policy[group].unsqueeze(0), reference[group].unsqueeze(0))
    assert scores is not None
    # The first candidate is the positive, and all the others are below it.
    rewards = torch.zeros_like(scores)
    rewards[0, 0] = 1.0
    drawn = method.sampler.kernel(scores, firsts(scores), rewards, every(scores))[0]
    # One of each completion's copies has its implicit reward.
    r = scores[0][copies.cumsum(dim=0) - 1]
    return r, torch.zeros_like(policy).index_add(0, group, drawn)


# --- Rounds of best-of-n ----------------------------------------------------------------------------------------------

NUM_ROUNDS, NUM_SAMPLES, ALPHA = 1000, 4, 1.0


def best_of_n() -> Findings:
    """Online rounds without a target collapse onto the best completion; a target ends where it says."""
    found = Findings("expected gradient over the rounds")
    reference = numbers(4, seed=62, scale=0.5).log_softmax(dim=0)
    rewards = torch.tensor([0.0, 1.0, 0.4, -0.5], dtype=torch.float64)
    target = float((reference + rewards / ALPHA).softmax(dim=0)[rewards.argmax()])
    objectives = {"RNCE, best of 4 as the positive": _best_against_the_rest, "InfoNCA": info_nca(ALPHA), "NCA": nca(ALPHA)}
    lines = {name: _rounds(reference, rewards, objective) for name, objective in objectives.items()}
    rnce, listwise, binary = (line[-1][1] for line in lines.values())
    found.equal("online RNCE with the best of 4: probability of the best after 1000 rounds, towards 1", 1.0, rnce, 0.02)
    # Of what is left, e, a mixed group has a share of order e and a gradient of order e: e falls as its own cube.
    exponent = fitted_exponent([(n, 1 - p) for n, p in lines["RNCE, best of 4 as the positive"]], start=100)
    statement = "online RNCE with the best of 4: exponent of the round, from 100 on, in what is left for the others"
    found.equal(statement, -0.5, exponent, 0.02)
    statement = "online InfoNCA: probability of the best after 1000 rounds, that of reference exp(R/alpha)"
    found.equal(statement, target, listwise, 1e-6, source="InfoNCA section 3")
    found.share("online NCA: 1 if the best's probability is above 0.9 after 1000 rounds", 0.0, [binary > 0.9])
    found.curves.append(
        Curve(
            "best_of_n",
            "Probability of the best completion over online rounds",
            "round",
            "probability",
            {**lines, "target of InfoNCA": [(1.0, target), (float(NUM_ROUNDS), target)]},
            log="x",
            note="Each round takes one step of the exact expected gradient over all groups of 4 that the policy could draw.",
        )
    )
    return found


def _best_against_the_rest(r: Float[Tensor, "N K"], rewards: Float[Tensor, "N K"]) -> Float[Tensor, " N"]:
    """RNCE of a group's best against everything below it."""
    positive = pick_positive(rewards, every(r), generator=None)
    below = eligible_negatives(rewards, positive, every(r))
    return rnce_loss(r, positive, below.scatter(1, positive.unsqueeze(1), True))


def _rounds(reference: Tensor, rewards: Tensor, objective: RewardLoss) -> Line:
    """Probability of the best after each round; what a round draws is data, so it carries no gradient."""
    columns = tuples(reference.shape[0], NUM_SAMPLES)
    groups, logits, line = rewards[columns], reference, []
    for number in range(1, NUM_ROUNDS + 1):
        weights = sequence_probabilities(columns, logits.softmax(dim=0))

        def expected(at: Tensor, weights: Tensor = weights) -> Tensor:
            r = at.log_softmax(dim=0) - reference
            return (weights * objective(r[columns], groups)).sum()

        logits = logits - 2.0 * value_and_gradient(expected, logits)[1]
        line.append((float(number), float(logits.softmax(dim=0)[rewards.argmax()])))
    return line


# --- Likelihood displacement ------------------------------------------------------------------------------------------

# The chosen and the rejected completion lie in much the same direction (cosine 0.86), the rejected one further out.
FEATURES = ((1.0, 0.3), (1.6, -0.4), (-0.5, 0.5), (-0.5, -0.5), (-0.4, 0.6), (-0.6, -0.5))
CHOSEN, REJECTED = 0, 1
NUM_STEPS, LEARNING_RATE = 400, 0.2


def displacement() -> Findings:
    """With a pair of similar completions DPO lowers the chosen one; an anchor brings it back."""
    found = Findings("likelihood displacement, arXiv 2410.08847")
    features = torch.tensor(FEATURES, dtype=torch.float64)
    lead = float((features[CHOSEN] - features.mean(dim=0)) @ (features[CHOSEN] - features[REJECTED]))
    dpo, rpo, binary = (_pair_loss(features, objective(beta=1.0)) for objective in (DPO, RPO, NCAPair))
    statement = "similar pair, DPO at the reference: rate of the chosen log-likelihood, (f_w - mean f)(f_w - f_l) / 2"
    found.equal(statement, lead / 2, _rate(features, dpo, CHOSEN))
    statement = "similar pair, NCA at the reference: half of DPO's rate, so that its first steps lower the chosen one too"
    found.equal(statement, lead / 4, _rate(features, binary, CHOSEN), source="gradient of the losses at the reference")
    lines = {}
    for name, loss, lowered in (("DPO", dpo, 1.0), ("DPO and chosen NLL (RPO)", rpo, 0.0), ("NCA of the pair", binary, 0.0)):
        lines[name] = _chosen_change(features, loss)
        statement = f"similar pair, {name}: 1 if the chosen one is less likely than at the start after 400 steps"
        found.share(statement, lowered, [lines[name][-1][1] < 0])
    found.curves.append(
        Curve(
            "displacement",
            "Log-likelihood of the chosen completion of a similar pair",
            "step",
            "change since the start (nats)",
            lines,
            note="NCA and DPO start downwards together; only terms that hold the chosen one itself turn the line up.",
        )
    )
    return found


def _logprobs(features: Float[Tensor, "V D"], parameters: Float[Tensor, " D"]) -> Float[Tensor, " V"]:
    """Log-probs of a linear-softmax policy: completions with similar features rise and fall together."""
    return (features @ parameters).log_softmax(dim=0)


def _start(features: Float[Tensor, "V D"]) -> Float[Tensor, " D"]:
    """The parameters of the reference, all 0."""
    return features.new_zeros(features.shape[1])


def _pair_loss(features: Float[Tensor, "V D"], objective: ObjectiveConfig) -> Loss:
    """An objective's loss of the pair by the policy's parameters."""
    method = build_method(objective)
    pair, rewards = [CHOSEN, REJECTED], torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    reference = _logprobs(features, _start(features))[pair].unsqueeze(0)

    def loss(parameters: Tensor) -> Tensor:
        logprobs = _logprobs(features, parameters)[pair].unsqueeze(0)
        return method.loss(LossInputs(logprobs - reference, logprobs, rewards, torch.ones_like(rewards), every(rewards)))

    return loss


def _rate(features: Float[Tensor, "V D"], loss: Loss, completion: int) -> float:
    """Rate at which a loss's gradient flow changes a completion's log-likelihood at the reference."""
    _, gradient = value_and_gradient(loss, _start(features))
    _, rise = value_and_gradient(lambda at: _logprobs(features, at)[completion], _start(features))
    return -float(gradient @ rise)


def _chosen_change(features: Float[Tensor, "V D"], loss: Loss) -> Line:
    """How far the chosen completion's log-likelihood is from that at the start after each step."""
    parameters, line = _start(features), [(0.0, 0.0)]
    before = float(_logprobs(features, parameters)[CHOSEN])
    for step in range(1, NUM_STEPS + 1):
        parameters = parameters - LEARNING_RATE * value_and_gradient(loss, parameters)[1]
        line.append((float(step), float(_logprobs(features, parameters)[CHOSEN]) - before))
    return line


def single_steps_of_nca() -> Findings:
    """One step of NCA from the reference can't lower the best candidate of a table, and can where features are shared."""
    found, rewards = Findings("NCA section 4"), numbers(200, 4, seed=63)
    table, shared = torch.eye(6, dtype=torch.float64).expand(200, 6, 6), numbers(200, 6, 3, seed=64)
    in_table, with_shared = ([_nca_rate(*case) < 0 for case in zip(of, rewards, strict=True)] for of in (table, shared))
    statement = "first NCA step, tabular policy: share of 200 groups whose best candidate becomes less likely"
    found.share(statement, 0.0, in_table)
    lowered = sum(with_shared) / len(with_shared)
    statement = f"first NCA step, shared features: 1 if any of 200 groups' best becomes less likely ({lowered:.0%} do)"
    found.share(statement, 1.0, [any(with_shared)])
    return found


def _nca_rate(features: Float[Tensor, "V D"], rewards: Float[Tensor, " K"]) -> float:
    """Rate at which NCA's gradient flow changes the best candidate's log-likelihood at the reference."""
    reference = _logprobs(features, _start(features))

    def loss(at: Tensor) -> Tensor:
        r = (_logprobs(features, at) - reference)[: len(rewards)]
        return nca(1.0)(r.unsqueeze(0), rewards.unsqueeze(0))

    return _rate(features, loss, int(rewards.argmax()))

"""What happens while a policy trains: pair gradients, the beta mismatch, rounds of best-of-n, likelihood displacement."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from ncalign.lab.policies import (
    LinearSoftmax,
    Loss,
    RewardLoss,
    every,
    mean_gradient,
    numbers,
    sequence_probabilities,
    share,
    total_variation,
    tuples,
    value_and_gradient,
)
from ncalign.lab.results import EXACT, Curve, Findings, Statement, fitted_exponent, largest, zero
from ncalign.objectives import DPO, RPO, LossInputs, Method, NCAPair, dpo_loss, info_nca_loss, nca_loss, rnce_loss
from ncalign.objectives.kernels import eligible_negatives, pick_positive


def pair_gradient() -> Findings:
    """The weight of a pair's gradient grows with the negative's lead and does not peak at a tie."""
    gaps = torch.linspace(-10, 10, 41, dtype=torch.float64)
    _, gradient = value_and_gradient(lambda chosen: dpo_loss(chosen, gaps), torch.zeros_like(gaps))
    weight = -gradient
    source = "gradient of DPO, arXiv 2305.18290"
    statements = [
        Statement("weight of a pair's gradient at a tie: one half", source, 0.5, float(weight[20]), EXACT),
        Statement("weight of a pair's gradient with the negative 10 ahead: towards 1", source, 1.0, float(weight[-1]), 1e-4),
        Statement(
            "weight of a pair's gradient: share of 40 steps up in the negative's lead that raise it",
            source,
            1.0,
            share(weight.diff() > 0),
            0.0,
        ),
    ]
    points = list(zip(gaps.tolist(), weight.tolist(), strict=True))
    curve = Curve(
        "pair_gradient",
        "Weight of a pair's gradient",
        "implicit reward of the negative minus that of the positive",
        "weight",
        {"DPO": points},
        note="One half at a tie, and more the further the negative is ahead.",
    )
    return Findings(statements, [curve])


def beta_mismatch() -> Findings:
    """Completions of the policy follow the model only at beta = 1, which is what Proposition 3.3 needs of the positive."""
    reference, policy = numbers(4, seed=60).log_softmax(dim=0), numbers(4, seed=61, scale=2.0).log_softmax(dim=0)
    betas = (1.0, 0.5, 0.1, 0.01)
    distances, biases, mixtures = [], [], []
    for beta in betas:
        r = beta * (policy - reference)
        model = (reference + r).softmax(dim=0)
        mixture = reference.exp() ** (1 - beta) * policy.exp() ** beta
        mixtures.append(largest(model - mixture / mixture.sum()))
        distances.append(float(total_variation(model, policy.exp())))
        estimate = mean_gradient(rnce_loss, r, policy.exp(), reference.exp(), 1) + policy.exp()
        biases.append(float((estimate - model).norm()))
    # At beta = 0 the model is the reference.
    limit = float(total_variation(reference.exp(), policy.exp()))
    source = "definition of the model"
    statements = [
        zero("the model is reference^(1-beta) policy^beta, normalised: largest distance", source, max(mixtures)),
        zero("total variation of policy and model at beta = 1", source, distances[0]),
        Statement(
            "total variation of policy and model at beta = 0.01: that of policy and reference",
            source,
            limit,
            distances[-1],
            0.02,
        ),
        zero(
            "bias of the gradient of log Z, M = 1 and positive from the policy, at beta = 1", "MC-PO Proposition 3.3", biases[0]
        ),
        Statement(
            "positive from the policy at beta = 0.5, 0.1 and 0.01: share with a bias above 0.01",
            "MC-PO Proposition 3.3",
            1.0,
            share(torch.tensor(biases[1:]) > 0.01),
            0.0,
        ),
    ]
    lines = {
        "total variation of policy and model": list(zip(betas, distances, strict=True)),
        "bias of the gradient, M = 1": list(zip(betas, biases, strict=True)),
    }
    curve = Curve(
        "beta_mismatch",
        "Completions of the policy, and the model that the loss assumes",
        "beta",
        "distance",
        lines,
        log_x=True,
        note="Both are 0 at beta = 1 alone.",
    )
    return Findings(statements, [curve])


# --- Rounds of best-of-n ----------------------------------------------------------------------------------------------

NUM_ROUNDS, NUM_SAMPLES, ALPHA = 1000, 4, 1.0


def best_of_n() -> Findings:
    """Online rounds without a target collapse onto the best completion; a target ends where it says."""
    reference = numbers(4, seed=62, scale=0.5).log_softmax(dim=0)
    rewards = torch.tensor([0.0, 1.0, 0.4, -0.5], dtype=torch.float64)
    best = int(rewards.argmax())
    target = float((reference + rewards / ALPHA).softmax(dim=0)[best])
    objectives: dict[str, RewardLoss] = {
        "RNCE, best of 4 as the positive": _best_against_the_rest,
        "InfoNCA": lambda r, R: info_nca_loss(r, R, every(r), alpha=ALPHA),
        "NCA": lambda r, R: nca_loss(r, R, every(r), alpha=ALPHA),
    }
    lines = {name: _rounds(reference, rewards, best, objective) for name, objective in objectives.items()}
    ends = {name: line[-1][1] for name, line in lines.items()}
    source = "expected gradient over the rounds"
    statements = [
        Statement(
            "online RNCE with the best of 4: probability of the best after 1000 rounds, towards 1",
            source,
            1.0,
            ends["RNCE, best of 4 as the positive"],
            0.02,
        ),
        # Of what is left, e, a mixed group has a share of order e and a gradient of order e: e falls as its own cube.
        Statement(
            "online RNCE with the best of 4: exponent of the round, from 100 on, in what is left for the others",
            source,
            -0.5,
            fitted_exponent([(n, 1 - p) for n, p in lines["RNCE, best of 4 as the positive"]], start=100),
            0.02,
        ),
        Statement(
            "online InfoNCA: probability of the best after 1000 rounds, that of reference exp(R/alpha)",
            "InfoNCA section 3",
            target,
            ends["InfoNCA"],
            1e-6,
        ),
        zero("online NCA: 1 if the best's probability is above 0.9 after 1000 rounds", source, float(ends["NCA"] > 0.9), 0.0),
    ]
    curve = Curve(
        "best_of_n",
        "Probability of the best completion over online rounds",
        "round",
        "probability",
        {**lines, "target of InfoNCA": [(1.0, target), (float(NUM_ROUNDS), target)]},
        log_x=True,
        note="Each round takes one step of the exact expected gradient over all groups of 4 that the policy could draw.",
    )
    return Findings(statements, [curve])


def _best_against_the_rest(r: Float[Tensor, "N K"], rewards: Float[Tensor, "N K"]) -> Float[Tensor, " N"]:
    """RNCE of a group's best against everything below it."""
    positive = pick_positive(rewards, every(r), generator=None)
    below = eligible_negatives(rewards, positive, every(r))
    return rnce_loss(r, positive, below.scatter(1, positive.unsqueeze(1), True))


def _rounds(reference: Tensor, rewards: Tensor, best: int, objective: RewardLoss) -> list[tuple[float, float]]:
    """Probability of the best after each round; what a round draws is data, so it carries no gradient."""
    columns = tuples(reference.shape[0], NUM_SAMPLES)
    groups = rewards[columns]
    logits, line = reference.clone(), []
    for number in range(1, NUM_ROUNDS + 1):
        weights = sequence_probabilities(columns, logits.softmax(dim=0))

        def expected(at: Tensor, weights: Tensor = weights) -> Tensor:
            r = at.log_softmax(dim=0) - reference
            return (weights * objective(r[columns], groups)).sum()

        _, gradient = value_and_gradient(expected, logits)
        logits = logits - 2.0 * gradient
        line.append((float(number), float(logits.softmax(dim=0)[best])))
    return line


# --- Likelihood displacement ------------------------------------------------------------------------------------------

# The chosen and the rejected completion lie in much the same direction (cosine 0.86), the rejected one further out.
FEATURES = ((1.0, 0.3), (1.6, -0.4), (-0.5, 0.5), (-0.5, -0.5), (-0.4, 0.6), (-0.6, -0.5))
CHOSEN, REJECTED = 0, 1
NUM_STEPS, LEARNING_RATE = 400, 0.2


def displacement() -> Findings:
    """With a pair of similar completions DPO lowers the chosen one; an anchor brings it back."""
    policy = LinearSoftmax(torch.tensor(FEATURES, dtype=torch.float64))
    losses = {
        "DPO": _pair_loss(policy, DPO(beta=1.0).method()),
        "DPO and chosen NLL (RPO)": _pair_loss(policy, RPO(beta=1.0).method()),
        "NCA of the pair": _pair_loss(policy, NCAPair(beta=1.0).method()),
    }
    lines = {name: _chosen_change(policy, loss) for name, loss in losses.items()}
    source = "likelihood displacement, arXiv 2410.08847"
    features = policy.features
    lead = (features[CHOSEN] - features.mean(dim=0)) @ (features[CHOSEN] - features[REJECTED])
    statements = [
        Statement(
            "similar pair, DPO at the reference: rate of the chosen log-likelihood, (f_w - mean f)(f_w - f_l) / 2",
            source,
            float(lead) / 2,
            _rate(policy, losses["DPO"], CHOSEN),
            EXACT,
        ),
        Statement(
            "similar pair, NCA at the reference: half of DPO's rate, so that its first steps lower the chosen one too",
            "gradient of the losses at the reference",
            float(lead) / 4,
            _rate(policy, losses["NCA of the pair"], CHOSEN),
            EXACT,
        ),
    ]
    for name, predicted in (("DPO", 1.0), ("DPO and chosen NLL (RPO)", 0.0), ("NCA of the pair", 0.0)):
        statements.append(
            Statement(
                f"similar pair, {name}: 1 if the chosen one is less likely than at the start after 400 steps",
                source,
                predicted,
                float(lines[name][-1][1] < 0),
                0.0,
            )
        )
    curve = Curve(
        "displacement",
        "Log-likelihood of the chosen completion of a similar pair",
        "step",
        "change since the start (nats)",
        lines,
        note="NCA and DPO start downwards together; only terms that hold the chosen one itself turn the line up.",
    )
    return Findings(statements, [curve])


def _pair_loss(policy: LinearSoftmax, method: Method) -> Loss:
    """A method's loss of the pair by the policy's parameters; the reference has all parameters 0."""
    pair, rewards = [CHOSEN, REJECTED], torch.tensor([[1.0, 0.0]], dtype=torch.float64)

    def loss(parameters: Tensor) -> Tensor:
        logprobs = policy.logprobs(parameters)[pair].unsqueeze(0)
        reference = policy.logprobs(torch.zeros_like(parameters))[pair].unsqueeze(0)
        return method.loss(LossInputs(logprobs - reference, logprobs, rewards, torch.ones_like(rewards), every(rewards)))

    return loss


def _rate(policy: LinearSoftmax, loss: Loss, completion: int) -> float:
    """Rate at which a loss's gradient flow changes a completion's log-likelihood at the reference."""
    start = torch.zeros(policy.features.shape[1], dtype=torch.float64)
    _, gradient = value_and_gradient(loss, start)
    _, rise = value_and_gradient(lambda at: policy.logprobs(at)[completion], start)
    return -float(gradient @ rise)


def _chosen_change(policy: LinearSoftmax, loss: Loss) -> list[tuple[float, float]]:
    parameters = torch.zeros(policy.features.shape[1], dtype=torch.float64)
    before = float(policy.logprobs(parameters)[CHOSEN])
    line = [(0.0, 0.0)]
    for step in range(1, NUM_STEPS + 1):
        parameters = parameters - LEARNING_RATE * value_and_gradient(loss, parameters)[1]
        line.append((float(step), float(policy.logprobs(parameters)[CHOSEN]) - before))
    return line


def single_steps_of_nca() -> Findings:
    """One step of NCA from the reference can't lower the best candidate of a table, and can where features are shared."""
    rewards = numbers(200, 4, seed=63)
    tabular = LinearSoftmax(torch.eye(6, dtype=torch.float64))
    shared = [LinearSoftmax(features) for features in numbers(200, 6, 3, seed=64)]
    in_table = torch.tensor([_nca_rate(tabular, group) for group in rewards], dtype=torch.float64)
    with_shared = torch.tensor([_nca_rate(p, group) for p, group in zip(shared, rewards, strict=True)], dtype=torch.float64)
    source = "NCA section 4"
    lowered = share(with_shared < 0)
    return Findings(
        [
            zero(
                "first NCA step, tabular policy: share of 200 groups whose best candidate becomes less likely",
                source,
                share(in_table < 0),
                0.0,
            ),
            Statement(
                f"first NCA step, shared features: 1 if any of 200 groups' best becomes less likely ({lowered:.0%} do)",
                source,
                1.0,
                float(lowered > 0),
                0.0,
            ),
        ]
    )


def _nca_rate(policy: LinearSoftmax, rewards: Float[Tensor, " K"]) -> float:
    """Rate at which NCA's gradient flow changes the best candidate's log-likelihood at the reference."""
    group, start = rewards.shape[0], torch.zeros(policy.features.shape[1], dtype=torch.float64)

    def loss(at: Tensor) -> Tensor:
        r = (policy.logprobs(at) - policy.logprobs(start))[:group].unsqueeze(0)
        return nca_loss(r, rewards.unsqueeze(0), every(r), alpha=1.0)

    return _rate(policy, loss, int(rewards.argmax()))


EXPERIMENTS = (pair_gradient, beta_mismatch, best_of_n, displacement, single_steps_of_nca)

"""Liger's kernel for the vocabulary head on a Hopper GPU: the numbers of our own head."""

from __future__ import annotations

import pytest
import torch
from test_attention import SIZES, model_of, on

from ncalign.model.fused_head import fused_token_logprobs, why_not_fused
from ncalign.model.logprobs import LogprobModel, _token_logprobs
from ncalign.model.sharing import share_prompts, why_head_differs


@pytest.fixture
def hopper(cuda: torch.device) -> torch.device:
    reason = why_not_fused(model_of(cuda, torch.bfloat16), device=cuda, dtype=torch.bfloat16)
    if reason is not None:
        pytest.skip(reason)
    return cuda


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("tokens", "vocabulary", "width", "scale"), [(1, 512, 64, 1.0), (300, 1001, 200, 0.25), (5000, 32_000, 1024, 1.0)]
)
def test_values_and_gradients_of_weighted_tokens(
    hopper: torch.device, tokens: int, vocabulary: int, width: int, scale: float, dtype: torch.dtype, frozen: bool
) -> None:
    torch.manual_seed(0)
    # Numbers that bfloat16 holds exactly: what is left is the rounding of products.
    hidden = torch.randn(tokens, width, device=hopper).bfloat16().to(dtype).requires_grad_()
    weight = (torch.randn(vocabulary, width, device=hopper) / width**0.5).bfloat16().to(dtype).requires_grad_(not frozen)
    targets = torch.randint(vocabulary, (tokens,), device=hopper)
    weights = torch.randn(tokens, device=hopper)
    found = fused_token_logprobs(weight, hidden, targets, scale=scale)
    gradients = torch.autograd.grad((found * weights).sum(), [hidden] if frozen else [hidden, weight])
    exact = [tensor.detach().float().requires_grad_() for tensor in (hidden, weight)]
    expected = _token_logprobs(lambda states: scale * states @ exact[1].T, exact[0], targets, 1024)
    right = torch.autograd.grad((expected * weights).sum(), exact)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected.detach(), rtol=0, atol=0.02)
    for gradient, one in zip(gradients, right, strict=False):
        assert gradient.dtype == dtype
        assert (gradient.float() - one).norm() < 0.02 * one.norm()


@pytest.mark.parametrize("once", [False, True])
def test_the_model_through_the_kernel_is_the_model(hopper: torch.device, once: bool) -> None:
    policy = model_of(hopper, torch.float32)
    assert share_prompts(policy) is None
    model = LogprobModel(policy, autocast=torch.bfloat16)
    assert why_head_differs(model, device=hopper) is None
    for sizes in SIZES:
        batch, found = on(hopper, sizes), []
        every = torch.arange(batch.candidate_mask.shape[1]).expand(batch.candidate_mask.shape)
        every = every.masked_fill(~batch.candidate_mask.cpu(), -1)
        for fused in (False, True):
            model.fused_head = fused
            policy.zero_grad(set_to_none=True)
            logprobs = model(batch, choose=(lambda scores, every=every: every) if once else None).logprobs
            (logprobs * torch.linspace(-1.0, 1.0, logprobs.numel(), device=hopper).view_as(logprobs)).sum().backward()
            found.append((logprobs.detach(), torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None])))
        (own, own_gradients), (liger, gradients) = found
        assert (liger - own).abs().max() < 0.02 * own.abs().max()
        assert (gradients - own_gradients).norm() < 0.05 * own_gradients.norm()

"""Completion log-probs ``[B, K]`` of a group batch.

This is the one place that runs the model for its log-probs. Logits exist only at completion positions and only for a chunk of
them at a time; with gradients, a chunk's logits are computed again in the backward pass, so that the memory of the
vocabulary head does not grow with the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from peft import PeftModel
from peft.helpers import disable_input_dtype_casting
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from ncalign.model.attention import shares_prompts
from ncalign.model.batching import GroupBatch
from ncalign.model.fused_head import formula_of, fused_token_logprobs, precision_of
from ncalign.model.layout import Layout, completions_layout, padded_layout, prompts_layout, shared_layout
from ncalign.model.quantized import num_weights
from ncalign.model.routing import expert_use

_CHUNK_LOGITS = {"cpu": 2**22, "other": 2**26}
"""Logits held at a time: 16 MiB in float32 on a CPU, 256 MiB on an accelerator."""


Cells = Sequence[Sequence[int]]
"""Candidates of each of B groups, S each, as indices into K; -1 for none."""


class Scored(NamedTuple):
    """What a pass gives; tensors, so that data-parallel and sharded wrappers see all that gradients flow through.

    Attributes:
        logprobs: nats, of the wanted candidates.
        scores: of those that were read to choose them, without gradients.
        expert_use: of each wanted candidate's row, how often each expert was picked and the sum of its probabilities.
    """

    logprobs: Float[Tensor, "B S"]
    scores: Float[Tensor, "B R"] | None = None
    expert_use: Float[Tensor, "B S 2 E"] | None = None


class LogprobModel(nn.Module):
    """A language model whose forward pass is :func:`completion_logprobs`.

    Data-parallel and sharded wrappers hook a module's forward; this one puts the body and the head inside it.

    Args:
        model: the model.
        autocast: run in this precision while the weights keep their own.

    Attributes:
        fused_head: whether the head runs through Liger's kernel where it computes in bfloat16; set once it was found to apply.
    """

    def __init__(self, model: PreTrainedModel | PeftModel, *, autocast: torch.dtype | None = None) -> None:
        super().__init__()
        self.model = model
        self.autocast = autocast
        self.fused_head = False
        self._no_split_modules = list(base_causal_model(model)._no_split_modules or [])

    def forward(
        self,
        batch: GroupBatch,
        select: Cells | None = None,
        *,
        choose: Callable[[Tensor], Tensor] | None = None,
        dtype: torch.dtype | None = None,
        experts_per_token: int | None = None,
    ) -> Scored:
        """See :func:`scored_completions`, or with ``choose`` :func:`chosen_logprobs`, which scores those of ``select``.

        ``select`` is no tensor: a wrapper would move one to the accelerator, for the host to wait for. ``dtype`` stands in for
        the model's own autocast where no gradient flows; float32 switches it off.
        """
        if choose is not None:
            with self._precision(batch, self.autocast):
                scoring = self._precision(batch, dtype)
                return chosen_logprobs(
                    self.model,
                    batch,
                    choose,
                    read=select,
                    scoring=scoring,
                    experts_per_token=experts_per_token,
                    fused_head=self.fused_head,
                )
        with self._precision(batch, dtype or self.autocast):
            return scored_completions(
                self.model, batch, select=select, experts_per_token=experts_per_token, fused_head=self.fused_head
            )

    def prepare_parts(self) -> None:
        """Nothing; a sharded wrapper prepares the model's parts before it is called."""

    def tie_weights(self) -> None:
        """Tie embeddings and head where the model has one matrix for both; accelerate asks for it when it moves weights."""
        base_causal_model(self.model).tie_weights()

    @contextmanager
    def _precision(self, batch: GroupBatch, dtype: torch.dtype | None) -> Iterator[None]:
        if dtype is None:
            yield
            return
        # Without this peft casts every input of a float32 adapter to float32 and back, which costs more than the model itself.
        uncast = disable_input_dtype_casting(self.model) if isinstance(self.model, PeftModel) else nullcontext()
        rounded, device = dtype != torch.float32, batch.tokens.device.type
        # Kept casts would outlive the layers that sharding gathers one by one.
        kept = not isinstance(self, FSDPModule)
        with uncast, torch.autocast(device, dtype=dtype if rounded else None, enabled=rounded, cache_enabled=kept):
            yield


def completion_logprobs(
    model: PreTrainedModel | PeftModel,
    batch: GroupBatch,
    *,
    select: Int[Tensor, "B S"] | None = None,
    chunk_tokens: int | None = None,
) -> Float[Tensor, "B S"]:
    """Log-probability of each completion given its prompt, summed over its tokens (EOS included), in float32.

    ``log π(y_k|x) = Σ_t log softmax(logits_t)[y_{k,t}]``

    Args:
        model: a Hugging Face causal language model, or a PEFT model around one.
        batch: B groups of at most K candidates.
        select: the candidates wanted, as indices into K; -1 for none. All of them by default (S = K).
        chunk_tokens: positions whose logits are held at a time; by default what fits a fixed budget.

    Returns:
        Nats, ``[B, S]``; 0 where there is no candidate. float64 for a float64 model.

    Raises:
        ValueError: ``model`` is not a causal language model.
    """
    return scored_completions(model, batch, select=select, chunk_tokens=chunk_tokens).logprobs


def scored_completions(
    model: PreTrainedModel | PeftModel,
    batch: GroupBatch,
    *,
    select: Int[Tensor, "B S"] | Cells | None = None,
    chunk_tokens: int | None = None,
    experts_per_token: int | None = None,
    fused_head: bool = False,
) -> Scored:
    """:func:`completion_logprobs`, and with ``experts_per_token``, a router's picks, what they used of the experts.

    ``fused_head``: as :class:`LogprobModel` has it.
    """
    causal = base_causal_model(model)
    wanted, places = _wanted(batch, select)
    if not any(wanted):
        nothing = torch.zeros(places.shape, device=batch.tokens.device)
        return Scored(nothing, expert_use=None if experts_per_token is None else _no_use(nothing))
    if shares_prompts(causal):
        layout = shared_layout(batch.tokens, batch.spans, wanted, scored=batch.scored)
    else:
        layout = padded_layout(batch.tokens, batch.spans, wanted, pad_token_id=batch.pad_token_id, scored=batch.scored)
    hidden, use = _body(causal, layout, experts_per_token=experts_per_token)
    logprobs = _summed(causal, hidden.flatten(0, 1), layout, places, chunk_tokens, fused_head=fused_head)
    return Scored(logprobs, expert_use=None if use is None else _used(use, layout, places))


def _summed(
    causal: PreTrainedModel,
    hidden: Float[Tensor, "N D"],
    layout: Layout,
    places: Tensor,
    chunk_tokens: int | None = None,
    *,
    fused_head: bool = False,
) -> Float[Tensor, "B S"]:
    predicting = hidden[layout.predictors]
    if fused_head and precision_of(predicting) == torch.bfloat16:
        head = causal.get_output_embeddings()
        assert head is not None
        token_logprobs = fused_token_logprobs(head.weight, predicting, layout.targets, scale=formula_of(causal).scale)
    else:
        chunk = chunk_tokens or _chunk_tokens(causal, hidden.device)
        token_logprobs = _token_logprobs(head_of(causal), predicting, layout.targets, chunk)
    # Summed in float64 and rounded once: float32 steps by 3e-5 at 300 nats. Metal has no float64.
    terms = token_logprobs if token_logprobs.device.type == "mps" else token_logprobs.double()
    # One more candidate than there are stands for those that are absent.
    summed = terms.new_zeros(layout.num_candidates + 1).index_add(0, layout.owners, terms)
    return summed[places.to(summed.device, non_blocking=True)].to(token_logprobs.dtype)


def chosen_logprobs(
    model: PreTrainedModel | PeftModel,
    batch: GroupBatch,
    choose: Callable[[Float[Tensor, "B R"]], Int[Tensor, "B S"]],
    *,
    read: Int[Tensor, "B R"] | Cells | None = None,
    scoring: AbstractContextManager[None],
    experts_per_token: int | None = None,
    fused_head: bool = False,
) -> Scored:
    """Log-probs with gradients of the candidates that are chosen by those of others, each prompt computed once.

    The prompts go through the model first, with gradients; the completions that are read follow on their keys and values
    without, and then the chosen ones with gradients: `3P + RcT + 3ScT` forward passes of a token, for a prompt of P tokens and
    completions of T.

    Args:
        model: a model that shares prompts.
        batch: B groups of at most K candidates.
        choose: from the log-probs of the candidates read (0 where there is none) to the wanted ones, as indices into K; -1 for
            none.
        read: the candidates whose log-probs it is given, likewise; all of them by default (R = K).
        scoring: context, such as a precision, in which they are scored.
        experts_per_token: experts that a router picks for a token, if what the wanted candidates used of them is wanted too.
        fused_head: as :class:`LogprobModel` has it.
    """
    causal = base_causal_model(model)
    prompts = prompts_layout(batch.tokens, batch.spans)
    segments = prompts.segments
    assert segments is not None
    # Looked up once: each look-up's backward pass would fill a gradient as large as the vocabulary.
    embedded = causal.get_input_embeddings()(batch.tokens)
    hidden, prompts_use = _body(causal, prompts, embedded, experts_per_token)
    ends = hidden[0][prompts.predictors]
    if torch.is_autocast_enabled(ends.device.type):
        # Autocast keeps the first cast of a weight: the head's must not be one without gradients.
        head_of(causal)(ends[:1])

    def follow(select: Tensor | Cells | None, prompts_use: Tensor | None) -> Scored:
        wanted, places = _wanted(batch, select)
        if not any(wanted):
            nothing = ends.new_zeros(places.shape) + 0.0 * ends.sum()
            return Scored(nothing, expert_use=None if prompts_use is None else _no_use(nothing))
        layout = completions_layout(batch.tokens, batch.spans, wanted, segments, scored=batch.scored)
        hidden, use = _body(causal, layout, embedded, experts_per_token if prompts_use is not None else None)
        logprobs = _summed(causal, torch.cat([ends, hidden[0]]), layout, places, fused_head=fused_head)
        if prompts_use is None or use is None:
            return Scored(logprobs)
        return Scored(logprobs, expert_use=_used(torch.cat([prompts_use, use]), layout, places))

    with torch.no_grad(), scoring:
        scores = follow(read, None).logprobs
    return follow(choose(scores), prompts_use)._replace(scores=scores)


def _used(pieces: Float[Tensor, "P 2 E"], layout: Layout, places: Int[Tensor, "B S"]) -> Float[Tensor, "B S 2 E"]:
    """What each wanted candidate's row used: the pieces that it consists of, added up."""
    rows = pieces[torch.tensor(layout.rows, device=pieces.device)].sum(1)
    return torch.cat([rows, torch.zeros_like(rows[:1])])[places.to(pieces.device)]


def _no_use(nothing: Float[Tensor, "B S"]) -> Float[Tensor, "B S 2 0"]:
    return nothing.new_zeros(*nothing.shape, 2, 0)


def _wanted(batch: GroupBatch, select: Tensor | Cells | None) -> tuple[list[list[int]], Int[Tensor, "B S"]]:
    """The candidates of each group that are asked for, each once, and the place of each cell's among all of them."""
    sizes = [len(span.completions) for span in batch.spans]
    cells = [list(range(size)) for size in sizes] if select is None else _listed(select)
    wanted = [sorted({k for k in row if k >= 0}) for row in cells]
    width = batch.candidate_mask.shape[1] if select is None else len(cells[0])
    absent = sum(map(len, wanted))
    places = torch.full((len(sizes), width), absent)
    first = 0
    for b, (row, chosen) in enumerate(zip(cells, wanted, strict=True)):
        at = {k: first + place for place, k in enumerate(chosen)}
        for s, k in enumerate(row):
            places[b, s] = at.get(k, absent)
        first += len(chosen)
    return wanted, places


def _listed(select: Tensor | Cells) -> Cells:
    found: Cells = select.tolist() if isinstance(select, Tensor) else select
    return found


def _body(
    causal: PreTrainedModel, layout: Layout, embedded: Tensor | None = None, experts_per_token: int | None = None
) -> tuple[Tensor, Float[Tensor, "P 2 E"] | None]:
    """Last hidden states of a layout's rows, and what its pieces used of the experts; the tokens' embeddings may be at hand."""
    # Bodies without routers need not know the name.
    routed = {} if experts_per_token is None else {"output_router_logits": True}
    out = _run(causal, layout, embedded, routed)
    use = None
    if experts_per_token is not None:
        use = expert_use(out.router_logits, layout.pieces, experts_per_token=experts_per_token)
    return out.last_hidden_state, use


def _run(causal: PreTrainedModel, layout: Layout, embedded: Tensor | None, routed: dict[str, bool]) -> Any:
    if layout.segments is None:
        # Padding stands at the right, where causal attention keeps it from every real token: no attention mask is needed.
        return causal.base_model(input_ids=layout.input_ids, use_cache=False, **routed)
    # A mask that is given is passed on as it is; without one the model would make one of the row's length squared.
    given = torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=layout.input_ids.device)
    looked_up = None
    if embedded is not None and layout.sources is not None:
        looked_up = embedded.index_select(0, layout.sources).unsqueeze(0)
    return causal.base_model(
        input_ids=layout.input_ids if looked_up is None else None,
        inputs_embeds=looked_up,
        position_ids=layout.position_ids,
        attention_mask=given,
        use_cache=False,
        segments=layout.segments,
        **routed,
    )


def base_causal_model(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """The causal language model itself, whose layers hold the adapter where there is one.

    Raises:
        ValueError: it is something else, such as a `Policy` or a model in a wrapper.
    """
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    if not isinstance(inner, PreTrainedModel):
        raise ValueError(
            f"log-probs need a transformers model, or a PeftModel around one, and got a {type(model).__name__}: for a policy "
            "from load_policy pass policy.model, for a model in a wrapper the module inside it"
        )
    return inner


def head_of(model: PreTrainedModel) -> Callable[[Tensor], Tensor]:
    """The function from last hidden states to logits, with the soft-capping and scaling that some architectures add."""
    head = model.get_output_embeddings()
    assert head is not None
    scale, cap = formula_of(model)

    def logits(hidden: Tensor) -> Tensor:
        out: Tensor = head(hidden)
        if scale != 1.0:
            out = out * scale
        return cap * torch.tanh(out / cap) if cap is not None else out

    return logits


def completion_token_cost(model: PreTrainedModel | PeftModel) -> float:
    """What a completion token costs in a prompt token's forward passes, ``1 + V d / N``: the head on top of N body weights."""
    causal = base_causal_model(model)
    head = causal.get_output_embeddings()
    assert head is not None
    embeddings = {id(weight) for weight in (head.weight, causal.get_input_embeddings().weight)}
    body = sum(num_weights(weight) for weight in causal.parameters() if id(weight) not in embeddings)
    return 1 + float(head.weight.numel()) / max(body, 1)


@torch.no_grad()
def check_head(model: PreTrainedModel | PeftModel) -> None:
    """Compare :func:`head_of` with the model's own logits on a few tokens.

    Raises:
        ValueError: they differ, so that log-probs would be wrong for this architecture.
    """
    causal = base_causal_model(model)
    vocabulary = causal.config.get_text_config().vocab_size
    ids = (torch.arange(1, 9, device=causal.device) * 7 % vocabulary).unsqueeze(0)
    expected = causal(input_ids=ids, use_cache=False).logits.double()
    try:
        found = head_of(causal)(causal.base_model(input_ids=ids, use_cache=False).last_hidden_state).double()
    except (AttributeError, AssertionError, TypeError, RuntimeError) as failure:
        raise ValueError(
            f"{type(causal).__name__} has no head that can be used apart from its body, as log-probs need it "
            f"({str(failure).strip().split(chr(10), 1)[0] or type(failure).__name__}); please report the architecture"
        ) from failure
    error = (found.log_softmax(-1) - expected.log_softmax(-1)).abs().max().item()
    tolerance = 1e-3 if causal.dtype in (torch.float32, torch.float64) else 0.1
    if not error <= tolerance:
        raise ValueError(
            f"{type(causal).__name__} computes its logits in a way that ncalign does not know: "
            f"log-probs differ by {error:.2g}; please report the architecture"
        )


def _token_logprobs(
    head: Callable[[Tensor], Tensor], hidden: Float[Tensor, "C D"], targets: Int[Tensor, " C"], chunk_tokens: int
) -> Float[Tensor, " C"]:
    # Of like size: in the backward pass even a chunk of one token makes a gradient of the head's whole weight.
    number = max(1, round(len(targets) / chunk_tokens))
    chunks = zip(hidden.tensor_split(number), targets.tensor_split(number), strict=True)
    if torch.is_grad_enabled():
        parts = [checkpoint(_chunk, head, h, t, use_reentrant=False, preserve_rng_state=False) for h, t in chunks]
    else:
        parts = [_chunk(head, h, t) for h, t in chunks]
    return torch.cat(parts)


def _chunk(head: Callable[[Tensor], Tensor], hidden: Tensor, targets: Tensor) -> Tensor:
    logits = head(hidden)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return -F.cross_entropy(logits, targets, reduction="none")


def _chunk_tokens(model: PreTrainedModel, device: torch.device) -> int:
    budget = _CHUNK_LOGITS["cpu" if device.type == "cpu" else "other"]
    return max(1, budget // int(model.config.get_text_config().vocab_size))

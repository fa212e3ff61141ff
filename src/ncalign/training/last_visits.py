"""Log-probs of a training set's candidates as they were last seen, for kernels that draw without scoring anything."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from jaxtyping import Float, Int
from torch import Tensor

from ncalign.model.encoding import EncodedGroup
from ncalign.training.saved import LastVisitsState

_NEVER = -1


@dataclass
class LastVisits:
    """What each candidate's log-prob was when it last went through the model with gradients; the same in all processes.

    Visits are kept where they were computed until a group that was visited comes again, once in an epoch, or until all is
    written to a checkpoint: only then do processes tell each other, so that a step waits for nobody.

    Attributes:
        logprobs: of the policy, summed over completion tokens, in nats, float64; NaN where there is no candidate.
        steps: taken before the visit; -1 for a candidate that was not visited yet.
        start: steps taken when the log-probs to begin with were computed.
    """

    logprobs: Float[Tensor, "N K"]
    steps: Int[Tensor, "N K"]
    start: int
    _own: list[tuple[list[int], Tensor, int]] = field(default_factory=list)
    _visited: set[int] = field(default_factory=set)

    @classmethod
    def of(
        cls, groups: Sequence[EncodedGroup], *, start: int = 0, known: Sequence[Sequence[float] | None] | None = None
    ) -> LastVisits:
        """Before the first visit: log-probs that are ``known`` of a group, else the reference's."""
        shape = len(groups), max((len(group.completions) for group in groups), default=0)
        logprobs = torch.full(shape, torch.nan, dtype=torch.float64)
        for row, group in enumerate(groups):
            given = None if known is None else known[row]
            values = group.reference_logprobs if given is None else given
            logprobs[row, : len(values)] = torch.tensor(values, dtype=torch.float64)
        return cls(logprobs, torch.full(shape, _NEVER), start)

    def rows(self, indices: Sequence[int], width: int) -> Float[Tensor, "B K"]:
        """Log-probs of these groups' first ``width`` candidates, no group of which has more."""
        return self.logprobs[list(indices), :width]

    def ages(self, indices: Sequence[int], width: int, *, step: int) -> Float[Tensor, "B K"]:
        """Steps that were taken since, before this step; NaN where there is no candidate."""
        steps = self.steps[list(indices), :width]
        ages = (step - torch.where(steps == _NEVER, self.start, steps)).double()
        return ages.masked_fill(self.rows(indices, width).isnan(), torch.nan)

    def begin(self, indices: Sequence[int], accelerator: Accelerator) -> None:
        """Before a step on these groups, of all processes: what was seen of them must be known to all by now."""
        if not self._visited.isdisjoint(indices):
            self.exchange(accelerator)
        self._visited.update(indices)

    def visit(self, indices: Sequence[int], logprobs: Float[Tensor, "B K"], *, step: int) -> None:
        """Take what a pass of this process computed in a step: NaN where it did not."""
        self._own.append((list(indices), logprobs.detach(), step))

    def exchange(self, accelerator: Accelerator) -> None:
        """Enter all visits since the last exchange, those of other processes too; every process calls it."""
        found = [(indices, logprobs.double().cpu().numpy(), step) for indices, logprobs, step in self._own]
        for indices, values, step in found if accelerator.num_processes == 1 else gather_object(found):
            logprobs, rows = torch.from_numpy(values), torch.tensor(indices)
            seen = ~logprobs.isnan()
            cells = rows.unsqueeze(1).expand_as(seen)[seen], torch.arange(seen.shape[1]).expand_as(seen)[seen]
            self.logprobs[cells], self.steps[cells] = logprobs[seen], step
        self._own.clear()
        self._visited.clear()

    def state(self) -> LastVisitsState:
        """What was visited, once it is exchanged; JSON values."""
        cells = (self.steps != _NEVER).nonzero(as_tuple=True)
        rows, columns, steps = (values.tolist() for values in (*cells, self.steps[cells]))
        return {"rows": rows, "columns": columns, "steps": steps, "logprobs": self.logprobs[cells].tolist()}

    def restore(self, state: LastVisitsState) -> None:
        """Take over from :meth:`state` of the same groups."""
        cells = torch.tensor(state["rows"], dtype=torch.long), torch.tensor(state["columns"], dtype=torch.long)
        self.logprobs[cells] = torch.tensor(state["logprobs"], dtype=torch.float64)
        self.steps[cells] = torch.tensor(state["steps"], dtype=torch.long)

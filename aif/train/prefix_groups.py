"""A prompt and its responses in one row, the prompt run once (`prefix_mask` has the layout).

The prompt's share of the work is done once, forward and backward. Without it Bradley-Terry pairs
run the prompt twice, six comparisons of four responses twelve times, PPO once a sample.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Protocol

import numpy as np
import torch

from aif.train.batch import Batch, Layout, OptimizerStep, cheapest_cuts
from aif.train.prefix_mask import PAD
from aif.train.tokens import TokenRow


@dataclass(frozen=True, slots=True, eq=False)
class SharedPrefix:
    """A prompt group in tokens: the prefix of all K sequences, and the rest of each (never empty);
    with its comparisons or grades, if any."""

    source: str
    shared_T: np.ndarray  # int32
    branches: list[np.ndarray]  # K of [t], int32
    first: list[int] = field(default_factory=list)  # a response's number, one per comparison
    second: list[int] = field(default_factory=list)
    p_first: list[float] = field(default_factory=list)
    grades: list[float] = field(default_factory=list)  # one per response

    @classmethod
    def of(cls, rows: Sequence[TokenRow], **labels: list) -> SharedPrefix:
        """Build it from the sequences of a group. Each sequence keeps at least one own token, for
        its score."""
        ids = [row.ids_T for row in rows]
        shortest = min(map(len, ids))
        heads = np.stack([row_T[: shortest - 1] for row_T in ids])
        same = (heads == heads[0]).all(0)
        common = len(same) if same.all() else int(same.argmin())
        return cls(rows[0].source, ids[0][:common], [row_T[common:] for row_T in ids], **labels)

    @property
    def responses(self) -> int:
        return len(self.branches)

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return len(self.shared_T) + max(map(len, self.branches))

    def __len__(self) -> int:
        """The number of tokens; the prefix counts once."""
        return len(self.shared_T) + sum(map(len, self.branches))


class Objective(Protocol):
    """A loss of scores (see `reward.losses`); `targets` are the labels of a batch."""

    def count(self, row: SharedPrefix) -> int:
        """What a row adds to the number that a step's summed loss is divided by."""

    def targets(self, rows: Sequence[SharedPrefix]) -> dict[str, torch.Tensor]:
        """Tensors for `loss`; responses are numbered through, row by row."""

    def loss(self, scores_N: torch.Tensor, targets: dict[str, torch.Tensor]) -> torch.Tensor:
        """The summed loss, a scalar."""


@dataclass(frozen=True, slots=True)
class PrefixBatch:
    """Rows that run in one forward pass, with N responses in all."""

    input_ids: torch.Tensor  # [B, T]
    position_ids: torch.Tensor  # [B, T]
    branch: torch.Tensor | None  # [B, T]; None: each row is one plain sequence
    ends_N: torch.Tensor  # where each response ends in the flattened rows
    targets: dict[str, torch.Tensor]  # of the objective

    def inputs(self, device: torch.device) -> dict[str, object]:
        """The keyword arguments of `reward.model.scores_of` and of its loss, on `device`."""
        names = ("input_ids", "position_ids", "branch", "ends_N")
        tensors = {name: getattr(self, name) for name in names}
        moved = {k: None if v is None else v.to(device) for k, v in tensors.items()}
        return moved | {"targets": {name: v.to(device) for name, v in self.targets.items()}}


@dataclass(frozen=True)
class PrefixLayout:
    """How groups become micro-batches of at most `micro_tokens` positions (or one longer group).

    With `share` a group is one row; without, each of its responses is one, with the prompt again.
    """

    micro_tokens: int
    pad_id: int
    share: bool
    objective: Objective | None = None  # None: to score, not to learn
    call_tokens: int = 64

    def step(self, rows: Sequence[SharedPrefix]) -> OptimizerStep:
        """All of `rows`, the longest first."""
        batches = [self.batch(group) for group in self.groups(rows)]
        alone = sum(sum(map(len, r.branches)) + r.responses * len(r.shared_T) for r in rows)
        tokens = sum(map(len, rows)) if self.share else alone
        return OptimizerStep(batches, tokens, max(1, sum(map(self.objective.count, rows))))

    def groups(self, rows: Sequence[SharedPrefix]) -> list[list[SharedPrefix]]:
        """The rows of each micro-batch, cut where it costs least."""
        width = len if self.share else (lambda row: row.longest)
        rows = sorted(rows, key=width, reverse=True)
        lines = np.cumsum([0, *(1 if self.share else row.responses for row in rows)])

        def size(start: int, end: int) -> int:
            return int(lines[end] - lines[start]) * width(rows[start])

        return cheapest_cuts(rows, size, self.micro_tokens, self.call_tokens)

    def batch(self, rows: Sequence[SharedPrefix]) -> PrefixBatch:
        """These rows in one micro-batch; responses are numbered through, row by row."""
        lines: list[list[np.ndarray]] = []  # each the parts of a line: what is shared, branches
        for row in rows:
            if self.share:
                lines.append([row.shared_T, *row.branches])
            else:
                lines += [[row.shared_T, branch_T] for branch_T in row.branches]
        shape = len(lines), max(sum(map(len, parts)) for parts in lines)
        ids_BT, position_BT = np.full(shape, self.pad_id), np.zeros(shape, int)
        branch_BT = np.full(shape, PAD)
        ends = []
        for line, parts in enumerate(lines):
            at, shared = 0, len(parts[0])
            for number, part_T in enumerate(parts):
                where = slice(at, at + len(part_T))
                start = shared if number else 0
                ids_BT[line, where] = part_T
                position_BT[line, where] = np.arange(start, start + len(part_T))
                branch_BT[line, where] = number
                at += len(part_T)
                if number:
                    ends.append(line * shape[1] + at - 1)
        return PrefixBatch(
            torch.from_numpy(ids_BT).long(),
            torch.from_numpy(position_BT).long(),
            torch.from_numpy(branch_BT) if self.share else None,
            torch.tensor(ends),
            self.objective.targets(rows) if self.objective else {},
        )


@dataclass(frozen=True)
class SharingLayout(Layout):
    """A layout whose `batches` run a prompt once for all its responses in the same row.

    Each row is a prompt, which is not learned, and a response, which is.
    """

    attention_tokens: int = 1 << 12  # of a row whose attention costs as much as all its products

    def batches(self, rows: Sequence[TokenRow]) -> Iterator[tuple[list[TokenRow], Batch]]:
        """As `Layout.batches`; the same if no two rows share a prompt."""
        members = dict(self._shared(rows))
        if len(members) == len(rows):
            yield from super().batches(rows)
            return
        layout = PrefixLayout(self.micro_tokens, self.pad_id, True, call_tokens=self.call_tokens)
        for group in layout.groups(list(members)):
            shared = layout.batch(group)
            batch = Batch(shared.input_ids, shared.branch > 0, shared.position_ids, shared.branch)
            yield list(chain.from_iterable(members[row] for row in group)), batch

    def _shared(self, rows: Sequence[TokenRow]) -> Iterator[tuple[SharedPrefix, list[TokenRow]]]:
        """The rows of each prompt as one group, or as several if that costs less.

        In one row, each response costs attention to all others, although it is masked. So long
        responses to a short prompt are cheaper in separate rows.
        """
        by_prompt: dict[bytes, list[TokenRow]] = {}
        for row in rows:
            by_prompt.setdefault(row.ids_T[~row.loss_mask_T].tobytes(), []).append(row)
        for same in by_prompt.values():
            prompt_T = same[0].ids_T[~same[0].loss_mask_T]
            total = np.cumsum([0, *(len(row) - len(prompt_T) for row in same)])

            def cost(start: int, end: int, head: int = len(prompt_T), total=total) -> int:
                tokens = head + int(total[end] - total[start])
                return tokens + tokens**2 // self.attention_tokens

            for group in cheapest_cuts(same, cost, self.micro_tokens, 0):
                branches = [row.ids_T[len(prompt_T) :] for row in group]
                yield SharedPrefix(group[0].source, prompt_T, branches), group


def prefix_digest(rows: Sequence[SharedPrefix]) -> str:
    """A sha256 of every token and every label."""
    digest = hashlib.sha256()
    for row in rows:
        for ids_T in (row.shared_T, *row.branches):
            digest.update(len(ids_T).to_bytes(8, "big") + ids_T.tobytes())
        labels = (row.source, row.first, row.second, row.p_first, row.grades)
        digest.update(repr(labels).encode())
    return digest.hexdigest()

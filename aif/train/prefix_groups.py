"""A prompt and its responses in one row, the prompt run once (`branches` says how they lie).

The prompt's share of the work is done once, forward and backward (Bradley-Terry pairs pay twice for
it, six comparisons of four responses twelve times, PPO as often as it samples).
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
    """A group in tokens: what all responses begin with, and how each goes on (never empty).

    `first`, `second` and `p_first` are its comparisons, `grades` what is known of each response.
    """

    source: str
    shared_T: np.ndarray  # int32
    branches: list[np.ndarray]
    first: list[int] = field(default_factory=list)
    second: list[int] = field(default_factory=list)
    p_first: list[float] = field(default_factory=list)
    grades: list[float] = field(default_factory=list)

    @classmethod
    def of(cls, sequences: Sequence[TokenRow], **known: list) -> SharedPrefix:
        """The sequences of one group; each keeps a token of its own, where its score is read."""
        ids = [sequence.ids_T for sequence in sequences]
        shortest = min(map(len, ids))
        heads = np.stack([row[: shortest - 1] for row in ids])
        same = (heads == heads[0]).all(0)
        common = len(same) if same.all() else int(same.argmin())
        return cls(sequences[0].source, ids[0][:common], [row[common:] for row in ids], **known)

    @property
    def responses(self) -> int:
        return len(self.branches)

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return len(self.shared_T) + max(map(len, self.branches))

    def __len__(self) -> int:
        """Tokens, what is shared counted once."""
        return len(self.shared_T) + sum(map(len, self.branches))


class Objective(Protocol):
    """A loss of scores, with what it needs to know of a batch (see `preference_losses`)."""

    def count(self, tree: SharedPrefix) -> int:
        """What a tree adds to the number that a step's summed loss is divided by."""

    def targets(self, trees: Sequence[SharedPrefix]) -> dict[str, torch.Tensor]:
        """Tensors for `loss`; responses are numbered through, tree by tree."""

    def loss(self, scores_N: torch.Tensor, targets: dict[str, torch.Tensor]) -> torch.Tensor:
        """The summed loss, a scalar."""


@dataclass(frozen=True, slots=True)
class PrefixBatch:
    """Trees that are run at once, [B, T]; `ends_N` are places in the flattened rows where the
    responses end, in order. `branch` is None where each row is one plain sequence."""

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    branch: torch.Tensor | None
    ends_N: torch.Tensor
    targets: dict[str, torch.Tensor]

    def inputs(self, device: torch.device) -> dict[str, object]:
        """The keyword arguments of `scoring.scores_forward`, on `device`."""
        names = ("input_ids", "position_ids", "branch", "ends_N")
        found = {name: getattr(self, name) for name in names}
        moved = {k: None if v is None else v.to(device) for k, v in found.items()}
        return moved | {"targets": {name: v.to(device) for name, v in self.targets.items()}}


@dataclass(frozen=True)
class PrefixLayout:
    """How trees become micro-batches of at most `micro_tokens` positions (or one longer tree).

    With `share` a tree is one row; without, each of its responses is one, with the prompt again.
    """

    micro_tokens: int
    pad_id: int
    share: bool
    objective: Objective | None = None  # None: to score, not to learn
    call_tokens: int = 64

    def step(self, trees: Sequence[SharedPrefix]) -> OptimizerStep:
        """All of `trees`, the longest first."""
        batches = [self.batch(group) for group in self.groups(trees)]
        alone = sum(sum(map(len, t.branches)) + t.responses * len(t.shared_T) for t in trees)
        tokens = sum(map(len, trees)) if self.share else alone
        return OptimizerStep(batches, tokens, max(1, sum(map(self.objective.count, trees))))

    def groups(self, trees: Sequence[SharedPrefix]) -> list[list[SharedPrefix]]:
        """Trees that lie in one micro-batch each, cut where it costs least."""
        width = len if self.share else (lambda tree: tree.longest)
        trees = sorted(trees, key=width, reverse=True)
        rows = np.cumsum([0, *(1 if self.share else tree.responses for tree in trees)])

        def size(start: int, end: int) -> int:
            return int(rows[end] - rows[start]) * width(trees[start])

        cuts = cheapest_cuts(len(trees), size, self.micro_tokens, self.call_tokens)
        return [trees[start:end] for start, end in cuts]

    def batch(self, trees: Sequence[SharedPrefix]) -> PrefixBatch:
        """These trees in one micro-batch; responses are numbered through, tree by tree."""
        rows: list[list[np.ndarray]] = []  # each the parts of a row: what is shared, then branches
        for tree in trees:
            if self.share:
                rows.append([tree.shared_T, *tree.branches])
            else:
                rows += [[tree.shared_T, branch] for branch in tree.branches]
        width = max(sum(map(len, parts)) for parts in rows)
        ids_BT = np.full((len(rows), width), self.pad_id)
        position_BT = np.zeros((len(rows), width), int)
        branch_BT = np.full((len(rows), width), PAD)
        ends = []
        for row, (shared_T, *branches) in enumerate(rows):
            at = start = len(shared_T)
            ids_BT[row, :at], position_BT[row, :at], branch_BT[row, :at] = (
                shared_T, np.arange(at), 0,
            )  # fmt: skip
            for number, branch in enumerate(branches, 1):
                where = slice(at, at + len(branch))
                ids_BT[row, where] = branch
                position_BT[row, where] = np.arange(start, start + len(branch))
                branch_BT[row, where] = number
                at += len(branch)
                ends.append(row * width + at - 1)
        return PrefixBatch(
            torch.from_numpy(ids_BT).long(),
            torch.from_numpy(position_BT).long(),
            torch.from_numpy(branch_BT) if self.share else None,
            torch.tensor(ends),
            self.objective.targets(trees) if self.objective else {},
        )


@dataclass(frozen=True)
class SharingLayout(Layout):
    """A layout whose `batches` run a prompt once for those of its responses that lie together.

    The rows are `experience.tokens_of`'s: a prompt, which is not learned, and a response, which is.
    """

    attention_tokens: int = 1 << 12  # of a row whose attention costs as much as all its products

    def batches(self, rows: Sequence[TokenRow]) -> Iterator[tuple[list[TokenRow], Batch]]:
        """As `Layout.batches`. Where no two rows have a prompt in common it is the plain one."""
        held = {id(tree): (tree, some) for tree, some in self._trees(rows)}
        if len(held) == len(rows):
            yield from super().batches(rows)
            return
        layout = PrefixLayout(self.micro_tokens, self.pad_id, True, call_tokens=self.call_tokens)
        for trees in layout.groups([tree for tree, _ in held.values()]):
            made = layout.batch(trees)
            batch = Batch(made.input_ids, made.branch > 0, made.position_ids, made.branch)
            yield list(chain.from_iterable(held[id(tree)][1] for tree in trees)), batch

    def _trees(self, rows: Sequence[TokenRow]) -> Iterator[tuple[SharedPrefix, list[TokenRow]]]:
        """Trees with their rows: those of one prompt, in as many trees as cost least.

        Side by side each response costs attention to all others, though it is masked: long ones
        after a short prompt are better run apart.
        """
        groups: dict[bytes, list[TokenRow]] = {}
        for row in rows:
            groups.setdefault(row.ids_T[~row.loss_mask_T].tobytes(), []).append(row)
        for some in groups.values():
            prompt_T = some[0].ids_T[~some[0].loss_mask_T]
            total = np.cumsum([0, *(len(row) - len(prompt_T) for row in some)])

            def cost(start: int, end: int, head: int = len(prompt_T), total=total) -> int:
                tokens = head + int(total[end] - total[start])
                return tokens + tokens**2 // self.attention_tokens

            for start, end in cheapest_cuts(len(some), cost, self.micro_tokens, 0):
                branches = [row.ids_T[len(prompt_T) :] for row in some[start:end]]
                yield SharedPrefix(some[0].source, prompt_T, branches), some[start:end]


def prefix_digest(trees: Sequence[SharedPrefix]) -> str:
    """A sha256 of every token and everything known of it."""
    found = hashlib.sha256()
    for tree in trees:
        for ids in (tree.shared_T, *tree.branches):
            found.update(len(ids).to_bytes(8, "big") + ids.tobytes())
        known = (tree.source, tree.first, tree.second, tree.p_first, tree.grades)
        found.update(repr(known).encode())
    return found.hexdigest()

"""Sequences that begin alike in one row, what they begin with run once.

    tokens    p p p p p  a a a a  b b b       two responses to a prompt
    branch    0 0 0 0 0  1 1 1 1  2 2 2       0: what all begin with
    position  0 1 2 3 4  5 6 7 8  5 6 7

A token sees what stands before it in its own branch and in branch 0, and has the position that it
would have had alone: every hidden state is the one of the plain sequence, and the gradient too.
"""

from __future__ import annotations

from typing import Any

import torch

from aif.errors import InputError
from aif.train.model import inner

PAD = -1  # the branch of padding
PLAIN = {"full_attention"}


def shares(model: Any, wanted: bool | None, stage: str) -> bool:
    """Whether prompts are run once: where the attention takes a mask of who sees whom.

    Flash attention takes none, and a sliding window would not be in it. Raises InputError where
    the stage's `share_prompt` is true and they cannot be.
    """
    config = inner(model).config.get_text_config()
    full = set(getattr(config, "layer_types", None) or PLAIN) <= PLAIN
    full &= getattr(config, "sliding_window", None) is None or bool(
        getattr(config, "layer_types", None)
    )
    can = full and config._attn_implementation == "sdpa"
    if wanted and not can:
        raise InputError(
            stage, "share_prompt", got="true for a model whose attention cannot",
            expected="full attention on sdpa, or no share_prompt",
        )  # fmt: skip
    return can if wanted is None else wanted


def body_inputs(
    input_ids: torch.Tensor, position_ids: torch.Tensor | None, branch_BT: torch.Tensor | None
) -> dict[str, Any]:
    """The keyword arguments of a transformers model's body; `branch_BT` is None where each row is
    one plain sequence."""
    # A mask of four dimensions is taken as it is. None is plain causal attention; what comes after
    # a sequence's end, where rows are padded, is seen by nothing that is read.
    mask = None if branch_BT is None else branch_mask(branch_BT)
    return {
        "input_ids": input_ids,
        "position_ids": position_ids,
        "attention_mask": mask,
        "use_cache": False,
    }


def branch_mask(branch_BT: torch.Tensor) -> torch.Tensor:
    """[B, 1, T, T], True where token i may look at token j: not later, and of its own branch or of
    what is shared. Padding looks at padding, so that no row of a softmax is empty."""
    i, j = branch_BT[:, :, None], branch_BT[:, None, :]
    causal_TT = torch.ones(
        branch_BT.shape[1:] * 2, dtype=torch.bool, device=branch_BT.device
    ).tril()
    return (((i == j) | (j == 0)) & causal_TT)[:, None]


def before(hidden_BTD: torch.Tensor, branch_BT: torch.Tensor) -> torch.Tensor:
    """[B, T, D], for each token the state that predicts it: of the token to its left, or where a
    branch begins of the last one that is shared, the same for all branches.

    Something has to be shared. The gradient of that one state is a sum over a dimension and no
    scatter, whose order would be another every time.
    """
    last_B = (branch_BT == 0).sum(1) - 1
    last_B1D = hidden_BTD[torch.arange(len(last_B), device=last_B.device), last_B][:, None]
    begins_BT = branch_BT != branch_BT.roll(1, 1)
    return torch.where(begins_BT[:, :, None], last_B1D, hidden_BTD.roll(1, 1))

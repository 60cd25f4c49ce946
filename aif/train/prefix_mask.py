"""Sequences with a shared prefix in one row, the prefix run once.

    tokens    p p p p p  a a a a  b b b       two responses to a prompt
    branch    0 0 0 0 0  1 1 1 1  2 2 2       0: the shared prefix
    position  0 1 2 3 4  5 6 7 8  5 6 7

A token sees the earlier tokens of its own branch and of branch 0, and its position is its position
in the plain sequence. So every hidden state and every gradient is the same as in the plain
sequence.
"""

from __future__ import annotations

from typing import Any

import torch

from aif.errors import InputError
from aif.train.model import inner

PAD = -1  # the branch of padding
PLAIN = {"full_attention"}


def shares(model: Any, setting: bool | None, stage: str) -> bool:
    """Whether prompts run once. This needs attention that accepts a mask for each pair of tokens.

    Flash attention accepts none, and such a mask ignores a sliding window. Raises InputError
    if the stage's `share_prompt`, the `setting`, is true and the model cannot.
    """
    config = inner(model).config.get_text_config()
    full = set(getattr(config, "layer_types", None) or PLAIN) <= PLAIN
    full &= getattr(config, "sliding_window", None) is None or bool(
        getattr(config, "layer_types", None)
    )
    can = full and config._attn_implementation == "sdpa"
    if setting and not can:
        raise InputError(
            stage, "share_prompt", got="true for a model whose attention cannot",
            expected="full attention on sdpa, or no share_prompt",
        )  # fmt: skip
    return can if setting is None else setting


def body_inputs(
    input_ids: torch.Tensor, position_ids: torch.Tensor | None, branch_BT: torch.Tensor | None
) -> dict[str, Any]:
    """The keyword arguments of a transformers model's body; `branch_BT` is None where each row is
    one plain sequence."""
    # transformers takes a mask of four dimensions as it is. None is causal attention, which is
    # enough for padded rows: no state that is read sees the padding after it.
    mask = None if branch_BT is None else branch_mask(branch_BT)
    return {
        "input_ids": input_ids,
        "position_ids": position_ids,
        "attention_mask": mask,
        "use_cache": False,
    }


def branch_mask(branch_BT: torch.Tensor) -> torch.Tensor:
    """[B, 1, T, T], True where token i sees token j: j is not later, and of i's branch or shared.
    Padding sees padding, so that no row of a softmax is empty."""
    i, j = branch_BT[:, :, None], branch_BT[:, None, :]
    causal_TT = torch.ones(
        branch_BT.shape[1:] * 2, dtype=torch.bool, device=branch_BT.device
    ).tril()
    return (((i == j) | (j == 0)) & causal_TT)[:, None]


def before(hidden_BTD: torch.Tensor, branch_BT: torch.Tensor) -> torch.Tensor:
    """The state that predicts each token, [B, T, D]: the state of the token to its left, or at the
    start of a branch the state of the last shared token.

    Every row needs a shared token. The gradient of its state is a sum over a dimension; a scatter's
    order would change from run to run.
    """
    last_B = (branch_BT == 0).sum(1) - 1
    last_B1D = hidden_BTD[torch.arange(len(last_B), device=last_B.device), last_B][:, None]
    begins_BT = branch_BT != branch_BT.roll(1, 1)
    return torch.where(begins_BT[:, :, None], last_B1D, hidden_BTD.roll(1, 1))

"""A prompt that is run once for all its responses: scores, loss and gradients are the plain ones.

The oracle is transformers' own sequence classifier, one response at a time.
"""

# ruff: noqa: E402  (what needs torch is imported once torch is known to be there)

from __future__ import annotations

from dataclasses import replace

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import numpy as np
from hypothesis import given
from hypothesis import settings as limits
from hypothesis import strategies as st
from transformers import (
    LlamaConfig,
    LlamaForSequenceClassification,
    MistralConfig,
    MistralForSequenceClassification,
    Qwen2Config,
    Qwen2ForSequenceClassification,
)

from aif.config.settings import RewardSettings
from aif.errors import InputError
from aif.train.model import forward_is
from aif.train.prefix_groups import PrefixLayout, SharedPrefix, prefix_digest
from aif.train.prefix_mask import PAD, branch_mask, shares
from aif.train.reward.losses import OBJECTIVES, Pairs
from aif.train.reward.model import score_loss, scores_of
from aif.train.tokens import TokenRow

KINDS = {
    "llama": (LlamaConfig, LlamaForSequenceClassification, {}),
    "deep llama": (
        LlamaConfig,
        LlamaForSequenceClassification,
        {"num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4},
    ),
    "qwen2": (Qwen2Config, Qwen2ForSequenceClassification, {}),
    "mistral": (MistralConfig, MistralForSequenceClassification, {"sliding_window": None}),
    "sliding mistral": (MistralConfig, MistralForSequenceClassification, {"sliding_window": 6}),
    "sliding qwen2": (
        Qwen2Config,
        Qwen2ForSequenceClassification,
        {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
    ),
    "eager": (LlamaConfig, LlamaForSequenceClassification, {"attn_implementation": "eager"}),
}
SHAREABLE = ["llama", "deep llama", "qwen2", "mistral"]
SEPARATE = ["sliding mistral", "sliding qwen2", "eager"]
LAST = 7  # a token that some responses end in, and one of the pad ids
PROMPTS = {4: 17, 1: 5, 3: 1, 2: 9}  # responses -> tokens of their prompt


def tiny(kind: str = "llama"):
    """A random classifier whose attention is far from even, so that what is seen matters."""
    config, model, changes = KINDS[kind]
    options = {
        "vocab_size": 400, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
        "num_labels": 1, "initializer_range": 0.3, "attention_dropout": 0.0, "pad_token_id": None,
    }  # fmt: skip
    torch.manual_seed(0)
    return model(config(**options | changes)).eval()


def tokens(*ids: int, source: str = "s") -> TokenRow:
    return TokenRow(np.array(ids, np.int32), np.arange(len(ids)) > 0, source)


def groups(seed: int = 0) -> list[list[TokenRow]]:
    """1, 2, 3 and 4 responses to a prompt, of unlike lengths, with one that goes on as another
    does, two that are the same, and some that end in a token that may be the pad's."""
    rng = np.random.default_rng(seed)
    made = []
    for responses, prompt in PROMPTS.items():
        head = rng.integers(8, 399, prompt).tolist()
        tails = [rng.integers(8, 399, rng.integers(1, 14)).tolist() for _ in range(responses)]
        tails[0][-1] = LAST
        if responses > 2:
            tails[1] = tails[0] + [LAST]
        if responses > 3:
            tails[3] = tails[2]
        made.append([tokens(*head, *tail) for tail in tails])
    return made


def labels(responses: int, seed: int = 0) -> dict[str, list]:
    """Comparisons of all with all, either one first, and grades."""
    rng = np.random.default_rng([seed, responses])
    pairs = [(a, b) for a in range(responses) for b in range(responses) if (a + b) % 2 == (a < b)]
    p_first, grades = rng.random(len(pairs)), rng.random(responses)
    return {
        "first": [a for a, b in pairs if a != b],
        "second": [b for a, b in pairs if a != b],
        "p_first": [float(p) for p, (a, b) in zip(p_first, pairs, strict=True) if a != b],
        "grades": grades.tolist(),
    }


def shared(seed: int = 0) -> list[SharedPrefix]:
    return [SharedPrefix.of(group, **labels(len(group), seed)) for group in groups(seed)]


def whole(prefix: SharedPrefix) -> list[list[int]]:
    return [[*prefix.shared_T.tolist(), *branch.tolist()] for branch in prefix.branches]


def own_scores(model, prefixes: list[SharedPrefix]) -> torch.Tensor:
    """transformers' score of every response by itself, [N]."""
    assert model.config.pad_token_id is None
    ids = [torch.tensor([row]) for prefix in prefixes for row in whole(prefix)]
    return torch.cat([model(input_ids=ids_BT).logits[0] for ids_BT in ids])


def gradients(model) -> list[torch.Tensor]:
    return [p.grad.clone() for p in model.parameters()]


def objective_of(name: str = "pairs"):
    return OBJECTIVES[name](RewardSettings(centering=0.05))


def plain(model, prefixes: list[SharedPrefix], name: str = "pairs") -> tuple[float, list]:
    model.zero_grad()
    objective = objective_of(name)
    loss = objective.loss(own_scores(model, prefixes), objective.targets(prefixes))
    loss = loss / sum(map(objective.count, prefixes))
    loss.backward()
    return float(loss.detach()), gradients(model)


def ours(model, prefixes: list[SharedPrefix], name: str = "pairs", **layout) -> tuple[float, list]:
    model.zero_grad()
    objective = objective_of(name)
    options = {"micro_tokens": 10_000, "pad_id": 0, "share": True} | layout
    step, total = PrefixLayout(objective=objective, **options).step(prefixes), 0.0
    with forward_is(model, score_loss(objective)):
        for batch in step.batches:
            loss = model(**batch.inputs(model.device)) / step.loss_items
            loss.backward()
            total += float(loss.detach())
    return total, gradients(model)


def scored(model, prefixes: list[SharedPrefix], **layout) -> torch.Tensor:
    """Our scores of all responses, [N], as one batch."""
    options = {"micro_tokens": 10_000, "pad_id": 0, "share": True} | layout
    batch = PrefixLayout(**options).batch(prefixes).inputs(model.device)
    batch.pop("targets")
    with torch.no_grad():
        return scores_of(model, **batch)


def close(got: tuple[float, list], want: tuple[float, list]) -> None:
    assert got[0] == pytest.approx(want[0], rel=1e-5)
    for ours, theirs in zip(got[1], want[1], strict=True):
        assert theirs.norm() > 0
        assert (ours - theirs).norm() <= 1e-4 * theirs.norm()


def test_what_all_begin_with_is_shared_and_every_response_keeps_a_token():
    prefix = SharedPrefix.of([tokens(1, 2, 3, 4), tokens(1, 2, 5), tokens(1, 2, 3, 9)])
    assert prefix.shared_T.tolist() == [1, 2]
    assert [branch.tolist() for branch in prefix.branches] == [[3, 4], [5], [3, 9]]
    assert (len(prefix), prefix.longest, prefix.responses) == (7, 4, 3)


@pytest.mark.parametrize(
    ("rows", "shared"),
    [
        ([[1, 2, 3], [1, 2, 3]], 2),
        ([[1, 2, 3], [1, 2, 3, 4]], 2),
        ([[1, 2, 3, 4], [1, 2]], 1),
        ([[1, 2, 3]], 2),
        ([[1], [1]], 0),
        ([[1, 2], [3, 2]], 0),
    ],
    ids=["equal", "a prefix", "the first goes on", "one alone", "one token", "nothing in common"],
)
def test_no_branch_is_empty(rows, shared):
    prefix = SharedPrefix.of([tokens(*row) for row in rows])
    assert len(prefix.shared_T) == shared
    assert all(len(branch) for branch in prefix.branches)
    assert whole(prefix) == rows


sequences = st.lists(st.lists(st.integers(1, 3), min_size=1, max_size=6), min_size=1, max_size=5)


@limits(max_examples=60, deadline=None)
@given(sequences)
def test_a_prefix_holds_its_sequences_and_shares_all_it_can(rows):
    prefix = SharedPrefix.of([tokens(*row) for row in rows])
    assert whole(prefix) == rows
    assert all(len(branch) for branch in prefix.branches)
    one_more = {tuple(row[: len(prefix.shared_T) + 1]) for row in rows}
    assert len(one_more) > 1 or len(prefix.shared_T) == min(map(len, rows)) - 1


def test_a_row_is_the_prompt_and_then_its_branches():
    head = [11, 12, 13, 14, 15]
    prefix = SharedPrefix.of([tokens(*head, 21, 22, 23, 24), tokens(*head, 31, 32, 33)])
    batch = PrefixLayout(100, 0, share=True).batch([prefix, SharedPrefix.of([tokens(5, 6)])])
    assert batch.input_ids.tolist() == [[*head, 21, 22, 23, 24, 31, 32, 33], [5, 6] + [0] * 10]
    assert batch.position_ids[0].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 5, 6, 7]
    assert batch.position_ids[1, :2].tolist() == [0, 1]
    assert batch.branch.tolist() == [[0] * 5 + [1] * 4 + [2] * 3, [0, 1] + [PAD] * 10]
    assert batch.ends_N.tolist() == [8, 11, 13]


@limits(max_examples=30, deadline=None)
@given(st.lists(sequences, min_size=1, max_size=3))
def test_a_token_sees_its_own_branch_and_what_is_shared(rows):
    prefixes = [SharedPrefix.of([tokens(*row) for row in group]) for group in rows]
    batch = PrefixLayout(100, 0, share=True).batch(prefixes)
    got = branch_mask(batch.branch)
    assert got.shape == (len(prefixes), 1, *2 * (batch.input_ids.shape[1],))
    for row, prefix in enumerate(prefixes):
        where = [0] * len(prefix.shared_T)
        for number, branch in enumerate(prefix.branches, 1):
            where += [number] * len(branch)
        for i, mine in enumerate(where):
            for j, theirs in enumerate(where):
                assert bool(got[row, 0, i, j]) == (j <= i and theirs in (0, mine))
    assert got.any(-1).all(), "a softmax over nothing is no number"


@pytest.mark.parametrize("kind", SHAREABLE)
@pytest.mark.parametrize("objective", sorted(OBJECTIVES))
def test_loss_and_gradients_are_those_of_transformers(kind, objective):
    model, prefixes = tiny(kind), shared()
    want = plain(model, prefixes, objective)
    close(ours(model, prefixes, objective, share=True), want)
    close(ours(model, prefixes, objective, share=False), want)


@pytest.mark.parametrize("responses", [1, 2, 3, 4])
@pytest.mark.parametrize("share", [True, False])
def test_any_number_of_responses_will_do(responses, share):
    model = tiny()
    prefixes = [
        prefix for seed in range(3) for prefix in shared(seed) if prefix.responses == responses
    ]
    close(ours(model, prefixes, "grades", share=share), plain(model, prefixes, "grades"))


@pytest.mark.parametrize("kind", SEPARATE)
def test_where_nothing_can_be_shared_each_response_is_run_by_itself(kind):
    model, prefixes = tiny(kind), shared()
    assert not shares(model, None, "reward")
    close(ours(model, prefixes, share=False), plain(model, prefixes))


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("micro_tokens", [1, 64, 10_000])
@pytest.mark.parametrize("pad_id", [0, LAST, 399])
def test_how_they_lie_in_memory_changes_nothing(share, micro_tokens, pad_id):
    model, prefixes = tiny(), shared() + shared(1)
    want = plain(model, prefixes)
    layout = {"share": share, "micro_tokens": micro_tokens, "pad_id": pad_id}
    close(ours(model, prefixes, **layout), want)
    close(ours(model, prefixes[::-1], **layout), want)


@pytest.mark.parametrize("share", [True, False])
def test_gradient_checkpointing_changes_nothing(share):
    model, prefixes = tiny(), shared()
    want, runs = plain(model, prefixes), []
    model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: runs.append(1))
    close(ours(model.train(), prefixes, share=share), want)
    once = len(runs)
    model.activation_checkpointing_enable()
    close(ours(model.train(), prefixes, share=share), want)
    assert len(runs) == 3 * once, "the layer was not run again on the way back"


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("pad_id", [0, LAST, 399])
def test_a_score_is_read_at_the_last_token(share, pad_id):
    model, prefixes = tiny(), shared()
    rows = [row for prefix in prefixes for row in whole(prefix)]
    width = max(map(len, rows))
    ids_BT = torch.full((len(rows), width), 399)  # no row has this one, so transformers sees ends
    for n, row in enumerate(rows):
        ids_BT[n, : len(row)] = torch.tensor(row)
    model.config.pad_token_id = 399
    with torch.no_grad():
        want = model(input_ids=ids_BT, attention_mask=ids_BT != 399).logits[:, 0]
    torch.testing.assert_close(
        scored(model, prefixes, share=share, pad_id=pad_id), want, rtol=1e-4, atol=1e-5
    )


def swapped(prefix: SharedPrefix) -> SharedPrefix:
    return replace(
        prefix, first=prefix.second, second=prefix.first, p_first=[1 - p for p in prefix.p_first]
    )


@pytest.mark.parametrize("objective", ["pairs", "ranking"])
def test_which_response_is_called_first_does_not_matter(objective):
    model, prefixes = tiny(), shared()
    want = ours(model, prefixes, objective)
    close(ours(model, [swapped(prefix) for prefix in prefixes], objective), want)


@pytest.mark.parametrize("share", [True, False])
def test_swapped_texts_swap_their_scores_and_nothing_else(share):
    model, pairs = tiny(), [group for group in groups() if len(group) == 2]
    compared = {"first": [0], "second": [1], "p_first": [0.8]}
    as_is = [SharedPrefix.of(group, **compared) for group in pairs]
    turned = [SharedPrefix.of(group[::-1], **compared | {"p_first": [1 - 0.8]}) for group in pairs]
    a, b = scored(model, as_is, share=share)
    c, d = scored(model, turned, share=share)
    assert abs(a - b) > 0.1
    torch.testing.assert_close(torch.stack([c, d]), torch.stack([b, a]), rtol=1e-4, atol=1e-5)
    close(ours(model, turned, share=share), ours(model, as_is, share=share))


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("micro_tokens", [1, 50, 128, 10_000])
def test_a_layout_holds_every_group_once_within_its_budget(share, micro_tokens):
    prefixes = [prefix for seed in range(4) for prefix in shared(seed)]
    layout = PrefixLayout(micro_tokens, 0, share, Pairs(RewardSettings()))
    cut = layout.groups(prefixes)
    assert sorted(id(prefix) for group in cut for prefix in group) == sorted(map(id, prefixes))
    for group in cut:
        positions = layout.batch(group).input_ids.numel()
        assert positions <= micro_tokens or len(group) == 1
    assert (len(cut) == len(prefixes)) == (micro_tokens == 1)
    step = layout.step(prefixes)
    assert [b.input_ids.shape for b in step.batches] == [
        layout.batch(g).input_ids.shape for g in cut
    ]
    times = [1 if share else len(t.branches) for t in prefixes]  # that what is shared is run
    assert step.tokens == sum(
        n * len(t.shared_T) + sum(map(len, t.branches))
        for n, t in zip(times, prefixes, strict=True)
    )
    assert step.loss_items == sum(len(prefix.p_first) for prefix in prefixes)


@pytest.mark.parametrize(("share", "fits"), [(True, 2 * 17), (False, 2 * 2 * 15)])
def test_two_groups_lie_in_one_micro_batch_where_they_just_fit(share, fits):
    prefixes = [
        SharedPrefix.of([tokens(*range(13), 20, n), tokens(*range(13), 30, n)]) for n in range(2)
    ]
    assert [len(prefix) for prefix in prefixes] == [17, 17]
    for micro_tokens, batches in ((fits, 1), (fits - 1, 2)):
        assert len(PrefixLayout(micro_tokens, 0, share).groups(prefixes)) == batches


def test_a_step_that_says_nothing_is_not_divided_by_zero():
    alone = SharedPrefix.of([tokens(1, 2, 3)], grades=[0.5])
    layout = PrefixLayout(100, 0, share=True, objective=OBJECTIVES["ranking"](RewardSettings()))
    assert layout.step([alone]).loss_items == 1


@pytest.mark.parametrize("kind", SHAREABLE)
def test_full_attention_on_sdpa_shares_unless_told_not_to(kind):
    model = tiny(kind)
    sharing = [shares(model, setting, "reward") for setting in (None, True, False)]
    assert sharing == [True, True, False]


@pytest.mark.parametrize("kind", SEPARATE)
def test_attention_that_takes_no_mask_does_not_share(kind):
    model = tiny(kind)
    assert [shares(model, setting, "reward") for setting in (None, False)] == [False, False]
    with pytest.raises(InputError, match="ppo: share_prompt: got true for a model"):
        shares(model, True, "ppo")


def test_a_digest_is_of_every_token_and_all_that_is_known():
    prefix = shared()[0]
    changed = [
        replace(prefix, source="t"),
        replace(prefix, p_first=[*prefix.p_first[:-1], 0.123]),
        replace(prefix, grades=[*prefix.grades[:-1], 0.123]),
        replace(prefix, first=prefix.second, second=prefix.first),
        replace(prefix, branches=prefix.branches[::-1]),
        replace(prefix, shared_T=prefix.shared_T[:-1]),
        replace(
            prefix, shared_T=np.where(prefix.shared_T == prefix.shared_T[3], 9, prefix.shared_T)
        ),
        replace(prefix, shared_T=prefix.shared_T[:0], branches=[prefix.shared_T, *prefix.branches]),
    ]
    digests = {prefix_digest([one]) for one in [prefix, *changed]}
    assert len(digests) == len(changed) + 1
    assert prefix_digest(shared()) == prefix_digest(shared())

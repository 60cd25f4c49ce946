"""The loss: that of transformers, and the same however the rows lie in memory."""

# ruff: noqa: E402  (what needs torch is imported once torch is known to be there)

from __future__ import annotations

from collections import Counter

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import numpy as np

from aif.train import logprobs
from aif.train.batch import Layout, Steps
from aif.train.logprobs import nll_loss, token_nll
from aif.train.model import forward_is
from aif.train.tokens import TokenRow
from tests.support.tiny import tiny_model

PAD = 0


def rows(n: int = 7, source: str = "s", seed: int = 0) -> list[TokenRow]:
    """Random tokens of many lengths, the last half of each learned."""
    rng = np.random.default_rng(seed)
    tokens = []
    for length in rng.permutation(np.linspace(4, 40, n).astype(int)):
        ids_T = rng.integers(3, 400, length).astype(np.int32)
        tokens.append(TokenRow(ids_T, np.arange(length) >= length // 2, source))
    return tokens


def small(**changes):
    return tiny_model(vocab_size=400, attention_dropout=0.0, **changes).eval()


def loss_and_gradients(model, step) -> tuple[float, list]:
    model.zero_grad()
    total = 0.0
    with forward_is(model, nll_loss(model)):
        for batch in step.batches:
            loss = model(**batch.inputs(model.device)) / step.loss_items
            loss.backward()
            total += float(loss)
    return total, [p.grad.clone() for p in model.parameters()]


def plain(model, tokens: list[TokenRow]) -> tuple[float, list]:
    """The oracle: transformers' own loss of each row by itself, weighted by its tokens."""
    model.zero_grad()
    total = sum(int(row.loss_mask_T.sum()) for row in tokens)
    value = 0.0
    for row in tokens:
        ids_BT = torch.tensor(row.ids_T[None].astype(int))
        labels_BT = ids_BT.masked_fill(~torch.tensor(row.loss_mask_T[None]), -100)
        loss = model(input_ids=ids_BT, labels=labels_BT).loss * row.loss_mask_T.sum() / total
        loss.backward()
        value += float(loss)
    return value, [p.grad.clone() for p in model.parameters()]


def close(got: tuple[float, list], want: tuple[float, list]) -> None:
    assert got[0] == pytest.approx(want[0], rel=1e-5)
    for ours, theirs in zip(got[1], want[1], strict=True):
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


@pytest.mark.parametrize(
    "layout",
    [
        Layout(10_000, packing=False, pad_id=PAD),
        Layout(10_000, packing=False, pad_id=399),
        Layout(1, packing=False, pad_id=PAD),
        Layout(64, packing=False, pad_id=PAD),
        Layout(10_000, packing=True, pad_id=PAD),
        Layout(64, packing=True, pad_id=PAD),
    ],
    ids=["padded", "another pad", "one by one", "micro-batches", "packed", "packed micro-batches"],
)
def test_loss_and_gradients_are_those_of_transformers_in_any_layout(layout):
    model, tokens = small(), rows()
    close(loss_and_gradients(model, layout.step(tokens)), plain(model, tokens))


@pytest.mark.parametrize("logits_bytes", [1, 4 * 400 * 10, 1 << 28])
def test_chunks_change_nothing_and_no_chunk_is_larger_than_asked(monkeypatch, logits_bytes):
    monkeypatch.setattr(logprobs, "LOGITS_BYTES", logits_bytes)
    model, tokens = small(), rows()
    sizes = []
    hook = model.lm_head.register_forward_hook(lambda *a: sizes.append(a[2].numel() * 4))
    layout = Layout(10_000, packing=False, pad_id=PAD)
    got = loss_and_gradients(model, layout.step(tokens))
    hook.remove()
    close(got, plain(model, tokens))
    learned = sum(int(row.loss_mask_T.sum()) for row in tokens)
    # The first call is the probe for what a model does to its logits beside the head.
    assert max(sizes[2:]) <= max(4 * 400, min(logits_bytes, learned * 4 * 400))


def test_token_nll_is_per_token():
    head, hidden_ND = torch.nn.Linear(8, 20, bias=False), torch.randn(5, 8)
    targets_N = torch.arange(5)
    want_N = -head(hidden_ND).log_softmax(-1)[range(5), targets_N]
    torch.testing.assert_close(token_nll(head, hidden_ND, targets_N), want_N)


def test_a_model_that_changes_its_logits_after_the_head_is_found_out():
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=400, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8, max_position_embeddings=128,
        final_logit_softcapping=0.05, attn_implementation="eager",
    )  # fmt: skip
    model, tokens = Gemma2ForCausalLM(config).eval(), rows()
    layout = Layout(100, packing=False, pad_id=PAD)
    close(loss_and_gradients(model, layout.step(tokens)), plain(model, tokens))


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("micro_tokens", [1, 50, 128, 10_000])
def test_a_layout_holds_every_row_once_within_its_budget(packing, micro_tokens):
    layout, tokens = Layout(micro_tokens, packing, PAD), rows(11)
    groups = list(layout.groups(tokens))
    assert sorted(id(row) for group in groups for row in group) == sorted(map(id, tokens))
    for group in groups:
        size = sum(map(len, group)) if packing else len(group) * max(map(len, group))
        assert size <= micro_tokens or len(group) == 1
    step = layout.step(tokens)
    assert step.tokens == sum(map(len, tokens))
    assert step.loss_items == sum(int(batch.loss_mask.sum()) for batch in step.batches)


def test_micro_batches_are_cut_where_it_costs_least():
    lengths = [713, 544, 369, 234, 129, 86, 76, 63]
    tokens = [TokenRow(np.zeros(n, np.int32), np.ones(n, bool), "s") for n in lengths]

    def cost(groups: list[list[int]]) -> int:
        return sum(64 + len(group) * group[0] for group in groups)

    def cuts(of: list[int]):  # the oracle: every way there is
        for mask in range(2 ** (len(of) - 1)):
            groups = [[of[0]]]
            for n, length in enumerate(of[1:]):
                if mask >> n & 1:
                    groups.append([])
                groups[-1].append(length)
            if all(len(group) * group[0] <= 1024 for group in groups):
                yield groups

    layout = Layout(1024, packing=False, pad_id=PAD, call_tokens=64)
    got = [[len(row) for row in group] for group in layout.groups(tokens[::-1])]
    assert cost(got) == min(map(cost, cuts(lengths)))
    assert len(got) < len(lengths)


def steps(tokens, weights=None, **options) -> Steps:
    layout = Layout(10_000, packing=False, pad_id=PAD)
    options = {"batch_size": 4, "epochs": 1.0, "max_steps": None, "seed": 0} | options
    return Steps(tokens, weights or {}, layout, **options)


def test_an_epoch_shows_every_row_once_in_a_fresh_order():
    every = steps(rows(10), epochs=2.5)
    assert (every.per_epoch, len(every)) == (3, 8)
    first = [n for k in range(3) for n in every.numbers(k)]
    second = [n for k in range(3, 6) for n in every.numbers(k)]
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second
    assert [len(every.numbers(k)) for k in range(3)] == [4, 4, 2]
    assert len(steps(rows(10), max_steps=5)) == 5


def test_a_step_depends_on_nothing_but_its_number_and_the_seed():
    every = steps(rows(10))
    assert every.numbers(5) == steps(rows(10)).numbers(5)
    assert [every.numbers(k) for k in range(9)] != [
        steps(rows(10), seed=1).numbers(k) for k in range(9)
    ]


@pytest.mark.parametrize(("weight", "counts"), [(0.5, [10, 0]), (2.0, [0, 20]), (1.3, [14, 6])])
def test_a_weight_is_how_often_an_epoch_shows_a_row(weight, counts):
    tokens = rows(20, "a") + rows(5, "b")
    every = steps(tokens, {"a": weight, "b": 1.0}, batch_size=7)
    epochs = []
    for epoch in range(2):
        ks = range(epoch * every.per_epoch, (epoch + 1) * every.per_epoch)
        times = Counter(n for k in ks for n in every.numbers(k))
        assert all(times[n] == 1 for n in range(20, 25))
        by_times = Counter(times[n] for n in range(20))
        assert [by_times[1], by_times[2]] == counts
        epochs.append(times)
    assert (epochs[0] == epochs[1]) == (weight == 2.0)  # what is drawn is drawn anew

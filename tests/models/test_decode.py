"""The loop that writes text: draws, rows that are filled up and leave, and what a model caches."""

# ruff: noqa: E402  (what needs torch is imported once torch is known to be there)

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import numpy as np
from transformers import Lfm2Config, Lfm2ForCausalLM, Qwen3NextConfig, Qwen3NextForCausalLM

from aif.models.decode import GROUP, NOT_A_NUMBER, SampledTokens, decode, sample_tokens
from tests.support.tiny import tiny_model

VOCAB = 64
SHAPE = {
    "vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 4,
    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64,
    "initializer_range": 0.3, "pad_token_id": None, "tie_word_embeddings": False,
}  # fmt: skip


def seeded(make):
    torch.manual_seed(0)
    return make()


KINDS = {
    "llama": lambda: seeded(lambda: tiny_model(**SHAPE)),
    "lfm2": lambda: seeded(
        lambda: Lfm2ForCausalLM(
            Lfm2Config(**SHAPE, layer_types=["conv", "full_attention"] * 2, block_multiple_of=8)
        )
    ),
    "qwen3 next": lambda: seeded(
        lambda: Qwen3NextForCausalLM(
            Qwen3NextConfig(
                **SHAPE, head_dim=8, num_experts=2, num_experts_per_tok=1, moe_intermediate_size=8,
                shared_expert_intermediate_size=8, linear_num_key_heads=2, linear_num_value_heads=2,
                linear_key_head_dim=8, linear_value_head_dim=8,
            )
        )
    ),
}  # fmt: skip


def column(n: int, temperature: float):
    return torch.full((n, 1), temperature)


def noise(n: int, seed: int = 0):
    """A row's noise for n rows, all from one generator."""
    return [np.random.default_rng(seed)] * n


def repeated(*numbers: float):
    """A generator that repeats these numbers."""

    class Generator:
        def standard_exponential(self, size, dtype):
            return np.resize(np.array(numbers, dtype), size)

    return Generator()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("vocabulary", [9, GROUP + 1, 3 * GROUP], ids="{} tokens".format)
def test_tokens_are_drawn_as_often_as_they_are_likely(vocabulary, temperature):
    n = 1 << 14
    for seed in range(5):
        # Most of the probability is on a few tokens, so that each of these can be counted.
        logits_V = torch.randn(vocabulary, generator=torch.Generator().manual_seed(seed))
        logits_V[:: max(1, vocabulary // 9)] += 7
        logits_V[seed % 9] = -torch.inf
        found_N = sample_tokens(logits_V.expand(n, -1), column(n, temperature), noise(n, seed))
        counts_V = found_N.bincount(minlength=vocabulary)
        p_V = (logits_V.double() / temperature).softmax(-1)
        common_V = n * p_V > 100
        for some_V in (*torch.eye(vocabulary).bool()[common_V], ~common_V):
            p = p_V[some_V].sum()
            assert (counts_V[some_V].sum() - n * p).abs() <= 4.5 * (n * p * (1 - p)).sqrt()
        assert counts_V[seed % 9] == 0


def test_each_row_is_drawn_by_its_own_noise():
    logits_BV = torch.zeros(64, 2 * GROUP)
    rows = [np.random.default_rng(seed) for seed in [*range(32)] * 2]
    found_B = sample_tokens(logits_BV, column(64, 1.0), rows)
    assert found_B[:32].tolist() == found_B[32:].tolist()
    assert len(set(found_B.tolist())) > 28
    again_B = sample_tokens(logits_BV, column(64, 1.0), rows)
    assert (again_B != found_B).sum() > 56
    one_each_BV = torch.full((4, 4), -torch.inf).fill_diagonal_(0.0).flip(0)
    assert sample_tokens(one_each_BV, column(4, 1.0), noise(4)).tolist() == [3, 2, 1, 0]


def test_a_change_of_rounding_is_almost_never_another_token():
    n = 20_000
    logits_V = torch.randn(4096, generator=torch.Generator().manual_seed(0))
    draws = [
        sample_tokens(scaled.expand(n, -1), column(n, 1.0), noise(n))
        for scaled in (logits_V, logits_V * (1 + 1e-5))
    ]
    assert (draws[0] != draws[1]).sum() <= 3


def test_what_has_no_probability_is_never_drawn():
    draw = torch.Generator().manual_seed(0)
    vocabulary = 3 * GROUP + 5
    logits_BV = 8 * torch.randn(300, vocabulary, generator=draw)
    possible_BV = torch.rand(300, vocabulary, generator=draw) < torch.rand(300, 1, generator=draw)
    possible_BV[:, 11] = True
    logits_BV[~possible_BV] = -torch.inf
    for rows in (
        noise(300),
        [repeated(0.0)] * 300,
        [repeated(0.0, 1.0)] * 300,
        [repeated(80.0)] * 300,
    ):
        found_B = sample_tokens(logits_BV, column(300, 0.7), rows)
        assert possible_BV.gather(1, found_B[:, None]).all()


@pytest.mark.parametrize(
    "wrong", [[0.0, torch.nan, 1.0], [torch.inf, 0.0, 0.0], [-torch.inf] * 3], ids=str
)
def test_logits_that_are_no_numbers_draw_no_token(wrong):
    logits_BV = torch.tensor([[1.0, 2.0, 3.0], wrong])
    for temperature in (1.0, 0.0):
        next_B = sample_tokens(logits_BV, column(2, temperature), noise(2))
        assert (next_B == NOT_A_NUMBER).tolist() == [False, True]


def test_each_row_is_drawn_at_its_own_temperature_and_the_likeliest_at_0():
    logits_V = torch.tensor([2.0, 1.0, 0.0, 3.0])
    n = 1 << 14
    mixed_B1 = torch.tensor([0.0, 0.5, 2.0]).repeat_interleave(n)[:, None]
    draws = sample_tokens(logits_V.expand(3 * n, -1), mixed_B1, noise(3 * n)).view(3, n)
    assert set(draws[0].tolist()) == {3}
    for row, temperature in ((1, 0.5), (2, 2.0)):
        share_V = draws[row].bincount(minlength=4) / n
        assert (share_V - (logits_V / temperature).softmax(-1)).abs().max() < 0.02


def prompts_twice(n: int) -> list[list[int]]:
    """Prompts of 2 to 6 tokens, each of them twice."""
    draw = np.random.default_rng(0)
    distinct = [draw.integers(0, VOCAB, draw.integers(2, 7)).tolist() for _ in range(n // 2)]
    return distinct * 2


def decoded(model, prompts, **options):
    n = len(prompts)
    defaults = {
        "seeds": range(n),
        "temperatures": [0.9] * n,
        "max_tokens": 12,
        "ends": {1, 2, 3, 4},
    }
    return decode(model, prompts, **defaults | {"pad": 0} | options)


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_is_run_once_and_rows_that_end_leave_whatever_the_model_caches(kind):
    """Linear attention keeps a state and no keys: its rows are taken and dropped all the same."""
    model, prompts = KINDS[kind]().eval(), prompts_twice(12)
    shapes = []
    model.register_forward_pre_hook(
        lambda model, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)),
        with_kwargs=True,
    )
    together = decoded(model, prompts)
    assert shapes[0][0] == 6
    assert shapes[1] == (12, 1)
    assert min(rows for rows, _ in shapes[1:]) < 12
    shapes.clear()
    alone = [
        decoded(model, [prompt], seeds=[n], temperatures=[0.9])[0]
        for n, prompt in enumerate(prompts)
    ]
    assert together == alone
    assert len({one.ids for one in together}) > 8
    assert {one.ended for one in together} == {True, False}


def test_the_batch_has_always_a_multiple_of_the_step():
    model, prompts, rows = KINDS["llama"]().eval(), prompts_twice(10), []
    model.register_forward_pre_hook(
        lambda model, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    want = decoded(model, prompts)
    rows.clear()
    assert decoded(model, prompts, step=4) == want
    assert rows[:2] == [8, 12]
    assert {n % 4 for n in rows} == {0}
    assert min(rows) < 12


def test_a_caller_may_end_a_text_and_a_row_of_broken_logits_is_none():
    model, prompts = KINDS["llama"]().eval(), prompts_twice(4)
    free = decoded(model, prompts, ends=set())
    cut = decoded(model, prompts, ends=set(), stop_when=lambda n, new: n == 2 and len(new) == 3)
    assert cut[2] == SampledTokens(free[2].ids[:3], ended=True)
    assert [cut[n] for n in (0, 1, 3)] == [free[n] for n in (0, 1, 3)]

    def broken_after_a_while(head, args, out):
        if out.shape[1] == 1 and out.shape[0] == 4:
            out[1] = torch.nan

    hook = model.lm_head.register_forward_hook(broken_after_a_while)
    broken = decoded(model, prompts, ends=set())
    hook.remove()
    assert broken[1] is None
    assert [broken[n] for n in (0, 2, 3)] == [free[n] for n in (0, 2, 3)]

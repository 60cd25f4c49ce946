"""Responses of the policy, against a loop that runs the whole text anew for every token."""

# ruff: noqa: E402  (what needs torch is imported once torch is known to be there)

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import numpy as np
from transformers import Gemma2Config, Gemma2ForCausalLM, MistralConfig, MistralForCausalLM

from aif.errors import AifError
from aif.models.decode import DROP, GROUP, SampledTokens
from aif.train.ppo import rollouts as backend
from aif.train.ppo.rollouts import TransformersRollouts
from tests.support.tiny import tiny_model

VOCAB = 64
SHAPE = {
    "vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64,
    "initializer_range": 0.3, "pad_token_id": None, "tie_word_embeddings": False,
}  # fmt: skip
KINDS = {
    "llama": lambda: tiny_model(**SHAPE),
    "sliding mistral": lambda: MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=5)),
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**SHAPE, head_dim=8, sliding_window=5)),
}
ENDS = set(range(7))  # one token in nine: responses end all along the way


def model_of(kind: str = "llama", seed: int = 0):
    torch.manual_seed(0)
    model = KINDS[kind]()
    if seed:
        torch.manual_seed(seed)
        for weight in model.parameters():
            torch.nn.init.normal_(weight, std=0.3)
    return model


def rollouts_of(model=None, **options) -> TransformersRollouts:
    options = {"max_tokens": 24, "temperature": 0.9, "ends": ENDS, "pad_id": 0} | options
    return TransformersRollouts(model_of() if model is None else model, **options)


def prompts(n: int = 20) -> list[np.ndarray]:
    """Of 1 to 12 tokens, in no order, some of one length and some the same."""
    draw = np.random.default_rng(0)
    many = [draw.integers(0, VOCAB, draw.integers(1, 13)).astype(np.int32) for _ in range(40)]
    many[7] = many[2]
    return many[:n]


def naive(model, prompt: np.ndarray, seed: int, ends=ENDS, tokens: int = 24, temperature=0.9):
    """No cache, no batch, no padding; in float64, of a vocabulary that is one group of noise."""
    ids, noise = prompt.tolist(), np.random.default_rng(seed)
    for _ in range(tokens):
        with torch.no_grad():
            logits_V = model(input_ids=torch.tensor([ids])).logits[0, -1].double().numpy()
        race_V = noise.standard_exponential(1 + GROUP, np.float32)[1:][: len(logits_V)]
        ids.append(int(np.argmax(logits_V / temperature - np.log(race_V))))
        if ids[-1] in ends:
            break
    return ids[len(prompt) :]


def ids_of(responses: list[SampledTokens]) -> list[list[int]]:
    return [list(response.ids) for response in responses]


def calls_of(rollouts: TransformersRollouts) -> list[tuple[int, int]]:
    """The shape [rows, tokens] of all that the model will be called with."""
    seen = []
    rollouts.model.register_forward_pre_hook(
        lambda model, args, kwargs: seen.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    return seen


def test_weights_that_are_no_numbers_are_an_error():
    rollouts = rollouts_of()
    rollouts.sync((name, w * torch.nan) for name, w in model_of().named_parameters())
    with pytest.raises(AifError, match="logits are not finite"):
        rollouts.sample(prompts(3), [1, 2, 3])


def test_weights_that_are_not_all_there_are_an_error():
    with pytest.raises(AifError, match=r"the policy has no weight lm_head\.weight to sample with"):
        rollouts_of().sync(
            (name, w) for name, w in model_of().named_parameters() if name != "lm_head.weight"
        )


@pytest.mark.parametrize("kind", KINDS)
def test_responses_are_those_of_a_plain_loop_though_rows_leave_the_batch(kind):
    model, batch = model_of(kind), prompts()
    want = [naive(model.eval(), prompt, seed) for seed, prompt in enumerate(batch)]
    lengths = list(map(len, want))
    assert len(set(lengths)) > 8
    rollouts = rollouts_of(model)
    calls = calls_of(rollouts)
    assert ids_of(rollouts.sample(batch, range(len(batch)))) == want
    assert calls[0] == (len(batch) - 1, max(map(len, batch))), "two of them are the same"
    assert [tokens for _, tokens in calls[1:]] == [1] * (max(lengths) - 1), "a cache is not used"
    for t, (rows, _) in enumerate(calls):
        done = rows - sum(length > t for length in lengths)
        assert done * DROP < rows, "finished rows are still in the batch"
    assert len({rows for rows, _ in calls}) > 5


@pytest.mark.parametrize("rows", [1, 3, 7])
def test_more_prompts_than_fit_run_in_turn_those_of_like_lengths_together(rows, monkeypatch):
    batch, seeds = prompts(), list(range(100, 120))
    want = rollouts_of().sample(batch, seeds)
    monkeypatch.setitem(backend.ROWS, "cpu", rows)
    rollouts = rollouts_of()
    calls = calls_of(rollouts)
    assert ids_of(rollouts.sample(batch, seeds)) == ids_of(want)
    firsts = [(n, t) for n, t in calls if t > 1]
    in_order = sorted(batch, key=len)
    parts = [in_order[n : n + rows] for n in range(0, len(in_order), rows)]
    once = [len({prompt.tobytes() for prompt in part}) for part in parts]
    longest = [len(part[-1]) for part in parts]
    assert firsts == [(n, t) for n, t in zip(once, longest, strict=True) if t > 1]
    assert max(n for n, _ in calls) == rows


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_that_is_asked_several_times_is_run_once(kind):
    model, (one, other, third) = model_of(kind), [p for p in prompts() if len(p) > 5][:3]
    batch = [one, other, one, third, other, one, one]
    want = [naive(model.eval(), prompt, seed) for seed, prompt in enumerate(batch)]
    rollouts = rollouts_of(model)
    calls = calls_of(rollouts)
    assert ids_of(rollouts.sample(batch, range(7))) == want
    assert calls[0] == (3, max(len(one), len(other), len(third)))
    assert all(tokens == 1 for _, tokens in calls[1:])


def test_the_head_sees_one_position_a_row_in_memory_of_its_own():
    """A view of the last column would have torch.matmul copy the head's weight for batch row."""
    model, seen = model_of(), []
    model.lm_head.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    rollouts_of(model, max_tokens=3, ends=set()).sample(prompts(4), range(4))
    assert [tuple(hidden.shape) for hidden in seen] == [(4, 1, 16)] * 3
    assert all(hidden.is_contiguous() for hidden in seen)


def test_a_response_goes_to_its_first_end_or_to_the_last_token_there_is_room_for():
    responses = rollouts_of(max_tokens=12).sample(prompts(40), range(40))
    assert {response.ended for response in responses} == {True, False}
    for response in responses:
        ends = [n for n, token in enumerate(response.ids) if token in ENDS]
        assert ends == ([len(response.ids) - 1] if response.ended else [])
        assert response.ended or len(response.ids) == 12


def test_an_end_in_the_last_place_is_an_end():
    batch, seeds = prompts(), range(20)
    whole = rollouts_of().sample(batch, seeds)
    room = sorted(len(response.ids) for response in whole if response.ended)[10]
    just, short = (rollouts_of(max_tokens=n).sample(batch, seeds) for n in (room, room - 1))
    last = [n for n, response in enumerate(whole) if len(response.ids) == room]
    for n in last:
        assert ids_of([just[n], short[n]]) == [ids_of(whole)[n], ids_of(whole)[n][:-1]]
        assert (just[n].ended, short[n].ended) == (True, False)


def test_without_ends_nothing_ends():
    model, batch = model_of().eval(), prompts(4)
    responses = rollouts_of(model, ends=set(), max_tokens=9).sample(batch, range(4))
    assert not any(response.ended for response in responses)
    assert ids_of(responses) == [naive(model, p, n, set(), 9) for n, p in enumerate(batch)]


def test_no_prompts_have_no_responses():
    assert rollouts_of().sample([], []) == []


def test_a_seed_decides_a_response_and_another_seed_another():
    rollouts, batch = rollouts_of(ends=set()), prompts()
    first, again, other = (
        ids_of(rollouts.sample(batch, seeds))
        for seeds in (range(20), range(20), range(20, 40))
    )  # fmt: skip
    assert first == again
    assert all(a != b for a, b in zip(first, other, strict=True))
    same = ids_of(rollouts.sample([batch[2]] * 3, [5, 6, 5]))
    assert same[0] == same[2] != same[1]


@pytest.mark.parametrize("kind", KINDS)
def test_a_response_does_not_depend_on_its_neighbours(kind):
    rollouts, batch = rollouts_of(model_of(kind)), prompts()
    together = ids_of(rollouts.sample(batch, range(20)))
    alone = [ids_of(rollouts.sample([p], [n]))[0] for n, p in enumerate(batch)]
    turned = ids_of(rollouts.sample(batch[::-1], range(19, -1, -1)))
    assert together == alone == turned[::-1]


def test_padding_goes_by_place_and_not_by_a_tokens_id():
    batch = [np.array([9] * n + [5, 9], np.int32) for n in range(8)]
    want = ids_of(rollouts_of(pad_id=50).sample(batch, range(8)))
    assert ids_of(rollouts_of(pad_id=9).sample(batch, range(8))) == want


def test_a_sampler_learns_nothing_and_drops_nothing_out():
    model = model_of().train()
    rollouts = rollouts_of(model)
    assert rollouts.models == [model]
    assert not any(weight.requires_grad for weight in model.parameters())
    assert not any(module.training for module in model.modules())


def test_weights_are_copied_and_the_next_responses_are_of_them():
    rollouts, source, batch = rollouts_of(), model_of(seed=1), prompts()
    before = ids_of(rollouts.sample(batch, range(20)))
    rollouts.sync(source.named_parameters())
    want = ids_of(rollouts_of(model_of(seed=1)).sample(batch, range(20)))
    assert ids_of(rollouts.sample(batch, range(20))) == want != before
    with torch.no_grad():
        for weight in source.parameters():
            weight.zero_()
    assert ids_of(rollouts.sample(batch, range(20))) == want
    assert not any(weight.requires_grad for weight in rollouts.model.parameters())


@pytest.mark.parametrize("tied", [False, True])
def test_weights_are_rounded_to_the_samplers_and_names_it_has_not_are_passed_over(tied):
    source, model = (tiny_model(**SHAPE | {"tie_word_embeddings": tied}) for _ in range(2))
    with torch.no_grad():
        for weight in source.parameters():
            weight.add_(torch.rand_like(weight))
    rollouts = rollouts_of(model.bfloat16())
    every = dict(source.named_parameters(remove_duplicate=False))  # a tied head by both its names
    assert ("lm_head.weight" in dict(model.named_parameters())) != tied
    rollouts.sync([*every.items(), ("value_head.weight", torch.zeros(1, 16))])
    for name, weight in model.named_parameters(remove_duplicate=False):
        assert weight.dtype == torch.bfloat16
        assert torch.equal(weight, every[name].bfloat16())


def test_a_bfloat16_model_draws_tokens_of_its_vocabulary():
    responses = rollouts_of(model_of().bfloat16()).sample(prompts(), range(20))
    assert len(set(responses)) > 15
    assert all(0 <= min(r.ids) <= max(r.ids) < VOCAB for r in responses)

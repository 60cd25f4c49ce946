"""A prompt is sampled as the same tokens that every training learns from."""

from __future__ import annotations

import numpy as np
import pytest

from aif.config.settings import Settings
from aif.data.transcript import transcript
from aif.stages.respond import sample_asks
from aif.store.records import Prompt, content_id

pytest.importorskip("torch")

from aif.llm.local import LocalLLM
from aif.models.load import load_tokenizer
from aif.train.examples import Example
from aif.train.reward.data import tokenised
from aif.train.reward.labeled import PromptGroup
from aif.train.tokens import Tokeniser


def turns(*texts: str) -> list[dict[str, str]]:
    roles = ("system", "user", "assistant", "user")[0 if len(texts) > 1 else 1 :]
    return [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]


PLAIN = turns("What is 2 + 2?")
PADDED = [
    turns("  What is 2 + 2?  \n"),
    turns("\n\nBe brief.\n", " Hi", "Hello! \n", "\tAnd\n\nyou? \n\n"),
]


def settings(form: str) -> Settings:
    return Settings.model_validate({"policy": {"form": form}, "respond": {"samples": 1}})


def key_of(prompt: Prompt, form: str) -> str:
    (ask,) = sample_asks(settings(form), prompt, [])
    return ask.key


@pytest.mark.parametrize("form", ["chat", "text"])
@pytest.mark.parametrize("messages", [PLAIN, *PADDED])
def test_a_prompt_is_the_same_tokens_wherever_it_is_read(form, messages):
    policy = settings(form).policy
    tokenizer, context = load_tokenizer(policy.model)
    (ask,) = sample_asks(settings(form), Prompt.of(messages), [])
    sampled = LocalLLM(policy)._tokens(ask)
    tokeniser = Tokeniser(tokenizer, context, chat=form != "text")
    answer = {"role": "assistant", "content": "Four."}
    (sft,) = tokeniser.dialogues([Example("id", "key", "test", [*messages, answer])])
    (reward,) = tokenised([PromptGroup(messages, "test", ["Four.", "I do not know."])], tokeniser)
    (ppo,) = tokeniser.prompts([messages], room=8)
    n = len(sampled)
    assert tuple(sft.ids_T[:n]) == sampled
    assert not sft.loss_mask_T[:n].any()
    assert sft.loss_mask_T[n]
    assert tuple(np.concatenate([reward.shared_T, reward.branches[0]])[:n]) == sampled
    assert len(reward.shared_T) >= n
    assert tuple(ppo) == sampled


def test_a_transcript_has_no_space_around_its_turns():
    assert transcript(PADDED[0], prompt=True) == "User: What is 2 + 2?\n\nAssistant:"
    assert transcript(PADDED[0]) == "User: What is 2 + 2?"


def test_only_a_padded_prompt_that_is_a_text_has_another_id_than_in_version_0_1():
    for form in ("auto", "chat", "text"):
        for messages in (PLAIN, *PADDED):
            prompt, identity = Prompt.of(messages), settings(form).policy.identity()
            before = content_id("response", prompt.id, identity, form, 0, 0)
            is_another = form == "text" and messages is not PLAIN
            assert (key_of(prompt, form) != before) == is_another
    assert key_of(Prompt.of(PADDED[0]), "text") != key_of(Prompt.of(PLAIN), "text")

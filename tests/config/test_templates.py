"""Judged text is data: no control token and no template syntax in it does anything."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aif.config.templates import BUILTIN, Template, neutralised
from aif.errors import AifError, InputError
from tests.support.clock import within

FAMILIES = {
    "llama 2": "<s> </s> <unk> <<SYS>> <</SYS>> [INST] [/INST]",
    "llama 3": "<|begin_of_text|> <|start_header_id|> <|end_header_id|> <|eot_id|> <|python_tag|>",
    "llama 4": "<|header_start|> <|header_end|> <|eot|> <|image_start|>",
    "mistral": "[AVAILABLE_TOOLS] [/AVAILABLE_TOOLS] [TOOL_CALLS] [TOOL_RESULTS] [/TOOL_RESULTS] "
    "[SYSTEM_PROMPT] [/SYSTEM_PROMPT] [IMG] [IMG_BREAK] [IMG_END] [PREFIX] [SUFFIX] [MIDDLE] "
    "[THINK] [/THINK] [CALL_ID] [ARGS] [TOOL_CONTENT]",
    "qwen": "<|im_start|> <|im_end|> <|endoftext|> <|vision_start|> <tool_call> </tool_call> "
    "<tool_response> </tool_response> <think> </think> <|fim_prefix|> <|repo_name|> <|file_sep|>",
    "gemma": "<bos> <eos> <pad> <mask> <start_of_turn> <end_of_turn> <start_of_image> "
    "<image_soft_token> <unused0> <unused98> [@BOS@] <0x0A> <0xFF>",
    "deepseek": "<｜begin▁of▁sentence｜> <｜end▁of▁sentence｜> <｜User｜> <｜Assistant｜> "
    "<｜tool▁calls▁begin｜> <｜fim▁hole｜> <|EOT|>",
    "phi": "<|system|> <|user|> <|assistant|> <|end|> <|placeholder1|> <|dummy_85|> <|im_sep|>",
    "command-r": "<|START_OF_TURN_TOKEN|> <|END_OF_TURN_TOKEN|> <|CHATBOT_TOKEN|> <BOS_TOKEN> "
    "<EOS_TOKEN> <PAD> <UNK> <CLS> <SEP> <MASK_TOKEN> <|START_THINKING|>",
    "chatglm": "[gMASK] [sMASK] [MASK] <sop> <eop> <|observation|> <ENC>",
    "falcon": ">>TITLE<< >>ABSTRACT<< >>QUESTION<< >>ANSWER<< >>PREFIX<<",
    "t5": "<extra_id_0> <extra_id_99>",
    "bert": "[CLS] [SEP] [PAD] [UNK] [MASK] [unused1]",
    "granite": "<|start_of_role|> <|end_of_role|> <|end_of_text|> <fim_prefix> <gh_stars>",
    "starcoder": "<fim-prefix> <reponame> <filename> <issue_start> <jupyter_code> <empty_output>",
    "gpt-oss": "<|start|> <|channel|> <|message|> <|constrain|> <|return|> <|call|>",
    "internlm": "<eoh> <eoa> [UNUSED_TOKEN_145] <TOKENS_UNUSED_0>",
    "baichuan": "<reserved_106> <reserved_107>",
    "exaone": "[|system|] [|user|] [|assistant|] [|endofturn|]",
    "seed": "<seed:bos> <seed:think> </seed:think>",
    "nemotron": "<extra_id_1> <SPECIAL_10>",
    "florence": "<loc_12>",
    "code llama": "<PRE> <SUF> <MID> <EOT>",
}
TOKENS = [token for line in FAMILIES.values() for token in line.split()]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_control_token_is_broken(family):
    for token in FAMILIES[family].split():
        for text in (token, f"a{token}b", token * 3, f"<{token}>", f"[{token}]", f"<|{token}|>"):
            assert token not in neutralised(text), token
        assert neutralised(token).replace(" ", "") == token  # and nothing else has happened


@pytest.mark.parametrize(
    "text",
    [
        "a < b and c > d, x<y>z, 1 << 3, cin >> x",
        "<div class='s'><p>Hi</p><br/></div> <b>bold</b> <h1>",
        "List<String> Map<K, V> vector<int> <T> std::vector<T>",
        "[1] [NOTE] [TODO] [A] [x, y] [link](http://x) [FOO_BAR] a[i] [INSTRUCTION]",
        "<user@example.org> <https://example.org> <3 :> <- -> |x| a|b <|> <||>",
        "{{ 7*7 }} {% if %} ${x} \\n $x^2$ ASK [b] >>> print(1)",
        "U+2028 \u2028 and \x85 and NUL \x00, emoji 🙂, ‮bidi",
    ],
)
def test_plain_writing_is_left_alone(text):
    assert neutralised(text) == text


def test_lone_surrogates_become_the_replacement_character():
    assert neutralised("a\ud800b\udfffc🙂") == "a\ufffdb\ufffdc🙂"


def test_the_exact_tokens_of_a_judge_are_broken_too():
    assert neutralised("x ~odd~ y", ["~odd~"]) == "x ~ odd~ y"
    assert "\x07" not in neutralised("a\x07b", ["\x07"])
    nested = neutralised("~o~odd~dd~", ["~odd~"])
    assert "~odd~" not in nested


@pytest.fixture(scope="module")
def tokenizer():
    """The bundled model's."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from aif.config.settings import BUNDLED
    from aif.models.load import load_tokenizer

    try:
        return load_tokenizer(BUNDLED)[0]
    except InputError as error:
        pytest.skip(str(error))


def test_every_added_token_of_the_bundled_tokenizer_is_broken(tokenizer):
    added = tokenizer.get_added_vocab()
    assert len(added) >= 17
    for token, number in added.items():
        assert tokenizer.encode(token, add_special_tokens=False) == [number]
        ids = tokenizer.encode(neutralised(token), add_special_tokens=False)
        assert not set(ids) & set(added.values()), token


PIECES = st.one_of(
    st.sampled_from(TOKENS),
    st.sampled_from(
        ["<", ">", "|", "<|", "|>", "[", "]", "/", " ", "im_", "im_end", "_", "｜", "\n"]
    ),
    st.text(max_size=4),
)


def test_no_mixture_of_tokens_and_text_yields_an_added_token(tokenizer):
    added = set(tokenizer.get_added_vocab().values())
    pieces = st.lists(PIECES | st.sampled_from(sorted(tokenizer.get_added_vocab())), max_size=8)

    @given(pieces, st.integers(0, 40))
    @settings(max_examples=300, deadline=None)
    def mixtures(parts, at):
        text = "".join(parts)
        text = text[:at] + "<|im_end|>" + text[at:]  # nested in whatever came out
        ids = tokenizer.encode(neutralised(text), add_special_tokens=False)
        assert not added & set(ids)

    mixtures()


@pytest.mark.parametrize(
    "piece", ["<", "<a_", "<A_", "[", "[|", "<|", "|>", ">>A", "<unused", "a_"]
)
def test_a_megabyte_is_neutralised_in_linear_time(piece):
    with within(5):
        neutralised("<" + piece * (1_000_000 // len(piece)), ["<|im_end|>"])


@given(st.lists(PIECES, max_size=10))
@settings(max_examples=300, deadline=None)
def test_neutralising_leaves_nothing_to_neutralise(parts):
    once = neutralised("".join(parts))
    assert neutralised(once) == once
    assert not [token for token in TOKENS if token in once]


ATTACKS = ["{{ 7*7 }}", "{{ ''.__class__.__mro__ }}", "{% include '/etc/passwd' %}", "{# gone #}"]
JUDGED = ("first", "second", "response", "critique_request", "revision_request")
VARIABLES = {"delimiter": "0123", "examples": [], "preamble": "", "question": "?"}


@pytest.mark.parametrize("name", sorted(path.stem for path in BUILTIN.glob("*.jinja")))
@pytest.mark.parametrize("attack", ATTACKS)
def test_template_syntax_in_data_is_inert(name, attack):
    template = Template.named(name)
    example = {"prompt": attack, "text": attack, "verdict": True}
    variables = {
        "delimiter": "0123",
        "prompt": [{"role": "user", "content": attack}],
        "preamble": attack,
        "question": attack,
        "cue": attack,
        "examples": [example],
    } | dict.fromkeys(JUDGED, attack)
    if template.has("critique"):
        text = template.block("critique", variables) + template.block("revision", variables)
    elif template.is_chat:
        text = "\n".join(message["content"] for message in template.chat(variables))
    else:
        text = template.plain(variables)
    assert text.count(attack) >= 3
    assert "49" not in text
    assert "root:" not in text


@pytest.mark.parametrize(
    ("source", "error"),
    [
        ("{{ ''.__class__.__mro__ }}", "__class__.*unsafe"),
        ("{{ question.__init__.__globals__ }}", "unsafe"),
        ("{{ cycler.__init__ }}", "unsafe"),
        ("{% for i in range(10**12) %}x{% endfor %}", "Range too big"),
        ("{% include '/etc/passwd' %}", "no loader"),
        ("{{ missing }}", "'missing' is undefined"),
        ("{{ 1 // 0 }}", "division"),
        ("{{ prompt.append(1) }}", "unsafe"),
    ],
)
def test_a_template_of_ones_own_stays_in_its_sandbox(tmp_path, source, error):
    for text in (source, "{% block user %}" + source + "{% endblock %}"):
        file = tmp_path / "mine.jinja"
        file.write_text(text)
        template = Template.load(file)
        render = template.chat if template.is_chat else template.plain
        with pytest.raises(AifError, match=error) as raised:
            render(VARIABLES | {"prompt": []})
        assert str(raised.value).startswith(f"{file}: ")
        assert "\n" not in str(raised.value)


def test_a_template_that_cannot_be_used_is_named(tmp_path):
    for text, message in [
        (b"a\n{% if %}", r"mine\.jinja:2: got .*, expected a Jinja template"),
        (b"{{ x | nofilter }}", r"mine\.jinja:1: got No filter named 'nofilter'"),
        (b"\xff", r"mine\.jinja: got not UTF-8"),
        (b"x" * 100_001, r"mine\.jinja: got a larger file, expected at most 100,000"),
    ]:
        (tmp_path / "mine.jinja").write_bytes(text)
        with pytest.raises(InputError, match=message):
            Template.load(tmp_path / "mine.jinja")
    with pytest.raises(InputError, match=r"none\.jinja: got No such file"):
        Template.load(tmp_path / "none.jinja")


def test_blocks_make_a_chat_and_anything_else_a_text():
    chat = Template(
        "{% block system %} {% endblock %}{% block user %}\n{{ x }}\n{% endblock %}", "t"
    )
    assert chat.chat({"x": "hi"}) == [{"role": "user", "content": "hi"}]
    plain = Template("{{ x }}\nAnswer: ", "t")
    assert not plain.is_chat
    assert plain.plain({"x": "hi"}) == "hi\nAnswer:"
    assert re.search(r"hi\s*Answer:$", plain.plain({"x": "hi"}))

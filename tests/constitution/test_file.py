"""A constitution file: what it may hold, and how an error in one reads."""

from pathlib import Path

import pytest

from aif.constitution import file as constitution
from aif.errors import InputError
from aif.store import jsonl

ROOT = Path(__file__).parents[2]
HEAD = 'name = "x"\n'
PRINCIPLE = '[[principle]]\nid = "one"\ncompare = "Which is kinder?"\ngrade = "Is it kind?"\n'


def load(tmp_path: Path, text: str) -> constitution.Constitution:
    file = tmp_path / "c.toml"
    file.write_text(text, "utf-8")
    return constitution.load(file)


@pytest.mark.parametrize(
    ("text", "key", "got", "expected"),
    [
        ('nmae = "x"\n' + PRINCIPLE, "nmae", "an unknown key", "name perhaps"),
        (HEAD + PRINCIPLE + "wieght = 2", "principle.0.wieght", "an unknown key", "weight perhaps"),
        (
            HEAD + PRINCIPLE + "[[principle.example]]\ntext = 'a'\nverdict = true\nlabel = 1",
            "principle.0.example.0.label",
            "an unknown key",
            "prompt, text, verdict",
        ),
        (HEAD + PRINCIPLE * 2, "principle", "[{'id': 'one'", "'one' stands 2 times"),
        (PRINCIPLE, "name", "nothing", "a value"),
        ("name = 'a b'\n" + PRINCIPLE, "name", "'a b'", "a text that matches ^["),
        (HEAD, "principle", "nothing", "[[principle]] tables"),
        (HEAD + "principle = 3", "principle", "3", "a valid list"),
        (HEAD + "[principle]\nid = 'one'", "principle", "{'id': 'one'}", "a valid list"),
        (HEAD + "[[principle]]\nid = 'A b'", "principle.0.id", "'A b'", "a text that matches ^["),
        (HEAD + "[[principle]]\nid = 'a'\ngrade = ' '", "principle.0.grade", "' '", "not empty"),
        (HEAD + PRINCIPLE + "weight = 0", "principle.0.weight", "0", "greater than 0"),
        (HEAD + PRINCIPLE + "weight = -1", "principle.0.weight", "-1", "greater than 0"),
        (HEAD + PRINCIPLE + "weight = inf", "principle.0.weight", "inf", "a finite number"),
        (HEAD + PRINCIPLE + "weight = nan", "principle.0.weight", "nan", "a finite number"),
        (HEAD + PRINCIPLE + "weight = true", "principle.0.weight", "True", "a valid number"),
        (HEAD + PRINCIPLE + "weight = '1'", "principle.0.weight", "'1'", "a valid number"),
        (HEAD + "combine = 'mean'\n" + PRINCIPLE, "combine", "'mean'", "'mean-logit', 'veto'"),
        (HEAD + "veto = 0.5\n" + PRINCIPLE, "veto", "0.5", "less than 0.5"),
        (f"{HEAD}preamble = '{'x' * 8001}'\n{PRINCIPLE}", "preamble", "'xxx", "8000 characters"),
        (
            HEAD + f"[[principle]]\nid = 'a'\ngrade = '{'x' * 8001}'",
            "principle.0.grade",
            "'",
            "8000",
        ),
        (
            HEAD + "".join(f"[[principle]]\nid = 'p{n}'\n" for n in range(201)),
            "principle",
            "[{'id': 'p0'}",
            "at most 200 items",
        ),
    ],
)
def test_an_error_names_file_key_got_and_expected(tmp_path, text, key, got, expected):
    with pytest.raises(InputError) as error:
        load(tmp_path, text)
    message = str(error.value)
    assert message.startswith(f"{tmp_path}/c.toml: {key}: got {got}")
    assert expected in message.partition(", expected ")[2]
    assert "\n" not in message
    assert len(message) < 400


def test_bad_toml_is_reported_with_its_line(tmp_path):
    with pytest.raises(InputError, match=r"c\.toml: got bad TOML.*line 3"):
        load(tmp_path, HEAD + "\nno = no\n")


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(InputError, match=r"gone\.toml: got no such file"):
        constitution.load(tmp_path / "gone.toml")
    with pytest.raises(InputError, match=r": got a folder, expected a TOML file"):
        constitution.load(tmp_path)
    with pytest.raises(InputError, match=r"got a larger file, expected at most 1,000,000 bytes"):
        load(tmp_path, HEAD + PRINCIPLE + "#" * 2_000_000)
    (tmp_path / "latin.toml").write_bytes(b'name = "\xe9"')
    with pytest.raises(InputError, match="UTF-8"):
        constitution.load(tmp_path / "latin.toml")
    with pytest.raises(InputError, match="bad TOML"):
        load(tmp_path, "a = " + "[" * 100_000)


def test_defaults_and_stripped_texts(tmp_path):
    loaded = load(tmp_path, HEAD + PRINCIPLE.replace("Is it", "  Is it"))
    assert (loaded.principles, loaded.combine, loaded.preamble) == ("all", "mean-logit", "")
    assert loaded.principle[0].weight == 1.0
    assert loaded.principle[0].grade == "Is it kind?"


def test_a_protocol_that_has_no_question_is_named(tmp_path):
    loaded = load(tmp_path, HEAD + PRINCIPLE + "[[principle]]\nid = 'two'\ngrade = 'Is it?'")
    loaded.require("pointwise", "c.toml")
    with pytest.raises(InputError, match=r"c\.toml: principle\.1\.compare: got nothing.*'two'"):
        loaded.require("pairwise", "c.toml")


@pytest.mark.parametrize(
    ("change", "note"),
    [
        (("Is it kind?", "Be kind."), "one.grade: asks no question"),
        (("compare =", "revision = 'Do so.'\ncritique ="), None),
        (("compare =", "critique ="), "one: only one of critique and revision"),
        (("[[principle]]\n", "veto = 0.2\n[[principle]]\n"), "veto: has no effect"),
        (("[[principle]]\n", "margin = 0.2\n[[principle]]\n"), "margin: has no effect"),
        (("Is it kind?'", "Is it kind?'"), None),
    ],
)
def test_lint_says_what_is_probably_not_meant(tmp_path, change, note):
    notes = load(tmp_path, HEAD + PRINCIPLE.replace(*change)).lint()
    assert [n.startswith(note) for n in notes] == ([True] if note else [])


def test_lint_of_principles_and_examples(tmp_path):
    example = "[[principle.example]]\ntext = 'a'\nverdict = true\n"
    twin = PRINCIPLE.replace("one", "two")
    mute = "[[principle]]\nid = 'mute'\ncritique = 'Say it.'\n"
    notes = load(tmp_path, HEAD + PRINCIPLE + example * 3 + twin + mute).lint()
    assert [note.partition(":")[0] for note in notes] == [
        "one.example",
        "mute",
        "mute",
        "two principles ask the same question",
    ]


def test_the_digest_of_a_principle_is_what_its_verdicts_depend_on(tmp_path):
    one = load(tmp_path, HEAD + PRINCIPLE).principle[0]
    same = load(tmp_path, HEAD + PRINCIPLE.replace("one", "uno") + "weight = 3").principle[0]
    other = load(tmp_path, HEAD + PRINCIPLE.replace("Is it kind?", "Is it warm?")).principle[0]
    graded = ("pointwise", "chat")
    assert one.digest(*graded) == same.digest(*graded) != other.digest(*graded)
    assert one.digest("pairwise", "chat") == other.digest("pairwise", "chat")


def test_a_cue_stands_for_the_question_in_plain_text_alone(tmp_path):
    cued = PRINCIPLE + 'cue = "Kind"\n'
    one = load(tmp_path, HEAD + cued).principle[0]
    reworded = load(tmp_path, HEAD + cued.replace("Is it kind?", "Is it warm?")).principle[0]
    other = load(tmp_path, HEAD + cued.replace("Kind", "Warm")).principle[0]
    text, chat = ("pointwise", "text"), ("pointwise", "chat")
    assert one.digest(*text) == reworded.digest(*text) != other.digest(*text)
    assert one.digest(*chat) == other.digest(*chat) != reworded.digest(*chat)


@pytest.mark.parametrize(
    "path", sorted((ROOT / "constitutions").glob("*.toml")), ids=lambda p: p.stem
)
def test_shipped_constitutions_load_without_a_note(path):
    loaded = constitution.load(path)
    assert loaded.lint() == []
    assert loaded.name == path.stem
    for protocol in ("pairwise", "pointwise"):
        loaded.require(protocol, path)


def test_hhh_is_complete():
    loaded = constitution.load(ROOT / "constitutions" / "hhh.toml")
    assert len(loaded.principle) == 16
    for principle in loaded.principle:
        assert all((principle.critique, principle.revision, principle.compare, principle.grade))


PROMPTS = [("everyday", 200), ("everyday-held-out", 60), ("probing", 60), ("summaries", 20)]


@pytest.mark.parametrize(("name", "least"), PROMPTS)
def test_shipped_prompts_are_many_and_unique(name, least):
    rows = [row for _, row in jsonl.read(ROOT / "prompts" / f"{name}.jsonl")]
    assert len(rows) >= least
    assert len({row["id"] for row in rows}) == len({row["prompt"] for row in rows}) == len(rows)
    assert all(row["prompt"].strip() == row["prompt"] != "" for row in rows)


def test_held_out_prompts_are_no_others():
    learned, held_out = (
        {row["prompt"] for _, row in jsonl.read(ROOT / "prompts" / f"{name}.jsonl")}
        for name in ("everyday", "everyday-held-out")
    )
    assert not learned & held_out

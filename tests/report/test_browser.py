"""The report in a real browser: hostile texts stay text, and the browser of items is quick."""

import math
import re
import shutil
from itertools import pairwise

import pytest

from aif.data.visible import visible
from aif.progress import Progress
from aif.report import report
from tests.conftest import read_jsonl
from tests.support.clock import slowdown
from tests.support.full_run import full_run, labelled_run

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on this machine")

PATIENCE = 120_000  # ms; the machine may have other things to do

HOSTILE = [
    "</script><script>window.hit = 1</script>",
    '<img src="x" onerror="window.hit = 1">',
    '"><svg onload="window.hit = 1"></svg>',
    "[a link](javascript:window.hit=1) <a href='javascript:window.hit=1'>here</a>",
    "]]> <!-- --> &lt;b&gt; <style>* { display: none }</style>",
    "{{7*7}} {% for x in y %} ${7*7}",
    "\u202ereversed\u202c \u2066isolated\u2069 \u05e9\u05dc\u05d5\u05dd \u0645\u0631\u062d",
    "NUL \x00 escape \x1b[31m lone \ud83d surrogate \u2028 line",
    "=HYPERLINK(1) \ufeff \u200bzero",
    "x" * 200_000,
    "<b>" * 3000,
]
WATCH = """
window.violations = [];
document.addEventListener("securitypolicyviolation", (e) => window.violations.push(e.blockedURI));
"""


@pytest.fixture(scope="module")
def chromium():
    with playwright.sync_playwright() as started:
        # Tests may run as root, who has no sandbox; nothing here comes from elsewhere.
        yield started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])


@pytest.fixture
def opened(chromium):
    """Opens a run's report; whatever it says, asks or refuses fails the test."""
    contexts, said = [], []

    def open_(run, width=1280, address="", **options):
        context = chromium.new_context(viewport={"width": width, "height": 900}, **options)
        context.set_default_timeout(PATIENCE)
        contexts.append(context)
        page = context.new_page()
        page.add_init_script(WATCH)
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda r: r.url.startswith("file:") or said.append(r.url))
        page.goto(f"file://{run.path}/report.html{address}")
        return page

    yield open_
    for context in contexts:
        for page in context.pages:
            assert page.evaluate("window.violations") in ([], None)
        context.close()
    assert said == []


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    made = full_run(tmp_path_factory.mktemp("browser") / "run", texts=HOSTILE)
    report(made, Progress(quiet=True))
    return made


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    made = labelled_run(tmp_path_factory.mktemp("many") / "run", 5000, words=200)
    report(made, Progress(quiet=True))
    return made


def hits(page) -> str:
    return page.locator("#hits").inner_text()


def chosen(page, **filters) -> int:
    """How many comparisons there are with these filters and no others."""
    page.locator("button[type=reset]").click()
    for name, value in filters.items():
        page.locator(f"[name={name}]").select_option(value)
    return int(re.match(r"[\d,]+", hits(page))[0].replace(",", ""))


# ---- texts of strangers


def test_hostile_texts_are_text(opened, run):
    page = opened(run)
    comparisons = {row["id"]: row for row in read_jsonl(run.path / "comparisons.jsonl")}
    seen = set()
    page.locator("#list").focus()
    for _ in comparisons:
        key = page.evaluate("location.hash").rpartition(":")[2] or next(iter(comparisons))[:16]
        row = next(row for name, row in comparisons.items() if name.startswith(key))
        shown = page.locator(".response > .text").evaluate_all("all => all.map(e => e.textContent)")
        assert shown == [visible(row["first"]), visible(row["second"])]
        seen |= {row["first"], row["second"]}
        page.keyboard.press("j")
    assert set(HOSTILE) <= seen
    assert page.evaluate("window.hit") is None
    assert page.locator("#detail a, #detail img, #detail script, #detail b").count() == 0
    assert page.evaluate("document.scripts.length") == 2
    for kind in ("revisions", "answers"):
        page.locator("[name=kind]").select_option(kind)
        page.locator("#list").focus()
        for _ in range(5):
            page.keyboard.press("j")
    assert page.evaluate("window.hit") is None


def test_the_policy_is_in_force(chromium, run):
    """What the script never does would be refused as well."""
    page = chromium.new_page()
    page.set_default_timeout(PATIENCE)
    page.add_init_script(WATCH)
    page.goto(f"file://{run.path}/report.html")
    tried = page.evaluate("""() => {
      try { document.getElementById("detail").innerHTML = "<i>x</i>"; return "done"; }
      catch (error) { return error.name; }
    }""")
    assert tried == "TypeError"
    page.evaluate("""() => {
      const image = document.createElement("img");
      image.src = "data:image/gif;base64,R0lGODlhAQABAAAAACw=";
      document.body.append(image);
      const styled = document.createElement("p");
      styled.setAttribute("style", "color: red");
      document.body.append(styled);
    }""")
    page.wait_for_function("window.violations.length === 3")  # the markup, the image, the style
    page.close()


def test_directions_cannot_spill_over(opened, run):
    page = opened(run)
    page.locator("[name=words]").fill("U+202E")
    assert page.locator(".response .text", has_text="⟨U+202E⟩reversed").count() == 1
    for text in page.locator("#detail .text").all():
        assert text.get_attribute("dir") == "auto"
        assert text.evaluate("e => getComputedStyle(e).unicodeBidi") == "isolate"


# ---- finding things


def test_search_and_keys(opened, run):
    page = opened(run)
    everything = read_jsonl(run.path / "comparisons.jsonl")
    assert hits(page) == "60 comparisons"
    page.keyboard.press("/")
    assert page.evaluate("document.activeElement.name") == "words"
    page.keyboard.type("QUESTION 7:")
    own = [row for row in everything if "Question 7:" in row["prompt"][0]["content"]]
    assert hits(page) == f"{len(own)} of 60 comparisons"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "list"
    page.keyboard.press("ArrowDown")
    page.keyboard.press("j")
    page.keyboard.press("k")
    assert page.evaluate("location.hash") == f"#item=comparisons:{own[1]['id'][:16]}"
    selected = page.locator("#list").get_attribute("aria-activedescendant")
    assert page.locator(f"#{selected}").get_attribute("aria-selected") == "true"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "detail"
    page.keyboard.press("k")
    assert page.locator("#detail h3").inner_text().startswith("Comparison 1 of 3")
    page.keyboard.press("Escape")
    assert page.evaluate("document.activeElement.id") == "list"
    page.keyboard.press("End")
    assert page.locator("#detail h3").inner_text().startswith("Comparison 3 of 3")
    page.locator("[name=words]").fill("")
    page.locator("#list").focus()
    page.keyboard.press("End")
    assert page.locator("#row-59").is_visible()
    page.locator("[name=fault]").select_option("-")  # what is found now is seen from its first on
    assert page.locator("#row-0").is_visible()
    page.locator("button[type=reset]").click()
    page.keyboard.press("/")
    assert page.evaluate("document.activeElement.name") != "words"  # a button has its own keys
    page.locator("#list").focus()
    page.keyboard.press("/")
    page.keyboard.type("nothing has this")
    assert hits(page) == "0 of 60 comparisons"
    assert page.locator("#detail").inner_text() == "Nothing found."
    page.locator("[name=words]").fill(own[2]["id"][:20])
    assert hits(page) == "1 of 60 comparisons"
    page.locator("[name=words]").fill("I weigh both")  # what the judge said
    assert hits(page) == "60 comparisons"


def test_the_address_remembers_the_item(opened, run):
    item = read_jsonl(run.path / "comparisons.jsonl")[40]
    page = opened(run, address=f"#item=comparisons:{item['id'][:16]}")
    assert page.locator("#detail h3").inner_text().startswith("Comparison 41 of 60")
    assert page.locator("#row-40").is_visible()
    page.reload()
    assert page.locator("#detail h3").inner_text().startswith("Comparison 41 of 60")
    page.locator("[name=words]").fill("nothing has this")
    revised = read_jsonl(run.path / "revisions.jsonl")[-1]["response_id"]
    page.evaluate(f"location.hash = '#item=revisions:{revised[:16]}'")
    page.wait_for_function("document.querySelector('#detail h3')?.innerText.includes('12 of 12')")
    assert page.locator("[name=words]").input_value() == ""
    assert "fault: truncated" in page.locator("#detail").inner_text()
    assert opened(run, address="#item=comparisons:0000000000000000").locator("#row-0").is_visible()


def test_filters_find_what_the_files_say(opened, run):
    page = opened(run)
    labels = read_jsonl(run.path / "labels.jsonl")
    human = {r["comparison_id"]: r["p_first"] for r in read_jsonl(run.path / "human.jsonl")}
    by_call = {}
    for row in read_jsonl(run.path / "verdicts.jsonl"):
        by_call.setdefault((row["comparison_id"], row["principle_id"]), []).append(row["p_first"])

    def apart(a, b):
        return None not in (a, b) and (a - 0.5) * (b - 0.5) < 0

    def count(test):
        return sum(bool(test(row)) for row in labels)

    def sure(p):
        return p is not None and not 0.3 <= p <= 0.7

    def turned(row, *names):
        return any(apart(*by_call[row["comparison_id"], name]) for name in names)

    null = count(lambda row: row["fault"])
    assert 0 < null < 60
    assert chosen(page) == 60
    assert chosen(page, fault="null") == chosen(page, fault="=unparsed") == null
    assert chosen(page, fault="+") == null
    assert chosen(page, fault="-") == 60 - null
    assert chosen(page, confidence="sure") == count(lambda row: sure(row["p_first"])) > 0
    unsure = count(lambda row: row["p_first"] is not None and not sure(row["p_first"]))
    assert chosen(page, confidence="unsure") == unsure > 0
    kind = page.locator("[name=principle] option", has_text="kind").get_attribute("value")
    assert chosen(page, principle=kind, confidence="sure") == count(
        lambda row: sure(row["by_principle"]["kind"])
    )
    assert chosen(page, disagreement="principles") == count(
        lambda row: apart(row["by_principle"]["kind"], row["by_principle"]["honest"])
    )
    assert chosen(page, disagreement="orders") == count(lambda row: turned(row, "kind", "honest"))
    assert chosen(page, disagreement="orders", principle=kind) == count(
        lambda row: turned(row, "kind")
    )
    assert chosen(page, disagreement="people") == count(
        lambda row: apart(row["p_first"], human.get(row["comparison_id"]))
    )
    page.locator("[name=kind]").select_option("answers")
    assert page.locator("[name=disagreement]").is_hidden()


def test_what_a_policy_said_before_and_after(opened, run):
    page = opened(run)
    page.locator("[name=kind]").select_option("answers")
    heads = page.locator("#detail h4").all_inner_texts()
    assert heads[1:] == [
        "tiny, sample 0", "tiny, sample 1", "tiny, sample 2", "tiny, sample 3",
        "PPO, step 0", "PPO, step 30", "evaluated: base", "evaluated: ppo",
    ]  # fmt: skip
    assert "gold 0.500" in page.locator(".response", has_text="PPO, step 0").inner_text()
    page.locator("[name=kind]").select_option("revisions")
    assert page.locator("#detail .round h4").all_inner_texts() == ["Round 1: kind", "Round 2: kind"]


# ---- how it looks


@pytest.mark.parametrize("kind", ["comparisons", "revisions", "answers"])
def test_a_narrow_screen_never_scrolls_sideways(opened, run, kind):
    page = opened(run, width=400)
    page.locator("[name=kind]").select_option(kind)
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    for _ in range(12):
        assert page.evaluate("document.documentElement.scrollWidth") <= 400
        if page.locator("#next").is_disabled():
            break
        page.locator("#next").click()


CONTRAST = """() => {
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const rgb = (colour) => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = colour;
    canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const light = (c) => [0.2126, 0.7152, 0.0722].reduce((sum, weight, n) => {
    const s = c[n] / 255;
    return sum + weight * (s <= 0.04045 ? s / 12.92 : ((s + 0.055) / 1.055) ** 2.4);
  }, 0);
  const behind = (node) => {
    for (let e = node; e; e = e.parentElement) {
      const colour = rgb(getComputedStyle(e).backgroundColor);
      if (colour[3] === 255) return colour;
    }
    return [255, 255, 255, 255];
  };
  const worst = {};
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) {
    const node = walk.currentNode.parentElement;
    const text = walk.currentNode.data.trim();
    if (!text || !node.checkVisibility() || node.closest("script")) continue;
    const style = getComputedStyle(node);
    const colour = rgb(node.closest("svg") ? style.fill : style.color);
    const [a, b] = [light(colour), light(behind(node))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < 4.5) worst[node.tagName + " " + text.slice(0, 30)] = ratio;
  }
  return worst;
}"""


@pytest.mark.parametrize("kind", ["comparisons", "answers"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_texts_have_contrast(opened, run, scheme, kind):
    page = opened(run, color_scheme=scheme)
    page.locator("[name=kind]").select_option(kind)
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert page.evaluate(CONTRAST) == {}


def test_the_theme_can_be_chosen(opened, run):
    page = opened(run, color_scheme="light")

    def paper():
        return page.evaluate("getComputedStyle(document.body).backgroundColor")

    button = page.locator("#theme")
    light = paper()
    button.click()
    assert (button.inner_text(), paper()) == ("Theme: light", light)
    button.click()
    dark = paper()
    assert button.inner_text() == "Theme: dark"
    assert dark != light
    page.reload()
    assert (button.inner_text(), paper()) == ("Theme: dark", dark)
    page.emulate_media(media="print")
    assert paper() == light
    assert page.locator("nav").is_hidden()


def test_everything_has_a_name(opened, run):
    """As the browser tells them to a screen reader."""
    page = opened(run)
    for kind in ("revisions", "answers", "comparisons"):
        page.locator("[name=kind]").select_option(kind)
        tree = page.context.new_cdp_session(page).send("Accessibility.getFullAXTree")
        named = {"button", "link", "searchbox", "combobox", "listbox", "option", "region", "image",
                 "navigation", "search", "heading", "DisclosureTriangle"}  # fmt: skip
        roles = set()
        for node in tree["nodes"]:
            role = node.get("role", {}).get("value")
            if not node["ignored"] and role in named:
                roles.add(role)
                assert node.get("name", {}).get("value", "").strip(), node
        assert named - {"DisclosureTriangle"} <= roles
        levels = page.locator("h1, h2, h3, h4, h5").evaluate_all("e => e.map(h => +h.tagName[1])")
        assert all(b <= a + 1 for a, b in pairwise(levels))
    assert page.locator("html").get_attribute("lang") == "en"
    assert page.locator("#hits").get_attribute("aria-live") == "polite"
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"


def test_without_scripts_the_figures_are_there(chromium, run):
    context = chromium.new_context(java_script_enabled=False)
    context.set_default_timeout(PATIENCE)
    page = context.new_page()
    page.goto(f"file://{run.path}/report.html")
    assert page.locator("figure svg").count() > 20
    assert page.locator("text=This part needs JavaScript").is_visible()
    assert page.locator("#filters").is_hidden()
    context.close()


# ---- how quick it is

CHANGE = """([name, value]) => {
  const form = document.getElementById("filters");
  form[name].value = value;
  form[name].dispatchEvent(new Event("input", { bubbles: true }));
  document.body.getBoundingClientRect();  // the layout counts, too
}"""


def cpu_ms(session) -> float:
    """What the page's thread has worked so far; other processes do not count."""
    metrics = session.send("Performance.getMetrics")["metrics"]
    return 1000 * next(row["value"] for row in metrics if row["name"] == "TaskDuration")


@pytest.mark.slow
def test_five_thousand_comparisons_do_not_lag(chromium, many):
    context = chromium.new_context()
    context.set_default_timeout(PATIENCE)
    page = context.new_page()
    session = context.new_cdp_session(page)
    session.send("Performance.enable", {"timeDomain": "threadTicks"})
    page.goto(f"file://{many.path}/report.html")
    assert page.locator("#hits").inner_text() == "4,998 comparisons"
    opening = cpu_ms(session)
    took: dict[str, float] = {}
    changes = (
        ["words", "useful thing then"], ["words", "question 12"], ["disagreement", "orders"],
        ["confidence", "sure"], ["principle", "1"], ["fault", "-"], ["words", ""],
        ["disagreement", "principles"], ["confidence", ""], ["disagreement", ""], ["fault", ""],
        ["principle", ""],
    )  # fmt: skip
    # The least of three rounds: what another process takes from this one only adds to it.
    for change in changes * 3:
        before = cpu_ms(session)
        page.evaluate(CHANGE, change)
        key = "=".join(change)
        took[key] = min(took.get(key, math.inf), cpu_ms(session) - before)
    wall = page.evaluate("performance.getEntriesByType('navigation')[0].duration")
    size = (many.path / "report.html").stat().st_size / 1e6
    print(f"{size:.1f} MB, open after {wall:.0f} ms, of these {opening:.0f} of work; {took}")
    slow = slowdown()
    assert opening < 1500 * slow
    assert max(took.values()) < 50 * slow
    assert page.locator(".row").count() < 60
    page.locator("#list").focus()
    page.keyboard.press("End")
    assert page.locator("#row-4997").is_visible()
    assert page.locator(".row").count() < 60
    context.close()

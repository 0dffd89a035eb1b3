"""The page in Chromium: asked, switched, compared, hovered, slid, watched, closed and reloaded, as a visitor would."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from support.chat_material import chat_prompt, greedy_answer
from support.page_server import PageCommand, PageServer
from support.recipe_runs import REPOSITORY, command_line, end_group, environment

from parscale_adapt.analysis.law_source import load_law
from parscale_adapt.page.answers import MAX_ANSWERS
from parscale_adapt.page.law import LawDesk
from parscale_adapt.page.resident import Resident
from parscale_adapt.page.runs import RunReader
from parscale_adapt.page.server import Page
from parscale_adapt.serving.loading import find_speaker


pytestmark = [pytest.mark.browser, pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")]
SECONDS = 60
LONG = 440
HTML = '<img src=x onerror="document.title=1"><script>document.title=2</script>'


@pytest.fixture(scope="module")
def browser():
    from support.browser import chromium

    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """One finished run; those of the tests come beside it."""
    folder = tmp_path_factory.mktemp("runs")
    log = [
        {
            "step": step,
            "loss": 5 - step / 10,
            "time": 1000 + step,
            "num_input_tokens_seen": 64 * step,
            "stream_entropy": 0.6,
            "stream_weight/0": 0.98,
            "stream_weight/1": 0.02,
        }
        for step in range(1, 21)
    ]
    (folder / "done").mkdir()
    (folder / "done" / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    (folder / "done" / "run.json").write_text(json.dumps({"streams": {"num_streams": 2, "aggregator_smoothing": 0}}))
    metrics = {"heldout_loss": 2.5, "heldout": {"accuracy": 0.75}, "loss": "loss (nats per token)", "num_tokens": 1280}
    (folder / "done" / "metrics.json").write_text(json.dumps(metrics))
    return folder


@pytest.fixture(scope="module")
def resident(chat_material):
    root = chat_material.root
    resident = Resident(find_speaker(str(root / "backbone"), adapters=[str(root / "two"), str(root / "four")]))
    resident.start()
    return resident


@pytest.fixture(scope="module")
def server(resident, runs):
    server = PageServer(Page(resident, LawDesk(), RunReader(runs)))
    yield server
    server.close()


@pytest.fixture
def tabs(browser, server):
    from support.browser import Tabs

    tabs = Tabs(browser, server.address)
    yield tabs
    tabs.close()


def ask(page, text, longest=12, button="#ask"):
    page.wait_for_selector("#ask:not([disabled])")
    page.evaluate("document.querySelector('#settings').open = true")
    page.fill("#max-new-tokens", str(longest))
    page.fill("#question", text)
    page.click(button)


def answers_shown(page, count=1):
    """Texts of the last turn, once it has ended."""
    page.wait_for_selector("#ask:not([disabled])")
    texts = page.locator(".answers").last.locator(".answer .text").all_text_contents()
    assert len(texts) == count
    return texts


def expected(chat_material, name, *questions, longest=12):
    """Answers of `generate`, each turn with a model loaded for itself."""
    messages = []
    for question in questions:
        messages.append({"role": "user", "content": question})
        prompt = chat_prompt(chat_material.tokenizer, messages)
        text = greedy_answer(chat_material.model(name), chat_material.tokenizer, prompt, longest)
        messages.append({"role": "assistant", "content": text})
    return messages[-1]["content"]


def wait_until(holds):
    end = time.monotonic() + SECONDS
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.05)


def wait_for(page, expression, argument=None):
    """Wait in Python: the page's own policy forbids what Playwright's `wait_for_function` does, which is to read text as code."""
    wait_until(lambda: page.evaluate(expression, argument) or page.wait_for_timeout(30))


def places_left(resident):
    return resident.answers()._places._value


def test_a_question_is_answered_as_by_generate_and_the_conversation_goes_on(tabs, chat_material):
    page = tabs.open()
    ask(page, "hello")
    assert answers_shown(page) == [expected(chat_material, "four", "hello")]
    page.fill("#question", "and then?")
    page.keyboard.press("Enter")
    wait_for(page, "document.querySelectorAll('.answer dl').length === 2")
    assert answers_shown(page) == [expected(chat_material, "four", "hello", "and then?")]
    figures = dict(zip(page.locator(".answer dt").all_text_contents(), page.locator(".answer dd").all_text_contents()))
    assert float(figures["tokens/s"]) > 0
    assert float(figures["ms per token"]) > 0
    assert figures["cache"].endswith("KiB")
    assert figures["tokens"] == "12"
    page.click("#reset")
    assert page.locator(".answer").count() == 0


def test_the_dial_switches_p_and_the_conversation_is_kept(tabs, chat_material):
    page = tabs.open()
    page.wait_for_selector("#ask:not([disabled])")
    assert page.locator(".choices label").all_text_contents() == ["1", "2", "4"]
    page.get_by_role("radio", name="2 streams, two").check(force=True)
    ask(page, "hello")
    assert answers_shown(page) == [expected(chat_material, "two", "hello")]
    page.locator(".choices input").nth(1).press("ArrowLeft")
    assert "backbone: one stream" in page.locator("#voice-line").text_content()
    ask(page, "hello")
    first = expected(chat_material, "two", "hello")
    prompt = chat_prompt(
        chat_material.tokenizer,
        [
            {"role": "user", "content": "hello"},
            {"role": "assistant", "content": first},
            {"role": "user", "content": "hello"},
        ],
    )
    wait_for(page, "document.querySelectorAll('.answer dl').length === 2")
    assert answers_shown(page) == [greedy_answer(chat_material.plain(), chat_material.tokenizer, prompt, 12)]


def test_compare_shows_what_each_adapter_alone_answers(tabs, chat_material):
    page = tabs.open()
    ask(page, "hello", button="#compare")
    shown = answers_shown(page, count=3)
    assert shown == [expected(chat_material, name, "hello") for name in (None, "two", "four")]
    assert page.locator(".answer h3").all_text_contents() == ["P = 1", "P = 2", "P = 4"]
    caches = [card.locator("dd").nth(3).text_content() for card in page.locator(".answer").all()]
    sizes = [float(size.split()[0]) for size in caches]
    assert sizes == pytest.approx([sizes[0], 2 * sizes[0], 4 * sizes[0]], rel=0.01)


def test_settings_reach_the_model(tabs, chat_material):
    page = tabs.open()
    page.wait_for_selector("#ask:not([disabled])")
    ask(page, "hello")
    page.fill("#system", "Be brief.")
    page.click("#reset")
    ask(page, "hello")
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hello"}]
    prompt = chat_prompt(chat_material.tokenizer, messages)
    greedy = greedy_answer(chat_material.model("four"), chat_material.tokenizer, prompt, 12)
    wait_for(page, "document.querySelectorAll('.answer dl').length === 1")
    assert answers_shown(page) == [greedy]
    drawn = []
    for seed in (1, 1, 2):
        page.click("#reset")
        page.locator("#temperature").fill("1.5")
        page.fill("#seed", str(seed))
        ask(page, "hello")
        page.wait_for_selector(".answer dl")
        drawn += answers_shown(page)
    assert drawn[0] == drawn[1] != drawn[2]
    assert drawn[0] != greedy


def test_a_token_shows_its_weights_by_mouse_and_by_keyboard(tabs, chat_material):
    page = tabs.open()
    ask(page, "hello")
    (text,) = answers_shown(page)
    page.get_by_role("button", name="See the streams").click()
    page.wait_for_selector(".token")
    prompt = chat_prompt(chat_material.tokenizer, [{"role": "user", "content": "hello"}])
    tokens = chat_material.tokenizer(text, return_tensors="pt").input_ids
    model = chat_material.adapted("four")
    (aggregator,) = [part for name, part in model.named_modules() if name.endswith("aggregator.default")]
    aggregator.record_weights = True
    with torch.no_grad():
        model(input_ids=torch.cat([prompt, tokens], 1))
    weights = aggregator.last_weights[0, prompt.shape[1] - 1 : -1]

    def shown():
        return [
            float(cell.get_attribute("title")) for cell in page.locator("#inspector tbody td:nth-child(2)").all()[:4]
        ]

    assert page.locator(".token").count() == len(weights) == 12
    for place, token in enumerate(page.locator(".token").all()):
        token.hover()
        assert shown() == pytest.approx(weights[place].tolist(), abs=1e-5)
        assert token.get_attribute("data-stream") == str(weights[place].argmax().item())
        assert token.inner_text() == text[place]
    page.locator(".token").nth(0).focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert shown() == pytest.approx(weights[2].tolist(), abs=1e-5)
    page.keyboard.press("End")
    assert shown() == pytest.approx(weights[-1].tolist(), abs=1e-5)
    entropy = -(weights[-1] * weights[-1].log()).sum().item()
    assert f"Entropy {entropy:.3f} of at most 1.386 nats" in page.locator("#inspector").text_content()
    assert page.locator("#inspector tbody tr").count() == 5
    strengths = page.eval_on_selector_all(
        ".token", "all => all.map(one => Number(getComputedStyle(one).backgroundColor.match(/[\\d.]+(?=\\))/)[0]))"
    )
    order = weights.max(-1).values.argsort().tolist()
    assert [strengths[place] for place in order] == sorted(strengths)
    legend = page.locator("#legend li").all_text_contents()
    means = weights.mean(0)
    assert [item.split(",")[0] for item in legend] == [f"{p}mean weight {means[p]:.3f}" for p in range(4)]


def test_sliders_move_the_law(tabs):
    page = tabs.open("/#law")
    page.wait_for_selector("#law-chart svg")
    law = load_law("stack-v2-python")
    with page.expect_response(re.compile("/api/law\\?")) as response:
        page.locator("input[name=num_streams]").fill("4")
    found = response.value.json()
    wait_for(page, "document.querySelector('#law-headline').textContent.includes('in 4 streams')")
    comparison = found["comparison"]
    assert (
        f"{comparison['equal_loss']:.4f} instead of {comparison['loss']:.4f}"
        in page.locator("#law-headline").text_content()
    )
    assert comparison["loss"] == pytest.approx(float(law.loss(comparison["rows"][0]["backbone_params"], 1)))
    memory = page.locator("#law-table tbody tr").nth(0).locator("td").nth(2).text_content()
    assert memory == f"{comparison['rows'][0]['memory_gib']:.3g} GiB"
    for name, value in (("num_params", "900"), ("batch_size", "64"), ("input_len", "13"), ("output_len", "10")):
        before = page.locator("#law-table").text_content()
        page.locator(f"input[name={name}]").fill(value)
        wait_for(page, "before => document.querySelector('#law-table').textContent !== before", before)
    page.select_option("select[name=device]", "rtx4090")
    wait_for(page, "document.querySelector('#law-notes').textContent.includes('Too large for rtx4090')")
    circles = page.locator("#law-chart circle").count()
    assert circles == 24 + 1
    page.select_option("select[name=law]", "pile")
    wait_for(page, "!document.querySelector('#law-headline').textContent.includes('0.9')")
    page.locator("input[name=num_params]").focus()
    before = page.locator("#law-headline").text_content()
    page.keyboard.press("ArrowLeft")
    wait_for(page, "before => document.querySelector('#law-headline').textContent !== before", before)


def test_a_finished_run_is_drawn(tabs):
    page = tabs.open("/#runs")
    page.wait_for_selector("#run-loss svg")
    row = page.locator("#runs-table tbody tr", has_text="done")
    assert "finished" in row.text_content()
    row.locator("button").click()
    wait_for(page, "document.querySelector('#run-title').textContent === 'done'")
    assert page.locator("#run-weights polyline").count() == 2
    wait_for(page, "document.querySelector('#run-warning').textContent.includes('collapsed on stream 0')")
    held = page.locator("#run-heldout tbody tr").all_text_contents()
    assert held == ["held-out loss2.5000", "accuracy0.7500"]


def test_a_run_is_watched_while_it_trains_elsewhere(tabs, runs, material):
    page = tabs.open("/#runs")
    options = material.cpt_options(output_dir=str(runs / "live"), max_steps=1500, max_heldout_rows=2)
    command = [sys.executable, str(REPOSITORY / "recipes" / "cpt.py"), *command_line(options)]
    process = subprocess.Popen(
        command, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    try:
        row = page.locator("#runs-table tbody tr", has_text="live")
        row.locator(".state.running").wait_for(timeout=120_000)
        row.locator("button").click()
        wait_for(page, "document.querySelector('#run-title').textContent === 'live'")
        page.wait_for_selector("#run-loss svg polyline", timeout=120_000)

        def last_step():
            return int(row.locator("td").nth(2).text_content().replace(",", "") or 0)

        first = last_step()
        wait_until(lambda: last_step() > first or page.wait_for_timeout(200))
        page.wait_for_selector("#run-weights polyline")
        page.wait_for_selector("#run-speed polyline")
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        row.locator(".state.stopped").wait_for()
    finally:
        end_group(process)


def test_a_file_that_is_half_written_breaks_nothing(tabs, runs):
    (runs / "half").mkdir()
    (runs / "half" / "run.json").write_text('{"streams": {"num_st')
    (runs / "half" / "log.jsonl").write_text('{"step": 1, "loss": 2.5}\n{"step": 2, "lo')
    page = tabs.open("/#runs")
    row = page.locator("#runs-table tbody tr", has_text="half")
    row.locator("button").click()
    wait_for(page, "document.querySelector('#run-title').textContent === 'half'")
    assert "2.5000" in row.text_content()
    assert page.locator("#run-loss polyline").count() == 1


def test_two_tabs_are_answered_at_once(tabs, chat_material):
    first = tabs.open()
    second = tabs.open_beside(first.context)
    ask(first, "hello", longest=LONG)
    ask(second, "and then?")
    (short,) = answers_shown(second)
    assert first.locator("#stop").is_visible(), "the long answer ended first"
    assert short == expected(chat_material, "four", "and then?")
    (long,) = answers_shown(first)
    assert long == expected(chat_material, "four", "hello", longest=LONG)


def test_a_tab_that_is_closed_is_answered_no_more(tabs, resident):
    page = tabs.open()
    ask(page, "hello", longest=LONG)
    wait_for(page, "document.querySelector('.answer .text').textContent.length > 3")
    assert places_left(resident) == MAX_ANSWERS - 1
    length = len(page.locator(".answer .text").text_content())
    page.close()
    wait_until(lambda: places_left(resident) == MAX_ANSWERS)
    assert length < LONG


def test_stop_keeps_what_was_said(tabs, resident, chat_material):
    page = tabs.open()
    ask(page, "hello", longest=LONG)
    wait_for(page, "document.querySelector('.answer .text').textContent.length > 3")
    page.click("#stop")
    (text,) = answers_shown(page)
    assert 3 < len(text) < LONG
    assert expected(chat_material, "four", "hello", longest=LONG).startswith(text)
    assert "Stopped." in page.locator(".answer").text_content()
    wait_until(lambda: places_left(resident) == MAX_ANSWERS)


def test_a_reload_amid_an_answer_stops_it_and_keeps_the_conversation(tabs, resident, chat_material):
    page = tabs.open()
    ask(page, "hello", longest=LONG)
    wait_for(page, "document.querySelector('.answer .text').textContent.length > 3")
    page.reload()
    wait_until(lambda: places_left(resident) == MAX_ANSWERS)
    (text,) = answers_shown(page)
    assert expected(chat_material, "four", "hello", longest=LONG).startswith(text)
    assert 3 < len(text) < LONG
    assert page.locator(".question").text_content() == "hello"
    page.click("#reset")
    ask(page, "hello")
    page.wait_for_selector(".answer dl")
    assert answers_shown(page) == [expected(chat_material, "four", "hello")]


def test_a_prompt_beyond_the_context_is_one_sentence(tabs):
    page = tabs.open()
    ask(page, "x" * 2000)
    notice = page.locator("#transcript .notice")
    notice.wait_for()
    assert re.fullmatch(
        r"The conversation has \d+ tokens, and the model reads 512 with its answer: .*\.", notice.text_content()
    )
    page.wait_for_selector("#ask:not([disabled])")
    assert page.input_value("#question") == "x" * 2000


def check_that_nothing_was_html(page):
    page.wait_for_timeout(200)
    assert page.title() == "parscale"
    assert page.locator("main img, main script").count() == 0


def test_what_a_model_says_is_never_html(tabs):
    page = tabs.open()
    page.wait_for_selector("#ask:not([disabled])")
    figures = {"ended": "end", "tokens_per_second": None, "ms_per_token": None, "cache_bytes": 1}
    events = [
        {"event": "tokens", "tokens": [1], "texts": [HTML]},
        {"event": "end", "answers": [{"tokens": [1], "text": HTML, **figures}], "first_token_seconds": 1},
    ]
    lines = "".join(json.dumps(event) + "\n" for event in events)
    page.route("**/api/answer", lambda route: route.fulfill(body=lines))
    said = {"tops": [HTML] * 3, "top_probs": [1] * 3, "token_probs": [1] * 3}
    token = {"text": HTML, "token": HTML, "weights": [0.5, 0.5], "entropy": 0.69, **said}
    statistics = {f"stream_{name}/{p}": 0.5 for name in ("weight", "largest") for p in range(2)}
    streams = {"num_streams": 2, "tokens": [token], "statistics": {**statistics, "stream_entropy": 0.69}}
    page.route("**/api/streams", lambda route: route.fulfill(json=streams))
    ask(page, HTML)
    page.get_by_role("button", name="See the streams").click()
    page.wait_for_selector(".token")
    assert page.locator(".token").text_content() == HTML
    check_that_nothing_was_html(page)


def test_what_a_file_says_is_never_html(tabs):
    page = tabs.open()
    page.wait_for_selector("#ask:not([disabled])")
    words = dict.fromkeys(("name", "label", "state", "loss_label"), HTML)
    numbers = {"num_streams": 2, **dict.fromkeys(("step", "loss", "heldout_loss", "num_tokens", "changed"), 1)}
    run = {**words, **numbers, "heldout": {HTML: 1}}
    overview = {"folder": HTML, "is_there": True, "runs": [run], "num_older": 1}
    page.route("**/api/runs", lambda route: route.fulfill(json=overview))
    curves = {name: [] for name in ("heldout_curve", "weights", "entropy", "speed")}
    details = {**run, **curves, "training": [[1, 1]], "troubles": [HTML]}
    page.route("**/api/run?*", lambda route: route.fulfill(json=details))
    page.click("#tab-runs")
    page.wait_for_selector("#run-loss svg")
    assert page.locator("#run-warning").text_content() == HTML
    assert page.locator("#runs-older").text_content().startswith(f"1 older runs in {HTML} are not shown")
    check_that_nothing_was_html(page)


@pytest.mark.parametrize(("scheme", "width"), [("light", 1200), ("dark", 1200), ("light", 390), ("dark", 390)])
def test_every_tab_is_readable_and_fits(tabs, scheme, width):
    from support.browser import lowest_contrast

    page = tabs.open(color_scheme=scheme, viewport={"width": width, "height": 800})
    page.wait_for_selector("#ask:not([disabled])")
    assert lowest_contrast(page)[0] >= 4.5
    ask(page, "hello", longest=40, button="#compare")
    answers_shown(page, count=3)
    page.locator("#tab-chat").focus()
    seen = {}
    for name in ("chat", "streams", "law", "runs"):
        if name == "streams":
            page.wait_for_selector(".token")
        if name == "runs":
            page.locator("#runs-table button", has_text="done").click()
        if name in ("law", "runs"):
            page.wait_for_selector(f"#{name} figure svg")
        contrast, text, count = seen[name] = lowest_contrast(page)
        assert contrast >= 4.5, (name, text)
        assert count > 8
        assert page.evaluate("document.documentElement.scrollWidth") <= width, name
        assert page.locator(f"#tab-{name}").get_attribute("aria-selected") == "true"
        page.locator(f"#tab-{name}").press("ArrowRight")
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (max(int(part) for part in re.findall(r"\d+", ground)) < 60) == (scheme == "dark")


def test_the_keyboard_reaches_everything_of_the_chat(tabs):
    page = tabs.open()
    page.wait_for_selector("#ask:not([disabled])")
    page.fill("#question", "hello")
    page.locator("#tab-chat").focus()
    reached = []
    for _ in range(9):
        page.keyboard.press("Tab")
        reached.append(
            page.evaluate("document.activeElement.id || document.activeElement.name || document.activeElement.tagName")
        )
    assert [name for name in reached if name in ("voice", "SUMMARY", "reset", "question", "ask", "compare")] == [
        "voice",
        "SUMMARY",
        "reset",
        "question",
        "ask",
        "compare",
    ]


def test_without_a_model_that_can_be_used_the_page_says_why_and_the_rest_works(
    browser, chat_material, runs, monkeypatch
):
    from support.browser import Tabs

    monkeypatch.setattr("parscale_adapt.serving.memory.free_memory", lambda device: 0)
    resident = Resident(find_speaker(str(chat_material.root / "backbone")))
    resident.start()
    server = PageServer(Page(resident, LawDesk(), RunReader(runs)))
    tabs = Tabs(browser, server.address)
    page = tabs.open()
    page.locator("#problem").wait_for()
    assert (
        page.locator("#problem").text_content().startswith("The weights of backbone need 0.0 GiB of memory, and 0.0")
    )
    assert page.locator("#ask").is_disabled()
    page.click("#tab-law")
    page.wait_for_selector("#law-chart svg")
    tabs.close()
    server.close()


def test_the_command_serves_the_page(browser, chat_material, tmp_path):
    """Started as a user does; the page is there before the model is."""
    from support.browser import Tabs

    root = chat_material.root
    adapters = ("--adapter", f"small={root / 'two'}", "--adapter", root / "four")
    command = PageCommand(tmp_path, root / "backbone", *adapters, "--runs", tmp_path)
    try:
        command.wait()
        tabs = Tabs(browser, command.address)
        page = tabs.open()
        ask(page, "hello")
        assert answers_shown(page) == [expected(chat_material, "four", "hello")]
        assert page.evaluate("performance.getEntriesByName('first-contentful-paint').length") == 1
        page.click("#tab-runs")
        wait_for(page, "document.querySelector('#runs-empty').textContent.includes('No run of a recipe')")
        tabs.close()
    finally:
        command.close()
    assert "Traceback" not in command.log.read_text()

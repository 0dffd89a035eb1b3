"""The page's server: who is let in, what is escaped, that a visitor who leaves is not answered any more."""

import asyncio
import json
import threading
from urllib.parse import quote

import pytest
from support.page_server import PageServer

from parscale_adapt.page.guard import MAX_BODY, Guard
from parscale_adapt.page.law import LawDesk
from parscale_adapt.page.runs import RunReader
from parscale_adapt.page.server import STATIC, Page


QUESTION = {
    "messages": [{"role": "user", "content": "hello"}],
    "voices": ["two"],
    "temperature": 0,
    "seed": 0,
    "max_new_tokens": 4,
}


class Loaded:
    """A resident that was loaded before."""

    def __init__(self, answers):
        self._answers = answers

    def answers(self):
        if isinstance(self._answers, str):
            raise ValueError(self._answers)
        return self._answers

    def status(self):
        return {"model": "tiny", "state": "ready", "problem": None}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    (folder / "inside" / "one").mkdir(parents=True)
    (folder / "inside" / "one" / "metrics.json").write_text("{}")
    (folder / "outside").mkdir()
    (folder / "outside" / "metrics.json").write_text('{"heldout_loss": 42}')
    (folder / "inside" / "link").symlink_to(folder / "outside")
    return folder / "inside"


@pytest.fixture(scope="module")
def server(answers, runs):
    server = PageServer(Page(Loaded(answers), LawDesk(), RunReader(runs)))
    yield server
    server.close()


def events_in(body):
    return [json.loads(line) for line in body.decode().splitlines()]


def test_an_answer_comes_as_lines(server):
    status, headers, body = server.ask("/api/answer", QUESTION)
    assert status == 200
    assert headers["content-type"].startswith("application/x-ndjson")
    events = events_in(body)
    assert [event["event"] for event in events] == ["start", *["tokens"] * 4, "end"]
    assert "".join(event["texts"][0] for event in events[1:-1]) == events[-1]["answers"][0]["text"]
    tokens = events[-1]["answers"][0]["tokens"]
    status, _, body = server.ask("/api/streams", {"voice": "two", "messages": QUESTION["messages"], "tokens": tokens})
    assert status == 200
    assert len(json.loads(body)["tokens"]) == 4


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"voices": ["three"]}, "There is no voice 'three': choose among backbone, two, four."),
        ({"voices": []}, "`voices` must be a list of names, at least one."),
        ({"messages": []}, "`messages` must be questions and answers in turn, the last one a question."),
        ({"messages": [{"role": "user"}]}, "`messages` must be a list of objects"),
        ({"messages": [{"role": "user", "content": " "}]}, "The question is empty: write one."),
        ({"temperature": -1}, "`temperature` must be a number from 0 to 10, got -1."),
        ({"temperature": None}, "`temperature` must be a number from 0 to 10, got None."),
        ({"seed": 0.5}, "`seed` must be a whole number from 0 to"),
        ({"max_new_tokens": 0}, "`max_new_tokens` must be a whole number from 1 to"),
    ],
)
def test_a_wrong_question_is_one_sentence(server, change, sentence):
    status, _, body = server.ask("/api/answer", {**QUESTION, **change})
    assert status == 400
    assert json.loads(body)["problem"].startswith(sentence)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/api/answer", b"{"),
        ("/api/answer", b"[]"),
        ("/api/streams", {"voice": "two", "messages": QUESTION["messages"], "tokens": [10**9]}),
        ("/api/streams", {"voice": "two", "messages": QUESTION["messages"], "tokens": []}),
        ("/api/streams", {"voice": "backbone", "messages": QUESTION["messages"], "tokens": [1]}),
        ("/api/law?law=nothing", None),
        ("/api/run?run=nothing", None),
    ],
)
def test_other_wrong_requests_too(server, path, body):
    status, _, answer = server.ask(path, body)
    assert status == 400
    assert json.loads(answer)["problem"].endswith((".", ". "))


def test_a_prompt_beyond_the_context_is_one_sentence(server):
    long = {**QUESTION, "messages": [{"role": "user", "content": "x" * 2000}]}
    (event,) = events_in(server.ask("/api/answer", long)[2])
    assert event["event"] == "problem"
    assert "tokens, and the model reads 512 with its answer: start a new conversation" in event["problem"]


def test_an_error_in_an_answer_is_told_and_does_not_hurt_the_next(server, answers, monkeypatch, capsys):
    with monkeypatch.context() as broken:
        broken.setattr(answers.model, "generate", lambda **kwargs: 1 / 0)
        events = events_in(server.ask("/api/answer", QUESTION)[2])
    assert events[-1]["problem"] == "The answer ended in an error (ZeroDivisionError): division by zero"
    assert "ZeroDivisionError" in capsys.readouterr().err
    assert events_in(server.ask("/api/answer", QUESTION)[2])[-1]["event"] == "end"


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example", "", "[::1", "localhost@evil.example.org:1/"]
)
def test_a_name_of_another_site_is_refused(server, host):
    for path in ("/", "/static/app.js", "/api/status"):
        assert server.ask(path, Host=host)[0] == 403
    assert server.ask("/api/answer", QUESTION, Host=host)[0] == 403


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:1234", "127.0.0.1:80", "[::1]:7860", "192.168.0.7"])
def test_names_and_addresses_of_this_machine_are_served(server, host):
    assert server.ask("/api/status", Host=host)[0] == 200


def test_a_page_of_another_origin_may_not_ask(server):
    ours = f"127.0.0.1:{server.port}"
    for origin in ("http://evil.example", "null", f"http://127.0.0.1:{server.port + 1}"):
        assert server.ask("/api/answer", QUESTION, Origin=origin)[0] == 403
        assert server.ask("/api/status", Origin=origin)[0] == 403
    assert server.ask("/api/answer", QUESTION, Origin=f"http://{ours}")[0] == 200
    # What a form elsewhere can send without being asked.
    assert server.ask("/api/answer", QUESTION, Content_Type="text/plain")[0] == 415


def test_a_question_has_a_bounded_size(server):
    assert server.ask("/api/answer", b" " * (MAX_BODY + 1))[0] == 413


@pytest.mark.parametrize("path", ["/", "/static/page.css", "/static/app.js", "/api/status", "/nothing"])
def test_every_answer_forbids_other_hosts_and_scripts_from_text(server, path):
    _, headers, _ = server.ask(path)
    policy = dict(part.strip().split(" ", 1) for part in headers["content-security-policy"].split(";"))
    assert policy["default-src"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    assert policy["frame-ancestors"] == "'none'"
    assert headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize(
    "path", ["/static/../server.py", "/static/%2e%2e/server.py", "/static/..%2fserver.py", "/server.py"]
)
def test_nothing_but_the_page_itself_is_a_file(server, path):
    status, _, body = server.ask(path)
    assert status == 404
    assert b"import" not in body


@pytest.mark.parametrize("name", ["..", "../outside", "link", "one/../../outside", "/etc", "one\0", "checkpoint-1"])
def test_runs_outside_of_the_folder_are_none(server, name):
    status, _, body = server.ask(f"/api/run?run={quote(name)}")
    assert (status, b"42" in body) == (400, False)
    listed = json.loads(server.ask("/api/runs")[2])["runs"]
    assert [run["name"] for run in listed] == ["one"]


def test_a_visitor_who_leaves_is_answered_no_more(server, answers, monkeypatch):
    told, ended = [], threading.Event()
    answer = answers.answer

    def watch(question, voices, emit, stopped):
        def emit_and_count(event):
            told.append(event)
            emit(event)

        answer(question, voices, emit_and_count, stopped)
        ended.set()

    monkeypatch.setattr(answers, "answer", watch)
    connection = server.connect("/api/answer", {**QUESTION, "max_new_tokens": 480})
    response = connection.getresponse()
    assert response.readline()
    assert response.readline()
    connection.close()
    response.close()
    assert ended.wait(60)
    assert told[-1]["answers"][0]["ended"] == "stopped"
    assert len(told[-1]["answers"][0]["tokens"]) < 480


def test_figures_come_while_an_answer_does(server, answers):
    """One visitor's answer holds nobody's page up."""
    connection = server.connect("/api/answer", {**QUESTION, "max_new_tokens": 400})
    response = connection.getresponse()
    assert response.readline()
    for path in ("/", "/api/status", "/api/law/choices", "/api/runs"):
        assert server.ask(path)[0] == 200
    other = events_in(server.ask("/api/answer", QUESTION)[2])
    assert other[-1]["event"] == "end"
    assert not response.isclosed()
    rest = events_in(response.read())
    assert len(rest) > 100, "the long answer ended before the others were given"
    connection.close()


def test_until_a_model_is_there_its_state_is_told():
    server = PageServer(Page(Loaded("tiny is being loaded: ask again in a moment."), LawDesk(), RunReader(STATIC)))
    status, _, body = server.ask("/api/answer", QUESTION)
    server.close()
    assert status == 400
    assert json.loads(body)["problem"] == "tiny is being loaded: ask again in a moment."


def test_the_guard_lets_the_server_itself_start():
    seen = []

    async def app(scope, receive, send):
        seen.append(scope["type"])

    asyncio.run(Guard(app, "127.0.0.1")({"type": "lifespan"}, None, None))
    assert seen == ["lifespan"]


@pytest.mark.parametrize("path", sorted(STATIC.iterdir()), ids=lambda path: path.name)
def test_the_files_of_the_page_name_no_other_host_and_write_no_html(path):
    text = path.read_text().replace("http://www.w3.org/2000/svg", "")
    for forbidden in ("http:", "https:", "innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval("):
        assert forbidden not in text

"""`parscale serve`: transformers' own server answers, through the openai client, as `generate` does in process."""

import json
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest
from support.chat_material import ChatMaterial, chat_prompt, greedy_answer
from support.recipe_runs import end_group, environment, free_port

from parscale_adapt import cli
from parscale_adapt.serving import launcher


openai = pytest.importorskip("openai", reason="the server needs `pip install '.[serving]'`")
pytest.importorskip("fastapi", reason="the server needs `pip install '.[serving]'`")

NUM_TOKENS = 12
SECONDS_TO_START = 120
QUESTION = [{"role": "user", "content": "hello"}]
LONG_QUESTION = [{"role": "user", "content": "hello, is this a longer question? " * 4}]
CHECKPOINTS = ("export", "published")
# Unbounded, the paged cache takes most of the memory of the machine.
_PAGED = ("--continuous-batching", "--cb-num-blocks", "64", "--cb-max-batch-tokens", "256")
MODES = {"generate": (), "continuous batching": _PAGED}


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    return ChatMaterial(tmp_path_factory.mktemp("serving"))


class Server:
    """`parscale serve` in a process of its own."""

    def __init__(self, folder, log, *options):
        self.model = str(folder)
        self.log = log
        port = free_port()
        self.address = f"http://127.0.0.1:{port}"
        arguments = ["serve", self.model, "--host", "127.0.0.1", "--port", str(port), "--device", "cpu", *options]
        code = "from parscale_adapt.cli import main; main()"
        # No cache of the hub exists yet, as on a machine that never downloaded anything.
        variables = environment() | {"HF_HOME": str(log.parent / "no-such-folder")}
        with log.open("w") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-c", code, *arguments],
                stdout=file,
                stderr=subprocess.STDOUT,
                env=variables,
                start_new_session=True,
            )
        self.client = openai.OpenAI(base_url=f"{self.address}/v1", api_key="none", max_retries=0, timeout=100)

    def wait(self):
        end = time.monotonic() + SECONDS_TO_START
        while time.monotonic() < end:
            assert self.process.poll() is None, f"the server ended:\n{self.log.read_text()[-4000:]}"
            try:
                with urllib.request.urlopen(f"{self.address}/health", timeout=5) as response:
                    assert json.load(response) == {"status": "ok"}
                    return
            except (urllib.error.URLError, TimeoutError):
                time.sleep(0.2)
        raise TimeoutError(f"the server was not up within {SECONDS_TO_START} s:\n{self.log.read_text()[-4000:]}")

    def chat(self, messages, **options):
        return self.client.chat.completions.create(
            model=self.model, messages=messages, max_tokens=NUM_TOKENS, temperature=0, **options
        )


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(mode, marks=[pytest.mark.slow, pytest.mark.xdist_group(f"serving {mode}")]) for mode in MODES
    ],
)
def server(request, material):
    log = material.root / request.param.replace(" ", "-") / "server.log"
    log.parent.mkdir()
    server = Server(material.export, log, *MODES[request.param])
    try:
        server.wait()
        yield server
    finally:
        end_group(server.process)
    expected = {"generate": False, "continuous batching": True}[request.param]
    assert f"CB: {expected}" in log.read_text()
    assert f"CB: {not expected}" not in log.read_text()


def in_process(material, prompt):
    """The answer of the adapter on its backbone, which knows nothing of exports and servers."""
    answer = greedy_answer(material.adapted("four"), material.tokenizer, prompt, NUM_TOKENS)
    assert answer != greedy_answer(material.plain(), material.tokenizer, prompt, NUM_TOKENS)
    return answer


def test_chat_is_what_generate_says(server, material):
    answer = server.chat(QUESTION)
    prompt = chat_prompt(material.tokenizer, QUESTION)
    assert answer.choices[0].message.content == in_process(material, prompt)
    assert answer.choices[0].finish_reason == "length"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (prompt.shape[1], NUM_TOKENS)


def test_chat_is_streamed(server, material):
    pieces = [chunk.choices[0].delta.content for chunk in server.chat(QUESTION, stream=True) if chunk.choices]
    pieces = [piece for piece in pieces if piece]
    assert "".join(pieces) == in_process(material, chat_prompt(material.tokenizer, QUESTION))
    assert len(pieces) > NUM_TOKENS // 2


def test_completions_go_on_with_a_text(server, material):
    answer = server.client.completions.create(
        model=server.model, prompt="def hello", max_tokens=NUM_TOKENS, temperature=0
    )
    prompt = material.tokenizer("def hello", return_tensors="pt").input_ids
    assert answer.choices[0].text == in_process(material, prompt)


def test_requests_at_once_don_t_mix(server, material):
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(server.chat, [QUESTION, LONG_QUESTION] * 2))
    expected = [in_process(material, chat_prompt(material.tokenizer, asked)) for asked in (QUESTION, LONG_QUESTION)]
    assert expected[0] != expected[1]
    assert [answer.choices[0].message.content for answer in answers] == expected * 2


def test_models_are_listed_without_a_cache_of_the_hub(server):
    assert server.client.models.list().data == []


@pytest.mark.slow
@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_the_command_hands_over_a_checkpoint_that_the_server_can_load(material, monkeypatch, checkpoint):
    from transformers.cli.serving.model_manager import ModelManager

    published = material.published()
    given = {}

    def stock_command(arguments, prog_name):
        """Instead of serving, load the model as the server does."""
        manager = ModelManager(device="cpu", force_model=arguments[1])
        model, tokenizer = manager.load_model_and_processor(f"{arguments[1]}@main")
        given.update(arguments=arguments, model=model.eval(), tokenizer=tokenizer)
        manager.shutdown()

    monkeypatch.setattr("transformers.cli.transformers.app", stock_command)
    folder, port = str(material.root / checkpoint), free_port()
    options = ["--device", "cpu", "--continuous-batching", "--cb-num-blocks", "16"]
    run("serve", folder, "--host", "127.0.0.1", "--port", str(port), *options, monkeypatch=monkeypatch)
    assert given["arguments"] == ["serve", folder, "--host", "127.0.0.1", "--port", str(port), *options]
    prompt = chat_prompt(given["tokenizer"], QUESTION)
    expected = material.adapted("four") if checkpoint == "export" else published
    answers = [greedy_answer(model, material.tokenizer, prompt, NUM_TOKENS) for model in (given["model"], expected)]
    assert answers[0] == answers[1] != greedy_answer(material.plain(), material.tokenizer, prompt, NUM_TOKENS)


def run(*arguments, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["parscale", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return stop.value.code or 0


def damaged(material, folder, change):
    """A copy of the export with something wrong."""
    shutil.copytree(material.export, folder)
    file = folder / "config.json"
    fields = json.loads(file.read_text())
    if change == "code from the hub":
        fields["auto_map"] = {name: f"someone/else--{place}" for name, place in fields["auto_map"].items()}
    elif change == "other code":
        fields["auto_map"] = {
            name: place.replace("parscale", "other", 1) for name, place in fields["auto_map"].items()
        }
        shutil.copy(folder / "modeling_parscale.py", folder / "modeling_other.py")
    elif change == "no map":
        del fields["auto_map"]
    elif change == "no code":
        (folder / "modeling_parscale.py").unlink()
    elif change == "no tokenizer":
        (folder / "tokenizer.json").unlink()
        (folder / "tokenizer_config.json").unlink()
    elif change == "broken json":
        file.write_text("{")
        return folder
    file.write_text(json.dumps(fields))
    return folder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("code from the hub", "must name classes of modeling_parscale.py, got"),
        ("other code", "must name classes of modeling_parscale.py, got"),
        ("no map", "must name classes of modeling_parscale.py, got"),
        ("no code", "is incomplete, it lacks modeling_parscale.py"),
        ("no tokenizer", "There is no tokenizer in"),
        ("broken json", "is damaged, it is no JSON"),
    ],
)
def test_a_damaged_export_runs_no_code(material, tmp_path, monkeypatch, capsys, change, message):
    folder = damaged(material, tmp_path / "damaged", change)
    for file in folder.glob("modeling_*.py"):
        file.write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n" + file.read_text())
    check_refused(monkeypatch, capsys, message, folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nothing", "There is no folder"),
        ("four", "holds an adapter, which can't be served by itself: export it first, with `parscale export"),
        ("backbone", "has no streams, so it needs no launcher: use `transformers serve"),
        (".", "holds no config.json"),
    ],
)
def test_what_is_no_export_is_refused(material, monkeypatch, capsys, name, message):
    check_refused(monkeypatch, capsys, message, material.root / name)


def test_an_at_sign_in_the_name_is_refused(material, tmp_path, monkeypatch, capsys):
    (tmp_path / "run@2").symlink_to(material.export)
    check_refused(monkeypatch, capsys, "reads what follows @ as a revision: rename", tmp_path / "run@2")


def test_a_taken_port_and_an_unknown_host_are_refused_before_the_model_loads(material, monkeypatch, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        message = f"can't listen on port {port} of 127.0.0.1 (Address already in use): give another with --port"
        check_refused(monkeypatch, capsys, message, material.export, "--host", "127.0.0.1", "--port", port)
        monkeypatch.setattr(socket, "getaddrinfo", with_an_address_of_elsewhere(port))
        check_refused(monkeypatch, capsys, message, material.export, "--host", "127.0.0.1", "--port", port)
    # A second address that this machine lacks is no reason to refuse.
    assert launcher.check_address("127.0.0.1", port) is None
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: [elsewhere(port)])
    message = f"can't listen on port {port} of 192.0.2.1 (Cannot assign requested address)"
    check_refused(monkeypatch, capsys, message, material.export, "--host", "192.0.2.1", "--port", port)


def elsewhere(port):
    """An address that belongs to no machine (RFC 5737)."""
    return (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("192.0.2.1", port))


def with_an_address_of_elsewhere(port):
    here = (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port))
    return lambda *args, **kwargs: [elsewhere(port), here]


def test_missing_packages_are_named(material, monkeypatch, capsys):
    monkeypatch.setattr(launcher, "is_serve_available", lambda: False)
    check_refused(
        monkeypatch, capsys, "needs more packages: install them with `pip install '.[serving]'`", material.export
    )


def check_refused(monkeypatch, capsys, message, folder, *options):
    """One sentence, exit code 1, and the server was not started."""
    monkeypatch.setattr("transformers.cli.transformers.app", lambda *args, **kwargs: pytest.fail("starts the server"))
    port = () if "--port" in options else ("--port", free_port())
    assert run("serve", folder, *port, *options, monkeypatch=monkeypatch) == 1
    errors = capsys.readouterr().err.splitlines()
    assert len([line for line in errors if line.startswith("parscale: ")]) == 1
    assert message in errors[-1]
    assert not any("Traceback" in line for line in errors)


def test_unknown_options_are_refused_by_the_server_s_own_command(material, monkeypatch, capsys):
    arguments = ("serve", material.export, "--port", free_port(), "--no-such-option")
    assert run(*arguments, monkeypatch=monkeypatch) == 2
    assert "--no-such-option" in capsys.readouterr().err


class TestVllm:
    """vLLM itself is tested in vllm_plugin/."""

    def test_its_server_takes_over_with_all_options(self, material, monkeypatch):
        port, taken_over = free_port(), []
        monkeypatch.setattr(launcher, "find_spec", lambda module: module)
        monkeypatch.setattr("os.execv", lambda program, arguments: taken_over.append(arguments))
        options = ("--engine", "vllm", "--host", "127.0.0.1", "--port", port, "--dtype", "float32")
        assert run("serve", material.export, *options, monkeypatch=monkeypatch) == 0
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(material.export)]
        assert taken_over == [[*command, "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32"]]

    @pytest.mark.parametrize(
        ("found", "named"),
        [((), "vLLM and parscale-vllm can't be imported here"), (("vllm",), "parscale-vllm can't be imported here")],
    )
    def test_what_is_missing_is_named_with_the_way_to_install_it(self, material, monkeypatch, capsys, found, named):
        monkeypatch.setattr(launcher, "find_spec", lambda module: module if module in found else None)
        monkeypatch.setattr("os.execv", lambda *arguments: pytest.fail("starts vLLM"))
        message = f"parscale: {named}"
        check_refused(monkeypatch, capsys, message, material.export, "--engine", "vllm")

    def test_a_plain_model_needs_no_launcher(self, material, monkeypatch, capsys):
        sentence = f"it needs no launcher: use `vllm serve {material.root / 'backbone'}`"
        check_refused(monkeypatch, capsys, sentence, material.root / "backbone", "--engine", "vllm")

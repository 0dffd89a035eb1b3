"""vLLM's own OpenAI-compatible server, asked through the openai client. It compiles the model, as it does by default."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import openai
import pytest
from transformers import AutoTokenizer


SECONDS_TO_START = 240
NAME = "in-streams"
QUESTION = [{"role": "user", "content": "hello"}]
GREEDY = {"temperature": 0, "max_tokens": 12, "extra_body": {"ignore_eos": True}}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def client(four_streams, tmp_path_factory):
    port, log = free_port(), tmp_path_factory.mktemp("server") / "log"
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(four_streams.folder)]
    command += ["--served-model-name", NAME, "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32"]
    command += ["--max-model-len", "128", "--max-num-seqs", "16", "--kv-cache-memory-bytes", str(2**28)]
    with log.open("w") as file:
        variables = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, env=variables, start_new_session=True
        )
    try:
        end = time.monotonic() + SECONDS_TO_START
        while not is_up(port):
            assert process.poll() is None, f"the server ended:\n{log.read_text()[-4000:]}"
            assert time.monotonic() < end, f"the server was not up in time:\n{log.read_text()[-4000:]}"
            time.sleep(0.5)
        assert "Verified in 4 streams" in log.read_text()
        yield openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=120)
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(60)


def is_up(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as response:
            return response.status == 200
    except (urllib.error.URLError, OSError):
        return False


def test_completions_are_those_of_generate_and_usage_counts_no_prefix(client, four_streams):
    expected = four_streams.adapted
    answer = client.completions.create(
        model=NAME,
        prompt=expected["prompts"],
        extra_body={"ignore_eos": True, "return_token_ids": True},
        temperature=0,
        max_tokens=12,
    )
    assert [choice.token_ids for choice in answer.choices] == expected["tokens"]
    assert answer.usage.prompt_tokens == sum(map(len, expected["prompts"]))
    assert answer.usage.completion_tokens == 12 * len(expected["prompts"])


def test_chat_is_the_completion_of_its_template(client, four_streams):
    tokenizer = AutoTokenizer.from_pretrained(four_streams.folder)
    prompt = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_dict=False)
    chat = client.chat.completions.create(model=NAME, messages=QUESTION, **GREEDY)
    completion = client.completions.create(model=NAME, prompt=prompt, **GREEDY)
    assert chat.choices[0].message.content == completion.choices[0].text != ""
    assert (chat.usage.prompt_tokens, chat.usage.completion_tokens) == (len(prompt), 12)


def test_a_stream_of_chunks_gives_the_same_text(client):
    whole = client.chat.completions.create(model=NAME, messages=QUESTION, **GREEDY).choices[0].message.content
    chunks = [
        chunk.choices[0].delta.content or ""
        for chunk in client.chat.completions.create(model=NAME, messages=QUESTION, stream=True, **GREEDY)
        if chunk.choices
    ]
    assert "".join(chunks) == whole
    assert len(chunks) > 2


def test_log_probabilities_reach_the_client(client, four_streams):
    answer = client.completions.create(model=NAME, prompt=four_streams.adapted["prompts"][3], logprobs=1, **GREEDY)
    assert answer.choices[0].logprobs.token_logprobs == pytest.approx(four_streams.adapted["logprobs"][3], abs=1e-3)


def test_the_model_is_listed_by_its_name(client):
    assert [model.id for model in client.models.list().data] == [NAME]

"""Throughput and latency of vLLM next to `parscale serve --continuous-batching`: one model, P = 1, 2, 4, 8, the same prompts.

    make test-vllm                                            # makes .venv-vllm, or give another --vllm_python
    python benchmarks/serving.py --json serving.json

Every export is served by both engines in turn, in a process of its own, on all cores. Clients ask through the
OpenAI-compatible API, each for one completion after the other; before that, one answer that is not measured. P = 1 is
the plain backbone.
"""

import argparse
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import openai
from backbone import build_backbone
from peft import get_peft_model
from rich.console import Console
from rich.table import Table
from timing import describe_machine
from transformers import AutoModelForCausalLM

from parscale_adapt import ParScaleConfig
from parscale_adapt.checkpoints.exporting import export_adapter
from parscale_adapt.data import load_stdlib_corpus, train_tokenizer


ENGINES = ("vllm", "transformers")
_SECONDS_TO_START = 600
_FIRST_CHARACTERS = 400


def build_model(args: argparse.Namespace, folder: Path) -> Path:
    """The folder of the backbone: `--model`, or a random one with a tokenizer of its own."""
    if args.model is not None:
        return args.model
    texts = [text[:2000] for text in load_stdlib_corpus()["train"]["text"][:200]]
    tokenizer = train_tokenizer(texts, args.vocab_size)
    backbone = build_backbone(args)
    for settings in (backbone.config, backbone.generation_config):
        settings.bos_token_id = settings.eos_token_id = settings.pad_token_id = None  # answers have one length
    backbone.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def export_streams(backbone: Path, num_streams: int, folder: Path) -> Path:
    """An export of random streams; how fast they are served doesn't depend on what they learned."""
    model = AutoModelForCausalLM.from_pretrained(backbone)
    get_peft_model(model, ParScaleConfig(num_streams=num_streams)).save_pretrained(folder / "adapter")
    export_adapter(str(folder / "adapter"), folder / "export", str(backbone))
    return folder / "export"


def command_of(engine: str, num_streams: int, export: Path, port: int, args: argparse.Namespace) -> list[str]:
    """What starts the server."""
    address = ["--host", "127.0.0.1", "--port", str(port)]
    if engine == "vllm":
        command = [str(args.vllm_python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(export), *address]
        return [*command, "--dtype", args.dtype, "--max-model-len", str(args.max_model_len)]
    program = "from parscale_adapt.cli import main; main()"
    if num_streams == 1:  # needs no launcher
        program = "from transformers.cli.transformers import main; main()"
    options = ["--device", args.device, "--dtype", args.dtype, "--continuous-batching", "--cb-num-blocks", "64"]
    return [sys.executable, "-c", program, "serve", str(export), *address, *options]


@contextmanager
def server(command: list[str], port: int, log: Path) -> Iterator[openai.OpenAI]:
    """A client of a server that runs inside the block.

    Raises:
        RuntimeError: it ends before it answers, or takes too long.
    """
    variables = os.environ | {"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "2"}
    with log.open("w") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, env=variables, start_new_session=True
        )
    try:
        end = time.monotonic() + _SECONDS_TO_START
        while not is_up(port):
            if process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"The server did not start:\n{log.read_text()[-3000:]}")
            time.sleep(0.5)
        yield openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=600)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(60)


@contextmanager
def naming_the_server(engine: str, num_streams: int, log: Path) -> Iterator[None]:
    """Show what a server said that could not answer.

    Raises:
        RuntimeError: it could not.
    """
    try:
        yield
    except openai.APIError as error:
        said = log.read_text()[-3000:]
        raise RuntimeError(f"{engine} with {num_streams} streams did not answer ({error}):\n{said}") from error


def is_up(port: int) -> bool:
    """Whether a server answers there."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as response:
            return response.status == 200
    except (urllib.error.URLError, OSError):
        return False


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def measure(client: openai.OpenAI, model: str, num_clients: int, args: argparse.Namespace) -> dict[str, float]:
    """Tokens a second of all clients together, and the median seconds until an answer was whole."""
    texts = [text[:_FIRST_CHARACTERS] for text in load_stdlib_corpus()["train"]["text"][: args.requests * num_clients]]

    def ask(text: str) -> tuple[float, int]:
        started = time.perf_counter()
        answer = client.completions.create(model=model, prompt=text, max_tokens=args.new_tokens, temperature=0)
        return time.perf_counter() - started, answer.usage.completion_tokens

    started = time.perf_counter()
    with ThreadPoolExecutor(num_clients) as clients:
        answers = list(clients.map(ask, texts))
    seconds = time.perf_counter() - started
    tokens = sum(count for _, count in answers)
    return {"tokens_per_second": tokens / seconds, "latency_seconds": statistics.median(time for time, _ in answers)}


def measure_engine(engine: str, num_streams: int, export: Path, args: argparse.Namespace) -> list[dict]:
    """One row for every number of clients."""
    port = free_port()
    command = command_of(engine, num_streams, export, port, args)
    log = export.parent / f"{engine}.log"
    with naming_the_server(engine, num_streams, log), server(command, port, log) as client:
        client.completions.create(model=str(export), prompt="def ", max_tokens=args.new_tokens, temperature=0)
        return [
            {
                "engine": engine,
                "num_streams": num_streams,
                "clients": clients,
                **measure(client, str(export), clients, args),
            }
            for clients in args.clients
        ]


def print_rows(rows: list[dict], machine: str) -> None:
    table = Table("engine", "P", "clients", "tokens/s", "seconds an answer", title=machine)
    for row in rows:
        table.add_row(
            row["engine"],
            str(row["num_streams"]),
            str(row["clients"]),
            f"{row['tokens_per_second']:.1f}",
            f"{row['latency_seconds']:.2f}",
        )
    Console(width=100).print(table)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="backbone with a tokenizer (default: a random Qwen2)")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--requests", type=int, default=4, help="of every client")
    parser.add_argument("--new_tokens", type=int, default=64)
    parser.add_argument("--max_model_len", type=int, default=1024)
    parser.add_argument("--hidden_size", type=int, default=512)
    parser.add_argument("--num_layers", type=int, default=8)
    parser.add_argument("--vocab_size", type=int, default=4096)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--vllm_python", type=Path, default=Path(".venv-vllm/bin/python"))
    parser.add_argument("--json", type=Path, help="file to write the rows to")
    return parser.parse_args()


def main() -> None:
    args = parse()
    if "vllm" in args.engines and not args.vllm_python.is_file():
        raise SystemExit(f"There is no {args.vllm_python}: run `make test-vllm`, or name another with --vllm_python.")
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        backbone = build_model(args, Path(temporary, "backbone"))
        for num_streams in args.streams:
            export = export_streams(backbone, num_streams, Path(temporary, f"p{num_streams}"))
            for engine in args.engines:
                rows += measure_engine(engine, num_streams, export, args)
                if args.json is not None:
                    args.json.write_text(
                        json.dumps({"machine": describe_machine(args), "rows": rows}, indent=2) + "\n"
                    )
    print_rows(rows, describe_machine(args))


if __name__ == "__main__":
    main()

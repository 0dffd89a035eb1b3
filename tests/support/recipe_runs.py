"""Start the recipes in processes of their own, on a tiny backbone and small local files, and read what they left."""

import contextlib
import json
import os
import random
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from peft import AutoPeftModelForCausalLM, AutoPeftModelForSequenceClassification
from safetensors.torch import load_file
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from parscale_adapt.data import load_stdlib_corpus, train_tokenizer


REPOSITORY = Path(__file__).parents[2]
RECORDER = REPOSITORY / "tests" / "support" / "recipe_recorder.py"
REWARDS = REPOSITORY / "tests" / "support" / "rewards.py"
SECONDS_PER_RUN = 120
SECONDS_PER_LAUNCH = 400
PORTS_PER_LAUNCH = 64  # each of its runs has one of its own
PROBE = torch.arange(3, 27).unsqueeze(0)
_VOCABULARY = 320


@dataclass
class Run:
    """One execution of a recipe, and what to do to it on the way.

    Args:
        script: the recipe.
        arguments: its command line.
        record: folder for what it prints and trains on.
        kill_at_batch: kill it (SIGKILL) before this batch, counted from 0 over the whole execution.
        kill_in_save: kill it while the checkpoint of this step is half written.
        spoil_gradient_at: let all gradients be no number in this batch, whose loss is finite.
        fail_to_measure: let the measurement of the held-out loss fail.
        kill_after: kill it so many seconds after its start, wherever it is.
        resume_if_possible: go on from the last complete checkpoint, if there is one.
        fault: name, step and argument of one of `injected_faults.FAULTS`.
        save_shards: let checkpoints be written without gathering sharded parameters first.
        fsdp_on_cpu: let accelerate enter FSDP on the CPU.
        learning: record ids and labels of each batch, not their hash alone.
        environment: more environment variables.
    """

    script: str
    arguments: list[str]
    record: str
    kill_at_batch: int | None = None
    kill_in_save: int | None = None
    spoil_gradient_at: int | None = None
    fail_to_measure: bool = False
    kill_after: float | None = None
    resume_if_possible: bool = False
    fault: tuple[str, int, str] | None = None
    save_shards: bool = False
    fsdp_on_cpu: bool = False
    learning: bool = False
    environment: dict[str, str] = field(default_factory=dict)


@torch.no_grad()
def probe_logits(model: torch.nn.Module) -> torch.Tensor:
    """What a model says to [`PROBE`]."""
    return model.eval()(input_ids=PROBE, use_cache=False).logits


def reloaded_logits(folder: Path) -> torch.Tensor:
    """What a saved adapter, put on its backbone by PEFT, says to [`PROBE`]."""
    if json.loads((folder / "adapter_config.json").read_text())["task_type"] == "SEQ_CLS":
        return probe_logits(AutoPeftModelForSequenceClassification.from_pretrained(folder, num_labels=1))
    return probe_logits(AutoPeftModelForCausalLM.from_pretrained(folder))


def check_saved(result: "Result") -> None:
    """The folder holds what was trained."""
    torch.testing.assert_close(reloaded_logits(result.output_dir), result.logits(), rtol=0, atol=1e-6)


@dataclass
class Result:
    """What a run left behind."""

    exit_code: int
    output_dir: Path
    record: Path

    def stdout(self, rank: int = 0) -> str:
        return (self.record / f"stdout.{rank}").read_text()

    def stderr(self, rank: int = 0) -> str:
        return (self.record / f"stderr.{rank}").read_text()

    def errors(self, rank: int = 0) -> list[str]:
        """The lines of stderr that are our own error sentences."""
        return [line for line in self.stderr(rank).splitlines() if line.startswith("error: ")]

    def batches(self, rank: int = 0) -> list[dict[str, Any]]:
        path = self.record / f"batches.{rank}.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []

    @property
    def metrics(self) -> dict[str, Any]:
        return json.loads((self.output_dir / "metrics.json").read_text())

    @property
    def losses(self) -> list[float]:
        """The logged training loss of each step."""
        return [entry["loss"] for entry in self.metrics["log_history"] if "loss" in entry]

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """The saved adapter, and the backbone where it was trained."""
        return load_file(self.output_dir / "adapter_model.safetensors")

    def logits(self, rank: int = 0) -> torch.Tensor:
        """What the live model said to [`PROBE`] at the end."""
        return torch.load(self.record / f"logits.{rank}.pt")

    @property
    def adapter_config(self) -> dict[str, Any]:
        return json.loads((self.output_dir / "adapter_config.json").read_text())

    def check(self) -> "Result":
        """Itself, if the run went well."""
        assert self.exit_code == 0, f"exit code {self.exit_code}:\n{self.stderr()[-4000:]}"
        return self


def refusal(result: Result, loads_weights: bool = False) -> str:
    """The one sentence with which a run was refused."""
    assert result.exit_code == 1, result.stderr()[-2000:]
    assert len(result.errors()) == 1
    assert "Traceback" not in result.stderr()
    assert result.stderr().splitlines()[-1] == result.errors()[0]
    assert result.batches() == []
    assert ("Loading weights" in result.stderr()) == loads_weights
    return result.errors()[0]


def command_line(options: dict[str, Any]) -> list[str]:
    """`{"num_streams": 2}` to `["--num_streams", "2"]`; a list is several words, None leaves an option out."""
    line = []
    for name, value in options.items():
        if value is not None:
            words = value if isinstance(value, list) else [value]
            line += [f"--{name}", *(str(word).lower() if isinstance(word, bool) else str(word) for word in words)]
    return line


class Material:
    """A tiny backbone and small files of text, made in a folder."""

    def __init__(self, folder: Path):
        self.folder = folder
        texts = [text[:900] for text in load_stdlib_corpus()["train"]["text"][:108]]
        self.text = self._write("a", [{"text": text} for text in texts[:60]])
        self.other_text = self._write("b", [{"text": text} for text in texts[60:100]])
        self.heldout = self._write("heldout", [{"text": text} for text in texts[100:]])
        words = [text.split() for text in texts[:24]]
        pairs = [(f"Continue: {' '.join(parts[:4])}", " ".join(parts[4:9])) for parts in words]
        self.questions = self._write("questions", [{"prompt": one, "completion": two} for one, two in pairs])
        self.conversations = self._write("conversations", [{"messages": _conversation(*pair)} for pair in pairs])
        self.prompts = self._write("prompts", [{"prompt": one, "answer": two} for one, two in pairs[:16]])
        self.heldout_prompts = self._write(
            "heldout_prompts", [{"prompt": one, "answer": two} for one, two in pairs[16:]]
        )
        self.heldout_questions = self._write(
            "heldout_questions", [{"prompt": one, "completion": two} for one, two in pairs[16:]]
        )
        rows = [{"prompt": one, "chosen": two, "rejected": " ".join(two.split()[::-1])} for one, two in pairs]
        rows = [row for row in rows if row["chosen"] != row["rejected"]]
        self.pairs, self.heldout_pairs = self._write("pairs", rows[:16]), self._write("heldout_pairs", rows[16:])
        self.backbone = self._make_backbone(texts)

    def _write(self, name: str, rows: list[dict]) -> str:
        path = self.folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    def _make_backbone(self, texts: list[str]) -> str:
        tokenizer = train_tokenizer(texts, _VOCABULARY)
        torch.manual_seed(0)
        config = Qwen2Config(
            vocab_size=_VOCABULARY,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            initializer_range=0.1,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        path = self.folder / "backbone"
        Qwen2ForCausalLM(config).save_pretrained(path)
        tokenizer.save_pretrained(path)
        return str(path)

    def tokenizer(self):
        return AutoTokenizer.from_pretrained(self.backbone)

    def cpt_options(self, **changes: Any) -> dict[str, Any]:
        """A short run of `cpt.py` in float32; the global batch is 4 rows of 64 tokens."""
        data = {"dataset_name": self.text, "heldout_dataset": self.heldout, "max_heldout_rows": 8}
        return self.options(**{**data, **changes})

    def sft_options(self, **changes: Any) -> dict[str, Any]:
        """A short run of `sft.py` in float32."""
        changes = {"dataset_name": self.questions, "max_length": 256, **changes}
        return self.options(**changes)

    def pair_options(self, **changes: Any) -> dict[str, Any]:
        """A short run of `dpo.py` or `reward.py` in float32; the global batch is 4 pairs."""
        data = {"dataset_name": self.pairs, "heldout_dataset": self.heldout_pairs, "max_length": 256}
        return self.options(**{**data, **changes})

    def prompt_options(self, **changes: Any) -> dict[str, Any]:
        """A short run of `grpo.py` in float32; 4 answers to each of 2 questions are sampled at a time."""
        data = {
            "dataset_name": self.prompts,
            "heldout_dataset": self.heldout_prompts,
            "reward_functions": f"{REWARDS}:share_of_lower_case",
            "prompt_format": "text",
            "max_length": None,
            "max_completion_length": 8,
            "num_generations": 4,
            "per_device_train_batch_size": 8,
            "learning_rate": 1e-2,
        }
        return self.options(**{**data, **changes})

    def distillation_options(self, teacher: Path, **changes: Any) -> dict[str, Any]:
        """A short run of `distill.py` in float32, on the data's answers or short ones of its own; the global batch is 4 rows."""
        data = {
            "dataset_name": self.questions,
            "heldout_dataset": self.heldout_questions,
            "teacher_model_name_or_path": teacher,
            "train_on_data": True,
            "max_length": 256,
            "beta": 0.0,
            "learning_rate": 1e-2,
        }
        own = {} if changes.get("train_on_data", True) else {"max_completion_length": 8}
        return self.options(**{**data, **own, **changes})

    def options(self, **changes: Any) -> dict[str, Any]:
        """What all recipes are given."""
        return {
            "model_name_or_path": self.backbone,
            "num_streams": 2,
            "num_prefix_tokens": 4,
            "max_length": 64,
            "max_steps": 4,
            "per_device_train_batch_size": 4,
            "per_device_eval_batch_size": 4,
            "learning_rate": 1e-3,
            "logging_steps": 1,
            "save_strategy": "no",
            "bf16": False,
            "gradient_checkpointing": False,
            "use_cpu": True,
            "report_to": "none",
            "disable_tqdm": True,
            **changes,
        }


def _conversation(question: str, answer: str) -> list[dict[str, str]]:
    """A first exchange, which is not trained, and the one that is."""
    texts = ["Be brief.", "Hello", "Hello.", question, answer]
    roles = ["system", "user", "assistant", "user", "assistant"]
    return [{"role": role, "content": text} for role, text in zip(roles, texts)]


class RecipeServer:
    """Runs recipes one at a time in forks of one process that has the libraries loaded."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._count = 0
        self._log = (folder / "server.log").open("w")
        self._process = subprocess.Popen(
            [sys.executable, str(RECORDER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=environment(),
            start_new_session=True,
        )

    def run(self, recipe: str, output_dir: Path | None = None, **options: Any) -> Result:
        """Run `recipes/<recipe>.py`; options that are fields of [`Run`] say what to do to it."""
        self._count += 1
        run, output_dir = describe_run(recipe, self.folder / f"run-{self._count}", output_dir, options)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(asdict(run)) + "\n")
        self._process.stdin.flush()
        if not select.select([self._process.stdout], [], [], SECONDS_PER_RUN)[0]:
            self.close()
            raise TimeoutError(f"{run.script} {' '.join(run.arguments)} ran longer than {SECONDS_PER_RUN} s")
        return Result(int(self._process.stdout.readline()), output_dir, Path(run.record))

    def close(self) -> None:
        end_group(self._process)
        self._log.close()


def describe_run(recipe: str, folder: Path, output_dir: Path | None, options: dict[str, Any]) -> tuple[Run, Path]:
    """A run from its options, with its output folder."""
    output_dir = output_dir or folder / "output"
    extras = {name: options.pop(name) for name in list(options) if name in Run.__dataclass_fields__}
    arguments = command_line({"output_dir": output_dir, **options})
    script = str(REPOSITORY / "recipes" / f"{recipe}.py")
    return Run(script, arguments, str(folder / "record"), **extras), output_dir


def launch_all(
    config: str, folder: Path, runs: dict[str, tuple[Run, Path]], seconds: int = SECONDS_PER_LAUNCH
) -> dict[str, list[Result]]:
    """`accelerate launch` all runs with one of `accelerate_configs/`, on two processes on the CPU; results by rank."""
    assert len(runs) < PORTS_PER_LAUNCH
    folder.mkdir(parents=True, exist_ok=True)
    todo = folder / "runs.json"
    todo.write_text(json.dumps([asdict(run) for run, _ in runs.values()]))
    try:
        output = launch(config, folder, str(RECORDER), [str(todo)], seconds)
    except TimeoutError as error:
        ended = [name for name, (run, _) in runs.items() if len(list(Path(run.record).glob("exit.*"))) == 2]
        raise TimeoutError(f"Runs that ended: {', '.join(ended)}. {error}") from error
    results = {}
    for name, (run, output_dir) in runs.items():
        codes = [Path(run.record, f"exit.{rank}") for rank in range(2)]
        assert all(code.is_file() for code in codes), f"run {name!r} did not end:\n{output[-4000:]}"
        results[name] = [Result(int(code.read_text()), output_dir, Path(run.record)) for code in codes]
    return results


def launch(config: str, folder: Path, script: str, arguments: Sequence[str], seconds: int = SECONDS_PER_LAUNCH) -> str:
    """`accelerate launch` a script on two processes on the CPU; returns what it printed."""
    folder.mkdir(parents=True, exist_ok=True)
    config_file = folder / f"{config}.yaml"
    config_file.write_text(yaml.safe_dump(on_two_cpu_processes(config)))
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config_file)]
    log = folder / "launch.log"
    with log.open("w") as file:
        process = subprocess.Popen(
            [*launcher, "--main_process_port", str(free_port()), script, *arguments],
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment(),
            start_new_session=True,
        )
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired as error:
            raise TimeoutError(f"accelerate launch ran longer than {seconds} s:\n{log.read_text()[-4000:]}") from error
        finally:
            end_group(process)
    output = log.read_text()
    assert process.returncode == 0, f"accelerate launch ended with {process.returncode}:\n{output[-4000:]}"
    return output


def on_two_cpu_processes(config: str) -> dict[str, Any]:
    """One of `accelerate_configs/`, changed only in where and on how many processes it runs."""
    settings = yaml.safe_load((REPOSITORY / "accelerate_configs" / f"{config}.yaml").read_text())
    return settings | {"use_cpu": True, "num_processes": 2}


def environment() -> dict[str, str]:
    paths = [str(REPOSITORY), str(REPOSITORY / "tests"), os.environ.get("PYTHONPATH", "")]
    search_path = os.pathsep.join(path for path in paths if path)
    # The folder of a script is no place to look for modules: helpers may be named like the packages that they help with.
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": search_path, "PYTHONSAFEPATH": "1"}


def free_port() -> int:
    """A port with `PORTS_PER_LAUNCH` - 1 more behind it that nobody listens on.

    They lie below those that a kernel gives to outgoing connections, so that none of them is taken before it is used:
    a rank that can't open its port ends, and the other would wait for it.
    """
    while True:
        first = random.SystemRandom().randrange(10_000, 32_000)  # not the tests' own, equal in all of their processes
        try:
            with contextlib.ExitStack() as probes:
                for port in range(first, first + PORTS_PER_LAUNCH):
                    probes.enter_context(socket.socket()).bind(("127.0.0.1", port))
        except OSError:
            continue
        return first


def end_group(process: subprocess.Popen) -> None:
    """End a process that leads its own group, with all that it started."""
    for signal_number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, signal_number)
        except ProcessLookupError:
            break
        time.sleep(0.2)
    process.wait()

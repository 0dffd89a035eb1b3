"""HumanEval(+) and MBPP(+): programs that a model writes, in EvalPlus's format, and EvalPlus's run of them where asked for.

Prompts, stop sequences and sampling are those of EvalPlus 0.3.1 (`evalplus.codegen`). Generated programs are run by EvalPlus
alone, in its own environment and never in this process.
"""

import gzip
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data import fingerprint_of_files
from ..files import write_text
from .bootstrap import Metric, resampled, statistic_of
from .measures import Scores
from .settings import EvaluationSettings, named_entries
from .stopping import StopInEachRow


DATASETS = ("humaneval", "mbpp")
TEMPERATURE, TOP_P = 0.8, 0.95
_K = (1, 10)
_EVERYWHERE = ["<|endoftext|>", "<|endofmask|>", "</s>", "\nif __name__", "\ndef main(", "\nprint("]
_BEHIND_A_PROGRAM = {
    "humaneval": ["\ndef ", "\nclass ", "\nimport ", "\nfrom ", "\nassert "],
    "mbpp": ['\n"""', "\nassert"],
}
_BEHIND_A_BLOCK = ["\n```\n"]
_INSTRUCTION = (
    "Please provide a self-contained Python script that solves the following problem in a markdown code block:"
)
_RESPONSE = (
    "Below is a Python script with a self-contained function that solves the problem and passes corresponding tests:"
)
_SPLIT = "-[[]]-the-program-[[]]-"
_NEEDED = ("task_id", "prompt", "entry_point")


@dataclass(frozen=True)
class Programs:
    """Problems, to which a model writes programs.

    Args:
        name: in tables.
        dataset: "humaneval" or "mbpp".
        problems: rows of EvalPlus's file.
        fingerprint: of that file.
        num_samples: programs for each problem; one is greedy, more are sampled at temperature 0.8.
        settings: of the evaluation.
    """

    name: str
    dataset: str
    problems: list[dict[str, Any]]
    fingerprint: str
    num_samples: int
    settings: EvaluationSettings
    kind: str = "code"

    @property
    def generates(self) -> bool:
        """Whether beams make a difference: sampling has none."""
        return self.num_samples == 1

    def content(self) -> dict[str, Any]:
        """Problems, and how programs are written; sampling also depends on the rows that run together."""
        sampling = {"seed": self.settings.seed, "batch_size": self.settings.batch_size} if self.num_samples > 1 else {}
        return {
            "dataset": self.dataset,
            "problems": self.fingerprint,
            "limit": self.settings.limit,
            "num_samples": self.num_samples,
            "max_code_tokens": self.settings.max_code_tokens,
            "apply_chat_template": self.settings.apply_chat_template,
            **sampling,
        }

    def score(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, num_beams: int) -> Scores:
        """Programs, one item for each problem; they have no score until they are run."""
        is_chat = self.settings.apply_chat_template
        stops = [*_EVERYWHERE, *(_BEHIND_A_BLOCK if is_chat else _BEHIND_A_PROGRAM[self.dataset])]
        items = []
        for problem in self.problems:
            prompt = problem["prompt"].strip() + "\n"
            asked = _chat_prompt(prompt, tokenizer) if is_chat else prompt
            torch.manual_seed(self.settings.seed)
            written: list[str] = []
            while len(written) < self.num_samples:
                number = min(self.settings.batch_size, self.num_samples - len(written))
                written += self._write(model, tokenizer, asked, stops, (number, num_beams))
            solutions = written if is_chat else [prompt + text for text in written]
            items.append({"task_id": problem["task_id"], "solutions": solutions})
        return Scores({}, items)

    @torch.no_grad()
    def _write(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        prompt: str,
        stops: Sequence[str],
        numbers: tuple[int, int],
    ) -> list[str]:
        inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
        num_prompt_tokens = inputs["input_ids"].shape[1]
        sampling = {"temperature": TEMPERATURE, "top_p": TOP_P, "top_k": 0}
        greedy = {"temperature": None, "top_p": None, "top_k": None, "num_beams": numbers[1]}
        output = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=self.settings.max_code_tokens,
            do_sample=self.num_samples > 1,
            num_return_sequences=numbers[0],
            pad_token_id=tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
            stopping_criteria=[StopInEachRow(tokenizer, stops, num_prompt_tokens)],
            **(sampling if self.num_samples > 1 else greedy),
        )
        texts = tokenizer.batch_decode(output[:, num_prompt_tokens:], skip_special_tokens=True)
        return [cut_at(text, stops).replace("\t", "    ") for text in texts]

    def write_samples(self, written: Scores, folder: Path, model: str) -> Path:
        """Write the programs as a file that EvalPlus reads: one JSON line for each."""
        path = folder / "programs" / f"{self.name} {model}.jsonl".replace("/", "_").replace(" ", "_")
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, "".join(json.dumps(line) + "\n" for line in sample_lines(written)))
        return path


def sample_lines(written: Scores) -> Iterator[dict[str, str]]:
    """The programs in EvalPlus's format."""
    for item in written.items:
        for solution in item["solutions"]:
            yield {"task_id": item["task_id"], "solution": solution}


def cut_at(text: str, stops: Sequence[str]) -> str:
    """The text up to the first of some sequences."""
    return text[: min((text.index(stop) for stop in stops if stop in text), default=len(text))]


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Chance that one of k of the samples is right, unbiased (Chen et al., arXiv 2107.03374, equation 1)."""
    return 1.0 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)


def pass_metrics(name: str, passed: dict[str, list[tuple[int, int]]]) -> dict[str, Metric]:
    """pass@k of each kind of tests, from (samples, right ones) of each problem, which are resampled."""
    metrics = {}
    for tests, counts in passed.items():
        for k in _K:
            if all(number >= k for number, _ in counts):
                items = [pass_at_k(number, right, k) for number, right in counts]
                value, statistic = (
                    sum(items) / len(items),
                    statistic_of(items, lambda some: sum(some) / len(some), True),
                )
                metrics[f"pass@{k} ({tests})"] = resampled(value, True, len(items), statistic, name)
    return metrics


def programs(settings: EvaluationSettings, tokenizer: PreTrainedTokenizerBase) -> list[Programs]:
    """The problems of the settings, greedy, and sampled where a number of samples is given.

    Raises:
        ValueError: a file is missing or holds other rows, or what is to be run lacks tests.
    """
    found = []
    for entry in named_entries(settings.code, "code", ("num_samples",)):
        if entry["name"] not in DATASETS:
            raise ValueError(f"An entry of `code` must be called humaneval or mbpp, got {entry['name']!r}.")
        path = Path(entry["path"]).expanduser()
        problems = _read_problems(path)[: settings.limit]
        if settings.execute_code is not None and not all("base_input" in problem for problem in problems):
            raise ValueError(
                f"{path} lacks the tests that EvalPlus runs (`base_input`): give EvalPlus's own file, such as "
                "HumanEvalPlus.jsonl.gz, or leave `execute_code` out."
            )
        number = entry.get("num_samples")
        if number is not None and (isinstance(number, bool) or not isinstance(number, int) or number < 2):
            raise ValueError(f"`num_samples` of {entry['name']} must be at least 2, got {number!r}: 10 give pass@10.")
        fingerprint = fingerprint_of_files([path])
        found.append(Programs(entry["name"], entry["name"], problems, fingerprint, 1, settings))
        if number is not None:
            name = f"{entry['name']} sampled"
            found.append(Programs(name, entry["name"], problems, fingerprint, number, settings))
    return found


def _read_problems(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        raise ValueError(f"`code` names {path}, where no file is: give EvalPlus's problems (.jsonl or .jsonl.gz).")
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        problems = [json.loads(line) for line in data.decode("utf-8").splitlines() if line.strip()]
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(f"{path} holds no JSON lines: {error}.") from error
    if not problems:
        raise ValueError(f"{path} holds no problems: give EvalPlus's file.")
    for number, problem in enumerate(problems, start=1):
        missing = [name for name in _NEEDED if name not in problem] if isinstance(problem, dict) else [*_NEEDED]
        if missing:
            raise ValueError(f"{path}, row {number}, lacks `{missing[0]}`: give EvalPlus's problems.")
    return problems


def _chat_prompt(prompt: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """EvalPlus's request, and the beginning of the answer up to where the program starts."""
    messages = [
        {"role": "user", "content": f"{_INSTRUCTION}\n```\n{prompt.strip()}\n```\n"},
        {"role": "assistant", "content": f"{_RESPONSE}\n```python\n{_SPLIT}\n```\n"},
    ]
    return tokenizer.apply_chat_template(messages, tokenize=False).split(_SPLIT)[0]

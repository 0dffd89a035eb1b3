"""Tiny models, local lm-eval tasks and texts for evaluations, in one folder; nothing needs a network."""

import json
from pathlib import Path

import torch
import yaml

from support.chat_material import ChatMaterial


QUESTIONS = [
    ("def hello(x):\n    return x", [" + 1", " y", "\n"], 0),
    ("for line in text", [" pass", "\n    print(line)", " x"], 1),
    ("a", ["b", "bb", "c"], 2),
    ("the quick brown fox", [" jumps", " sleeps", "."], 0),
    ("x = 1", ["\ny = 2", " + 1", "0"], 1),
    ("import os, sys", ["\n", ", re", " as s"], 0),
    ("while True", [":", ";", "?"], 0),
    ("return", [" None", " x", "\n"], 2),
]
SUMS = [("1 + 1 =", "2"), ("2 + 3 =", "5"), ("4 + 4 =", "8"), ("7 - 6 =", "1"), ("3 * 3 =", "9"), ("9 - 9 =", "0")]


def _averaged(metric: str) -> dict:
    return {"metric": metric, "aggregation": "mean", "higher_is_better": True}


TASKS = ("local_choice", "local_sums")


class ScoredMaterial(ChatMaterial):
    """As its base; and in `tasks` two tasks of lm-eval, `local_choice` and `local_sums`, and a group `local_all` of both."""

    def __init__(self, root: Path):
        super().__init__(root)
        self.tasks = root / "tasks"
        self.tasks.mkdir()
        choices = [{"text": text, "choices": found, "label": label} for text, found, label in QUESTIONS]
        self._write_task(
            "local_choice",
            choices,
            output_type="multiple_choice",
            doc_to_text="{{text}}",
            doc_to_choice="choices",
            doc_to_target="label",
            target_delimiter="",
            metric_list=[_averaged("acc"), _averaged("acc_norm")],
        )
        self._write_task(
            "local_sums",
            [{"question": one, "answer": two} for one, two in SUMS],
            output_type="generate_until",
            doc_to_text="Q: {{question}}\nA:",
            doc_to_target="{{answer}}",
            num_fewshot=1,
            fewshot_split="test",
            generation_kwargs={"until": ["\n", "Q:"], "max_gen_toks": 6, "do_sample": False},
            metric_list=[
                _averaged("exact_match"),
                _averaged("letters"),  # a tiny model is never right; the letters of its answers tell models apart
            ],
            process_results="!function counting.process",
        )
        (self.tasks / "counting.py").write_text(
            "def process(doc, results):\n"
            "    answer = results[0].strip()\n"
            "    score = sum(map(ord, answer)) / 100\n"
            "    return {'exact_match': float(answer == doc['answer']), 'letters': score}\n"
        )
        group = {"group": "local_all", "task": [*TASKS[:1], "local_more"]}
        metrics = [{"metric": "acc", "weight_by_size": True}]
        self._write_task(
            "local_more",
            choices[:3],
            output_type="multiple_choice",
            doc_to_text="{{text}}",
            doc_to_choice="choices",
            doc_to_target="label",
            target_delimiter="",
            metric_list=[_averaged("acc")],
        )
        (self.tasks / "local_all.yaml").write_text(yaml.safe_dump(group | {"aggregate_metric_list": metrics}))
        self.text = self._write_rows("text", [{"text": text * 3} for text, _, _ in QUESTIONS])
        self.other = self._write_rows("other", [{"text": f"{one} {two}. " * 4} for one, two in SUMS])

    def _write_rows(self, name: str, rows: list[dict]) -> Path:
        path = self.root / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    def _write_task(self, name: str, rows: list[dict], **fields) -> None:
        data = self._write_rows(name, rows)
        common = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(data)}},
            "test_split": "test",
            "num_fewshot": 0,
        }
        text = yaml.safe_dump(common | fields).replace("'!function counting.process'", "!function counting.process")
        (self.tasks / f"{name}.yaml").write_text(text)

    def settings(self, output_dir: Path, **changes) -> dict:
        """Fields of `EvaluationSettings`: backbone, two adapters, and both tasks."""
        return {
            "backbone": str(self.root / "backbone"),
            "adapters": [f"P2={self.root / 'two'}", f"P4={self.root / 'four'}"],
            "tasks": [*TASKS],
            "task_folders": [str(self.tasks)],
            "output_dir": str(output_dir),
            "dtype": "float32",
            **changes,
        }

    def write_config(self, output_dir: Path, **changes) -> Path:
        """The same as a YAML file."""
        path = output_dir.parent / f"{output_dir.name}.yaml"
        path.write_text(yaml.safe_dump(self.settings(output_dir, **changes)))
        return path

    def foreign_backbone(self) -> Path:
        """A folder with a backbone of the same shape and other weights."""
        folder = self.root / "foreign"
        if not folder.is_dir():
            model = self.plain()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.mul_(1.5)
            model.save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)
        return folder

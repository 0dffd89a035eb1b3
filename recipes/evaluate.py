"""Score a backbone and adapters on the same tasks and texts, with intervals and paired differences.

    accelerate launch recipes/evaluate.py                                # the embedded backbone on embedded text, no network needed
    accelerate launch recipes/evaluate.py --adapters runs/cpt-demo       # before and after
    accelerate launch recipes/evaluate.py --config recipes/configs/evaluate/paper.yaml --backbone Qwen/Qwen2.5-3B --adapters p4=runs/p4

`parscale evaluate FILE.yaml` does the same. Every field of `EvaluationSettings` is an argument and a YAML key; `--help`
lists them. What is finished is not scored again (docs/evaluation.md).
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from parscale_adapt.data import load_stdlib_corpus, stdlib_docstring_pairs
from parscale_adapt.evaluation import EvaluationSettings, evaluate, show_report
from parscale_adapt.training import BackboneArguments, RecipeParser, backbone_path, run_recipe


DEMO = Path(__file__).parent / "configs" / "evaluate" / "demo.yaml"


def write_texts(path: Path, texts: Sequence[str]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return f"{path.stem}={path}"


def with_embedded_texts(settings: EvaluationSettings) -> EvaluationSettings:
    """Held-out source of the standard library, and its docstrings, which are text of another kind."""
    folder = Path(settings.output_dir) / "texts"
    source = write_texts(folder / "source.jsonl", load_stdlib_corpus()["heldout"]["text"])
    docstrings = write_texts(folder / "docstrings.jsonl", stdlib_docstring_pairs()["heldout"]["completion"])
    return replace(settings, texts=[source], forgetting=[docstrings])


def main(settings: EvaluationSettings) -> None:
    if settings.backbone is None:
        settings = replace(settings, backbone=backbone_path(BackboneArguments()))
    if not any((settings.tasks, settings.texts, settings.forgetting, settings.code)):
        settings = with_embedded_texts(settings)
    show_report(evaluate(settings))


if __name__ == "__main__":
    arguments = sys.argv[1:]
    if not any(word.startswith("--config") for word in arguments):
        arguments = ["--config", str(DEMO), *arguments]
    run_recipe(main, RecipeParser((EvaluationSettings,)), arguments)

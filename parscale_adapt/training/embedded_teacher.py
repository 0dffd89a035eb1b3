"""The embedded teacher: four streams on the embedded backbone, trained once on the standard library's docstrings.

As the backbone, it is kept under the hash of everything that decides its weights, and trained in a process of its own.
"""

import hashlib
import json
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from accelerate import PartialState
from transformers import AutoTokenizer

from ..tuner.config import ParScaleArguments
from .arguments import BackboneArguments
from .embedded import embedded_backbone, run_alone
from .instructions import InstructionArguments, load_instructions, prepare_instruction_training
from .loading import model_in_streams
from .saving import replacing_folder, save_final_model
from .stream_config import StreamConfig
from .trainer import StreamTrainer


@dataclass(frozen=True)
class EmbeddedTeacher:
    """Size and schedule of the embedded teacher."""

    num_streams: int = 4
    num_prefix_tokens: int = 16
    init_weights: str = "tokens"
    max_length: int = 128
    batch_size: int = 8
    num_steps: int = 400
    learning_rate: float = 1e-2
    seed: int = 0

    def content_hash(self, backbone: str) -> str:
        """Changes with any setting and with the backbone, whose name has its corpus."""
        settings = json.dumps(asdict(self), sort_keys=True)
        return hashlib.sha256(f"{settings}{backbone}".encode()).hexdigest()[:12]


def embedded_teacher(parent: str | Path, settings: EmbeddedTeacher | None = None) -> Path:
    """The folder of the embedded teacher below `parent`; trains it if it is not there yet.

    Every rank may call it; one trains, the others wait.
    """
    settings = settings or EmbeddedTeacher()
    backbone = embedded_backbone(parent)
    folder = Path(parent) / f"teacher-{settings.content_hash(backbone.name)}"
    with PartialState().main_process_first():
        if not (folder / "adapter_model.safetensors").is_file():
            print(f"No teacher given: training {settings.num_streams} streams into {folder} (once).", flush=True)
            run_alone(__name__, str(folder), str(backbone), json.dumps(asdict(settings)))
    return folder


def train_teacher(folder: Path, path: str, settings: EmbeddedTeacher) -> None:
    """Train the teacher on the backbone in `path` and write it to `folder`."""
    streams = ParScaleArguments(
        num_streams=settings.num_streams,
        num_prefix_tokens=settings.num_prefix_tokens,
        init_weights=settings.init_weights,
    )
    backbone, data = BackboneArguments(model_name_or_path=path), InstructionArguments()
    with tempfile.TemporaryDirectory() as scratch:
        training = _training(scratch, settings)
        prepare_instruction_training(training, backbone)
        tokenizer = AutoTokenizer.from_pretrained(path)
        rows, _, _ = load_instructions(data, tokenizer, training)
        model = model_in_streams(path, backbone, streams, settings.seed)
        training.model_init_kwargs = None  # the model comes as an object
        trainer = StreamTrainer(model=model, args=training, train_dataset=rows, processing_class=tokenizer)
        trainer.train()
    with replacing_folder(folder) as staging:
        save_final_model(model, tokenizer, staging, trainer.adapter_name)


def _training(scratch: str, settings: EmbeddedTeacher) -> StreamConfig:
    return StreamConfig(
        output_dir=scratch,
        max_steps=settings.num_steps,
        max_length=settings.max_length,
        per_device_train_batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=settings.num_steps // 10,
        logging_steps=max(1, settings.num_steps // 10),
        save_strategy="no",
        report_to="none",
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=not torch.cuda.is_available(),
        seed=settings.seed,
    )


if __name__ == "__main__":
    train_teacher(Path(sys.argv[1]), sys.argv[2], EmbeddedTeacher(**json.loads(sys.argv[3])))

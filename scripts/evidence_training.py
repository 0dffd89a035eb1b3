"""Train one experiment on the evidence corpus and measure it; killed, it goes on bit for bit where its state was kept."""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from evidence_corpus import DOCUMENT_TOKENS, NO_TOKEN, Corpus
from evidence_methods import BACKBONE, PREFIX_TUNING, Experiment, build, optimizer_groups
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel

from parscale_adapt import final_stream_states, stream_decorrelation
from parscale_adapt.analysis.diagnostics import diagnose
from parscale_adapt.files import write_atomically


BATCH_SIZE = 2
TOKENS_PER_STEP = BATCH_SIZE * DOCUMENT_TOKENS
WARMUP_SHARE = 0.1
MAX_GRADIENT_NORM = 1.0
NUM_CURVE_POINTS = 4  # the last is the final loss
CURVE_DOCUMENTS = 16  # of the held-out ones
# Above as many rows of hidden states, layers are checkpointed: their activations would not fit a few processes.
CHECKPOINTED_ROWS = 4 * TOKENS_PER_STEP
SECONDS_BETWEEN_STATES = 300
DIAGNOSED_DOCUMENTS = 8
EVALUATED_DOCUMENTS = 4  # at a time


class DivergedError(Exception):
    """The loss is not finite, or above what it was before the first step."""


@dataclass
class Progress:
    """What a run knows of itself besides its tensors."""

    step: int = 0
    seconds: float = 0.0
    curve: list[tuple[int, float]] = field(default_factory=list)  # tokens, held-out loss


def token_losses(model: nn.Module, rows: torch.Tensor) -> torch.Tensor:
    """Cross-entropy in nats of every next token of `[batch, tokens]` ids that end in -1; 0 where there is none.

    Products in bfloat16, weights in float32, when training and when measuring. Returns `[batch, tokens - 1]`.
    """
    rows = rows.long()
    # Padding stands behind the text, where causal attention does not look.
    with torch.autocast(rows.device.type, torch.bfloat16):
        logits = model(input_ids=rows.clamp(min=0)).logits[:, :-1]
    targets = rows[:, 1:]
    losses = nn.functional.cross_entropy(
        logits.flatten(0, 1).float(), targets.flatten(), ignore_index=NO_TOKEN, reduction="none"
    )
    return losses.view_as(targets)


@torch.no_grad()
def document_losses(model: nn.Module, documents: torch.Tensor, device: torch.device) -> list[float]:
    """Mean loss of each document, in nats per token."""
    model.eval()
    losses: list[float] = []
    for rows in documents.split(EVALUATED_DOCUMENTS):
        batch = rows.to(device)
        sums = token_losses(model, batch).sum(1)
        losses += (sums / (batch[:, 1:] != NO_TOKEN).sum(1)).tolist()
    return losses


def mean_loss(losses: list[float], documents: torch.Tensor) -> float:
    """Mean over all tokens of losses that are means over documents."""
    counts = (documents[:, 1:] != NO_TOKEN).sum(1).tolist()
    return sum(loss * count for loss, count in zip(losses, counts)) / sum(counts)


class Run:
    """One experiment with one seed, on a backbone of its own.

    Args:
        experiment: what to train.
        seed: of the weights that start at random. The data comes in the same order for all seeds and experiments.
        backbone: on the device; it is changed.
        corpus: the text.
        state_file: where the run is kept while it goes on; None to keep nothing.
    """

    def __init__(
        self, experiment: Experiment, seed: int, backbone: PreTrainedModel, corpus: Corpus, state_file: Path | None
    ):
        self.experiment = experiment
        self.corpus = corpus
        self.device = backbone.device
        self.state_file = state_file
        self.progress = Progress()
        self._identity = f"{experiment} {seed} {corpus.fingerprint}"
        torch.manual_seed(seed)
        self.model = build(experiment, backbone)
        if experiment.num_streams * TOKENS_PER_STEP > CHECKPOINTED_ROWS and experiment.method != PREFIX_TUNING:
            backbone.gradient_checkpointing_enable({"use_reentrant": False})
        if experiment.method == BACKBONE:
            self.model.requires_grad_(False)
        parts = (*backbone.parameters(), *self.model.parameters())
        self.num_params = sum(parameter.numel() for parameter in {id(part): part for part in parts}.values())
        self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        if self.trained:
            groups = optimizer_groups(experiment, self.model)
            self.optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
            self.peak_rates = [group["lr"] for group in self.optimizer.param_groups]

    def _factor(self, step: int) -> float:
        """Linear warm-up, then a cosine to 0."""
        steps = self.experiment.steps
        warmup = max(1, round(WARMUP_SHARE * steps))
        if step < warmup:
            return (step + 1) / warmup
        return (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup))) / 2

    def train(self) -> None:
        """From the beginning or from where the state was kept, to the last step.

        Raises:
            DivergedError: the loss is not finite.
        """
        self._load_state()
        begun, kept = time.monotonic() - self.progress.seconds, time.monotonic()
        points = {round(self.experiment.steps * (i + 1) / NUM_CURVE_POINTS) for i in range(NUM_CURVE_POINTS - 1)}
        while self.progress.step < self.experiment.steps:
            self._step(self.progress.step)
            self.progress.step += 1
            self.progress.seconds = time.monotonic() - begun
            if self.progress.step in points and not self.experiment.is_sweep:
                self._measure_point()
                begun += time.monotonic() - begun - self.progress.seconds  # measuring isn't training
            if self.state_file is not None and time.monotonic() - kept > SECONDS_BETWEEN_STATES:
                self._keep_state()
                kept = time.monotonic()

    def _step(self, step: int) -> None:
        self.model.train()
        first = step * TOKENS_PER_STEP % (len(self.corpus.train) - TOKENS_PER_STEP)
        ids = self.corpus.train[first : first + TOKENS_PER_STEP].view(BATCH_SIZE, DOCUMENT_TOKENS)
        loss = self._objective(ids.to(self.device))
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.trained, MAX_GRADIENT_NORM)
        if not torch.isfinite(norm):
            raise DivergedError(f"the gradient of step {step + 1} is not finite")
        for group, peak in zip(self.optimizer.param_groups, self.peak_rates):
            group["lr"] = peak * self._factor(step)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _objective(self, ids: torch.Tensor) -> torch.Tensor:
        weight = self.experiment.diversity_weight
        if weight == 0:
            return token_losses(self.model, ids).mean()
        with final_stream_states(self.model) as states:
            loss = token_losses(self.model, ids).mean()
            return loss + weight * stream_decorrelation(states[-1])

    def _measure_point(self) -> None:
        documents = self.corpus.heldout[:CURVE_DOCUMENTS]
        self._add_point(document_losses(self.model, documents, self.device))

    def _add_point(self, losses: list[float]) -> None:
        """Add the loss of the curve's documents, which come first in `losses`, to the curve.

        Raises:
            DivergedError: it is not finite.
        """
        documents = self.corpus.heldout[:CURVE_DOCUMENTS]
        loss = mean_loss(losses[: len(documents)], documents)
        if not math.isfinite(loss):
            raise DivergedError(f"the held-out loss after step {self.progress.step} is not finite")
        self.progress.curve.append((self.progress.step * TOKENS_PER_STEP, loss))

    def tuning_loss(self) -> float:
        """Mean loss on the documents that choose a rate.

        Raises:
            DivergedError: it is not finite.
        """
        loss = mean_loss(document_losses(self.model, self.corpus.tuning, self.device), self.corpus.tuning)
        if not math.isfinite(loss):
            raise DivergedError(f"the loss on the tuning documents after step {self.progress.step} is not finite")
        return loss

    def measure(self) -> dict[str, object]:
        """The figures of a row, by column; of a sweep only the loss that chooses a rate."""
        figures: dict[str, object] = {
            "num_params": self.num_params,
            "trained_params": sum(parameter.numel() for parameter in self.trained),
            "tuning_loss": self.tuning_loss(),
        }
        if self.experiment.is_sweep:
            return figures
        heldout = document_losses(self.model, self.corpus.heldout, self.device)
        self._add_point(heldout)
        english = {
            f"loss_{kind}": mean_loss(document_losses(self.model, rows, self.device), rows)
            for kind, rows in sorted(self.corpus.english.items())
        }
        return {
            **figures,
            "heldout_loss": mean_loss(heldout, self.corpus.heldout),
            "loss_per_document": json.dumps([round(loss, 5) for loss in heldout]),
            **english,
            **self._stream_figures(),
        }

    def _stream_figures(self) -> dict[str, object]:
        experiment = self.experiment
        if experiment.num_streams == 1 or experiment.method == PREFIX_TUNING:
            return {}
        rows = self.corpus.heldout[:DIAGNOSED_DOCUMENTS].long()
        batches = [
            {
                "input_ids": row[None].clamp(min=0).to(self.device),
                "labels": row[None].masked_fill(row[None] < 0, -100).to(self.device),
            }
            for row in rows
        ]
        with torch.autocast(self.device.type, torch.bfloat16):
            found = diagnose(self.model, batches)
        return {
            "mean_weights": json.dumps([round(weight, 4) for weight in found.mean_weight]),
            "entropy_share": found.entropy_share,
            "rho": found.rho,
        }

    def _state(self) -> dict[str, torch.Tensor]:
        """All tensors that training changes, by name."""
        tensors = {f"parameter.{i}": parameter.detach() for i, parameter in enumerate(self.trained)}
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                (index,) = (i for i, other in enumerate(self.trained) if other is parameter)
                for name, value in self.optimizer.state[parameter].items():
                    tensors[f"optimizer.{index}.{name}"] = value
        return tensors

    def _keep_state(self) -> None:
        assert self.state_file is not None
        notes = {"progress": json.dumps(vars(self.progress)), "run": self._identity}
        self.state_file.parent.mkdir(parents=True, exist_ok=True)
        tensors = {name: tensor.contiguous() for name, tensor in self._state().items()}
        write_atomically(self.state_file, lambda file: save_file(tensors, file, metadata=notes))

    def _load_state(self) -> None:
        if self.state_file is None or not self.state_file.is_file():
            return
        with safe_open(self.state_file, framework="pt", device=str(self.device)) as kept:
            if kept.metadata()["run"] != self._identity:
                return  # of another version of this script
            self.progress = Progress(**json.loads(kept.metadata()["progress"]))
            with torch.no_grad():
                for i, parameter in enumerate(self.trained):
                    parameter.copy_(kept.get_tensor(f"parameter.{i}"))
                    names = ("step", "exp_avg", "exp_avg_sq")
                    self.optimizer.state[parameter] = {
                        name: kept.get_tensor(f"optimizer.{i}.{name}").to("cpu" if name == "step" else self.device)
                        for name in names
                    }

    def curve_text(self) -> str:
        """The points of the curve, `[[tokens, held-out loss], ...]` in JSON."""
        return json.dumps([[tokens, round(loss, 5)] for tokens, loss in self.progress.curve])

    def forget_state(self) -> None:
        """Remove what was kept of a run that has ended."""
        if self.state_file is not None:
            self.state_file.unlink(missing_ok=True)

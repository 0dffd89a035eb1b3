"""Pushing a finished run: the final folder, once, when it is complete."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import get_token
from transformers import trainer as transformers_trainer

from .failures import describe
from .stream_config import RecipeConfig


# Checkpoints, logs, and files of the machine that it was trained on.
KEPT_AT_HOME = ["checkpoint-*", "runs/*", ".*"]


@contextmanager
def asking_the_hub(training: RecipeConfig) -> Iterator[None]:
    """Make one sentence of what the hub refuses.

    Raises:
        ValueError: it did not do what was asked inside.
    """
    try:
        yield
    except Exception as error:  # of the client, of its transport and of the operating system
        has_token = (training.hub_token or get_token()) is not None
        advice = "" if has_token else "; no token was found: give --hub_token, or log in with `hf auth login`"
        raise ValueError(f"the hub refused `push_to_hub`: {describe(error)}{advice}") from error


def push_final_folder(folder: Path, repository: str, training: RecipeConfig) -> None:
    """Push the final folder with its card and metrics, and no checkpoint.

    Raises:
        ValueError: the hub refused; what can be done is said.
    """
    try:
        with asking_the_hub(training):
            # the client that made the repository
            transformers_trainer.hf_api().upload_folder(
                repo_id=repository,
                folder_path=folder,
                commit_message="Trained with parscale_adapt",
                token=training.hub_token,
                revision=training.hub_revision,
                ignore_patterns=KEPT_AT_HOME,
            )
    except ValueError as error:
        raise ValueError(
            f"the trained model lies in {folder}, saved, verified and described, but {error}; push it later with: "
            f"hf upload {repository} {folder} --exclude 'checkpoint-*'"
        ) from error

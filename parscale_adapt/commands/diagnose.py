"""`parscale diagnose`: do the streams of a trained adapter differ, and what is the difference worth?"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..files import write_atomically
from .output import check_writable, hide_progress_bars, print_table, write_json


if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

    from ..analysis.diagnostics import StreamDiagnostics


def diagnose(
    adapter: Annotated[Path, typer.Argument(help="Folder of a ParScale adapter, as `save_pretrained` writes it.")],
    data: Annotated[
        str, typer.Option(help="Text that was not trained on: .txt, .jsonl, .json, .parquet or a folder.")
    ],
    backbone: Annotated[
        str | None, typer.Option(help="Backbone (default: the one that the adapter's config names).")
    ] = None,
    text_field: Annotated[str, typer.Option(help="Column of the data that holds the text.")] = "text",
    max_rows: Annotated[int, typer.Option(help="Packed rows to read at most.", min=1)] = 64,
    max_length: Annotated[int, typer.Option(help="Tokens of a row.", min=2)] = 1024,
    batch_size: Annotated[int, typer.Option(help="Rows that run together, each in every stream.", min=1)] = 4,
    irreducible_loss: Annotated[
        float, typer.Option(help="E of your scaling law, for rho; 0 makes it an upper bound.", min=0)
    ] = 0.0,
    plot: Annotated[Path | None, typer.Option(help="Write a page of pictures (PNG).")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures as JSON.")] = None,
) -> None:
    """Measure the streams of a trained adapter: weights, own losses, correlation of errors, similarity by layer."""
    check_writable(json_file, pictures=[plot])
    hide_progress_bars()
    _check_files(adapter, data)
    from ..analysis.diagnostics import diagnose as measure

    model, tokenizer = _load(adapter, backbone)
    found = measure(model, _batches(data, text_field, tokenizer, max_rows, max_length, batch_size), irreducible_loss)
    _print_streams(found)
    _print_losses(found)
    _print_rho(found)
    _print_layers(found)
    _print_removal(found)
    write_json(json_file, {"adapter": str(adapter), "data": data, **asdict(found)})
    if plot is not None:
        from ..analysis import diagnostics_plots, plots

        figure = diagnostics_plots.plot_diagnostics(found, adapter.resolve().name)
        write_atomically(plot, lambda path: plots.save(figure, path))


def _check_files(adapter: Path, data: str) -> None:
    """Refuse what can't be a ParScale adapter or a text, before a model is loaded."""
    from ..checkpoints.folders import find_adapter
    from ..data.sources import find_local_files

    if find_adapter(adapter).num_streams < 2:
        raise ValueError(
            f"`num_streams` of {adapter} must be at least 2, got 1: it has one stream, nothing to compare."
        )
    if find_local_files(data) is None:
        raise ValueError(f"`--data` must be a file or folder, got {data}, which is not there: give text that is here.")


def _load(adapter: Path, backbone: str | None) -> "tuple[PeftModel, PreTrainedTokenizerBase]":
    import torch
    from transformers import AutoTokenizer

    from ..checkpoints.folders import find_tokenizer
    from ..checkpoints.sources import find_source, load_source

    source = find_source(str(adapter), backbone)
    tokenizer = AutoTokenizer.from_pretrained(find_tokenizer(source.tokenizer_folders))
    return load_source(source).to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer


def _batches(
    data: str,
    text_field: str,
    tokenizer: "PreTrainedTokenizerBase",
    max_rows: int,
    max_length: int,
    batch_size: int,
) -> Sequence[Mapping[str, Any]]:
    from itertools import islice

    import datasets

    from ..data import PackedCollator, TextSource, iterate_packed_rows, load_source

    datasets.disable_progress_bars()
    documents = load_source(TextSource(data, text_field=text_field))
    rows = [row.to_dict() for row in islice(iterate_packed_rows(documents, tokenizer, max_length, data), max_rows)]
    if not any(row["num_tokens_trained"] for row in rows):
        raise ValueError(f"`--data` must hold text, got {data}, whose documents are all empty: give another.")
    pad_token_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    collate = PackedCollator(pad_token_id)
    return [collate(rows[start : start + batch_size]) for start in range(0, len(rows), batch_size)]


def _print_streams(found: "StreamDiagnostics") -> None:
    rows = [
        [str(stream), f"{weight:.4f}", f"{share:.1%}", f"{loss:.4f}", f"{loss - found.mixture_loss:+.4f}"]
        for stream, (weight, share, loss) in enumerate(zip(found.mean_weight, found.largest_share, found.own_loss))
    ]
    print_table(
        f"Streams, {found.num_tokens} tokens: entropy of the weights {found.entropy:.4f} nats, "
        f"{found.entropy_share:.1%} of log P",
        ["stream", "mean weight", "largest weight", "own loss", "own loss - mixture"],
        rows,
    )


def _print_losses(found: "StreamDiagnostics") -> None:
    losses = {
        "learned mixture": found.mixture_loss,
        "plain mean of the hidden states": found.plain_mean_loss,
        "mean of the probabilities": found.averaged_prediction_loss,
        "best stream alone": min(found.own_loss),
        "mean of the streams alone": sum(found.own_loss) / found.num_streams,
    }
    rows = [[name, f"{loss:.4f}", f"{loss - found.mixture_loss:+.4f}"] for name, loss in losses.items()]
    print_table("Mixing", ["what predicts", "loss (nats per token)", "- learned mixture"], rows)


def _print_rho(found: "StreamDiagnostics") -> None:
    rows = [[str(stream), *(f"{value:.4f}" for value in row)] for stream, row in enumerate(found.pairwise_rho)]
    bound = " (upper bounds, since E = 0)" if found.irreducible_loss == 0 else f" (E = {found.irreducible_loss:g})"
    title = f"Correlation of residual errors: rho = {found.rho:.4f} over all streams{bound}"
    print_table(title, ["stream", *(str(stream) for stream in range(found.num_streams))], rows)


def _print_layers(found: "StreamDiagnostics") -> None:
    rows = []
    for layer in found.layers:
        pairs = [layer.cosine[i][j] for i in range(found.num_streams) for j in range(i)]
        rows.append([layer.layer, f"{layer.mean_cosine:.4f}", f"{min(pairs):.4f}", f"{max(pairs):.4f}"])
    print_table(
        "Cosine similarity of the streams' hidden states",
        ["after layer", "mean of pairs", "farthest pair", "nearest pair"],
        rows,
    )


def _print_removal(found: "StreamDiagnostics") -> None:
    rows = [
        [
            str(len(step.streams)),
            "-" if step.removed is None else str(step.removed),
            ", ".join(map(str, step.streams)),
            f"{step.loss:.4f}",
            f"{step.loss - found.mixture_loss:+.4f}",
        ]
        for step in found.removal
    ]
    print_table(
        "Streams switched off one by one, smallest mean weight first, the other weights renormalised",
        ["streams left", "switched off", "which are left", "loss", "- all streams"],
        rows,
    )

"""What was read, trained, cut and dropped, per source."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich import box
from rich.table import Table


_COUNTS = (
    "documents",
    "documents_cut",
    "documents_dropped",
    "tokens_read",
    "tokens_trained",
    "tokens_cut",
    "tokens_dropped",
    "epochs",
)


@dataclass(frozen=True)
class SourceReport:
    """Counts of one source.

    Args:
        name: what the source is called.
        share: part of all trained tokens that came from this source, 0 to 1.
        wanted_share: the part asked for, None without weights.
        documents: documents read to their end; rows of questions and answers.
        documents_cut: of these, how many lost their end, and
        documents_dropped: how many were left out.
        tokens_read: tokens of text and end tokens, each once per epoch.
        tokens_trained: tokens that are a target; the first token of a document never is.
        tokens_cut: tokens that documents lost at their end.
        tokens_dropped: tokens that were read and left out with their document.
        epochs: how many times the source was used completely.
    """

    name: str
    share: float
    wanted_share: float | None
    documents: int
    documents_cut: int
    documents_dropped: int
    tokens_read: int
    tokens_trained: int
    tokens_cut: int
    tokens_dropped: int
    epochs: int


class TokenReport:
    """Counts per source, kept in shared memory so that DataLoader workers fill the same numbers.

    Args:
        names: one name per source.
        wanted_shares: shares of the trained tokens that were asked for, or None.
        is_one_pass: the counts are those of one pass over the data, however many a run makes.
    """

    def __init__(
        self, names: Sequence[str], wanted_shares: Sequence[float] | None = None, is_one_pass: bool = False
    ) -> None:
        self.names = list(names)
        self.is_one_pass = is_one_pass
        self.wanted_shares = None if wanted_shares is None else list(wanted_shares)
        self._counts = torch.zeros(len(self.names), len(_COUNTS), dtype=torch.long).share_memory_()

    def reset(self) -> None:
        """Set all counts to zero."""
        self._counts.zero_()

    def add_row(self, row: Mapping[str, Any]) -> None:
        """Count a row of a training dataset (columns as in `rows.TRAINING_FEATURES`)."""
        self.add(
            row["source_index"],
            documents=row["num_documents"],
            tokens_read=row["num_tokens_read"],
            tokens_trained=row["num_tokens_trained"],
            epochs=int(row["ends_epoch"]),
        )

    def add_dropped(self, source_index: int, num_documents: int, num_tokens: int) -> None:
        """Count tokens that were read and left out, and the documents that ended among them."""
        self.add(source_index, documents=num_documents, tokens_read=num_tokens, tokens_dropped=num_tokens)

    def add(self, source_index: int, **counts: int) -> None:
        """Add to the counts of a source; the names are those of [`SourceReport`]."""
        values = [counts.pop(name, 0) for name in _COUNTS]
        if counts:
            raise TypeError(f"`counts` must be of {', '.join(_COUNTS)}, got {', '.join(counts)}.")
        self._counts[source_index] += torch.tensor(values, dtype=torch.long)

    @property
    def num_tokens_trained(self) -> int:
        """Targets of all sources together."""
        return int(self._counts[:, _COUNTS.index("tokens_trained")].sum())

    @property
    def sources(self) -> list[SourceReport]:
        """The counts as they are now, one entry per source."""
        total = max(self.num_tokens_trained, 1)
        reports = []
        for index, name in enumerate(self.names):
            counts = dict(zip(_COUNTS, self._counts[index].tolist()))
            wanted = None if self.wanted_shares is None else self.wanted_shares[index]
            reports.append(SourceReport(name, counts["tokens_trained"] / total, wanted, **counts))
        return reports

    def to_dict(self) -> dict[str, Any]:
        """Return the counts as plain JSON values: ``{"counted_over": "run" or "one pass", "sources": [{...}, ...]}``."""
        counted_over = "one pass" if self.is_one_pass else "run"
        return {"counted_over": counted_over, "sources": [asdict(source) for source in self.sources]}

    def table(self) -> Table:
        """Return the counts as a rich table, one line per source; with the shares asked for, if there are weights."""
        title = "Tokens per source, in one pass" if self.is_one_pass else "Tokens per source"
        table = Table(title=title, box=box.SIMPLE, padding=(0, 0, 0, 1), pad_edge=False)
        table.add_column("source", overflow="fold")
        columns = ["docs", "docs cut", "docs dropped", "read", "trained", "cut", "dropped", "epochs", "share"]
        for column in columns if self.wanted_shares is None else [*columns, "wanted"]:
            table.add_column(column, justify="right", overflow="fold")
        for source in self.sources:
            cells = [f"{getattr(source, name):,}" for name in _COUNTS]
            cells.append(f"{source.share:.1%}")
            if source.wanted_share is not None:
                cells.append(f"{source.wanted_share:.1%}")
            table.add_row(source.name, *cells)
        return table

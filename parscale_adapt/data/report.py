"""What was read, trained and dropped, per source."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich import box
from rich.table import Table


_COUNTS = ("documents", "tokens_read", "tokens_trained", "tokens_dropped", "epochs")


@dataclass(frozen=True)
class SourceReport:
    """Counts of one source.

    Args:
        name: what the source is called.
        share: part of all trained tokens that came from this source, 0 to 1.
        wanted_share: the part asked for, None without weights.
        documents: documents read to their end.
        tokens_read: tokens of text and end tokens, each once per epoch.
        tokens_trained: tokens that are a target; the first token of a document never is.
        tokens_dropped: tokens that were read and left out.
        epochs: how many times the source was used completely.
    """

    name: str
    share: float
    wanted_share: float | None
    documents: int
    tokens_read: int
    tokens_trained: int
    tokens_dropped: int
    epochs: int


class TokenReport:
    """Counts per source, kept in shared memory so that DataLoader workers fill the same numbers.

    Args:
        names: one name per source.
        wanted_shares: shares of the trained tokens that were asked for, or None.
    """

    def __init__(self, names: Sequence[str], wanted_shares: Sequence[float] | None = None) -> None:
        self.names = list(names)
        self.wanted_shares = None if wanted_shares is None else list(wanted_shares)
        self._counts = torch.zeros(len(self.names), len(_COUNTS), dtype=torch.long).share_memory_()

    def reset(self) -> None:
        """Set all counts to zero."""
        self._counts.zero_()

    def add_row(self, row: Mapping[str, Any]) -> None:
        """Count a row of a training dataset (columns as in `rows.TRAINING_FEATURES`)."""
        values = [row["num_documents"], row["num_tokens_read"], row["num_tokens_trained"], 0, row["ends_epoch"]]
        self._counts[row["source_index"]] += torch.tensor(values, dtype=torch.long)

    def add_dropped(self, source_index: int, num_documents: int, num_tokens: int) -> None:
        """Count tokens that were read and left out, and the documents that ended among them."""
        self._counts[source_index] += torch.tensor([num_documents, num_tokens, 0, num_tokens, 0])

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
        """Return the counts as plain JSON values: ``{"sources": [{...}, ...]}``."""
        return {"sources": [asdict(source) for source in self.sources]}

    def table(self) -> Table:
        """Return the counts as a rich table, one line per source; with the shares asked for, if there are weights."""
        table = Table(title="Tokens per source", box=box.SIMPLE, padding=(0, 0, 0, 1), pad_edge=False)
        table.add_column("source", overflow="fold")
        columns = ["docs", "read", "trained", "dropped", "epochs", "share"]
        for column in columns if self.wanted_shares is None else [*columns, "wanted"]:
            table.add_column(column, justify="right", overflow="fold")
        for source in self.sources:
            counts = (source.documents, source.tokens_read, source.tokens_trained, source.tokens_dropped)
            cells = [*(f"{count:,}" for count in counts), str(source.epochs), f"{source.share:.1%}"]
            if source.wanted_share is not None:
                cells.append(f"{source.wanted_share:.1%}")
            table.add_row(source.name, *cells)
        return table

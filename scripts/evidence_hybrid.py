"""The section of docs/evidence.md about layers with a recurrent state, from docs/evidence/hybrid.csv."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from evidence_text import markdown_table


NOTICEABLE = 0.005  # nats: what the near-identity gate lets pass as no change


def section(rows: Sequence[dict[str, str]]) -> str:
    """The section in Markdown."""
    rates = list(dict.fromkeys(row["state_rate"] for row in rows))
    plain = {row["seed"]: float(row["loss"]) for row in rows if row["state_rate"] == ""}
    backbone = float(rows[0]["backbone_loss"])
    lines, gains = [], []
    for rate in rates:
        losses = {row["seed"]: float(row["loss"]) for row in rows if row["state_rate"] == rate}
        gained = [plain[seed] - loss for seed, loss in losses.items()]
        gains.append(statistics.mean(gained))
        lines.append(
            [
                f"prefixes and start states, rate {rate}" if rate else "prefixes in the layer with full attention",
                next(row["trained_params"] for row in rows if row["state_rate"] == rate),
                f"{statistics.mean(losses.values()):.4f}",
                f"{min(gained):+.4f} to {max(gained):+.4f}" if rate else "",
            ]
        )
    table = markdown_table(("", "trained parameters", "held-out loss", "gained by the states, by seed"), lines)
    return f"""
## Layers with a recurrent state

Hybrids have prefixes in their layers with full attention only. The counterpart of a prefix in a linear-attention layer is
a learned state from which each stream reads its text, which is what any number of virtual tokens would leave there.
[scripts/hybrid_states.py](../scripts/hybrid_states.py) tries them on a tiny Qwen3-Next (three linear layers and one with
full attention, trained on Python source, then frozen; its loss is {backbone:.4f}): four streams on
{int(rows[0]["tokens"]):,} tokens, {len(plain)} seed{"s" * (len(plain) > 1)}.

{table}

{_verdict(max(gains))}
"""


def _verdict(gain: float) -> str:
    if gain < NOTICEABLE:
        return (
            f"The best rate gains {gain:.4f} nats, which is too little to build it: it would need a place of its own in the "
            "caches of every hybrid, and in packed and padded rows."
        )
    return f"The best rate gains {gain:.4f} nats: worth building, which has not been done."

"""The part of the README that shows the runs on SmolLM2, between its two marks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from evidence_figures import Results
from evidence_prose import verdict
from evidence_text import markdown_table


BEGIN, END = "<!-- evidence: begin -->", "<!-- evidence: end -->"


def with_evidence(readme: str, section: str) -> str:
    """The README with `section` between its marks.

    Raises:
        ValueError: it doesn't have each mark once.
    """
    if readme.count(BEGIN) != 1 or readme.count(END) != 1:
        raise ValueError(
            f"README.md must have the lines {BEGIN} and {END} once each, between which the runs are shown."
        )
    head, rest = readme.split(BEGIN)
    return f"{head}{BEGIN}\n\n{section.strip()}\n\n{END}{rest.split(END)[1]}"


def section(results: Results, pairs: Sequence[tuple[str, str]], labels: Mapping[str, str]) -> str:
    """Experiments beside the baselines of the same size, and what their differences say.

    Args:
        results: of the runs.
        pairs: names of experiments and of their baselines; those that were not run are left out.
        labels: experiments in words.
    """
    there = [pair for pair in pairs if all(results.of(name) for name in pair)]
    names = list(dict.fromkeys(("backbone", "lora8", *(name for pair in there for name in reversed(pair)))))
    base = results.mean("backbone")
    rows = []
    for name in names:
        loss, is_base = results.mean(name), name == "backbone"
        trained = "" if is_base else f"{results.mean(name, 'trained_params') / 1e6:.2f}M"
        rows.append([labels[name], trained, f"{loss:.4f}", "" if is_base else f"{loss - base:+.4f}"])
    seeds = {len(results.of(name)) for name in names if name != "backbone"}
    found = "\n".join(
        f"- {labels[name]} against {labels[other]}: {verdict(results.difference(name, other))}."
        for name, other in there
    )
    tokens = int(results.of(there[0][0])[0]["tokens"])
    table = markdown_table(
        ("frozen backbone", "trained", "held-out loss (nats per token)", "against the backbone"), rows
    )
    return f"""
SmolLM2-135M-Instruct on {tokens:,} tokens of Python source that is younger than the model, all on the same tokens in the
same order, {_seeds(seeds)}; the loss is that of 48 files of other packages:

{table}

![held-out loss by P, with baselines of the same size](docs/images/evidence_loss_by_streams.png)

{found}

In brackets are 95% intervals over documents. P streams train and decode at the arithmetic of P models, so a LoRA alone is
the cheaper choice where it is as good; [docs/evidence.md](docs/evidence.md) has every run, what it cost, and the command
that repeats it.
"""


def _seeds(counts: set[int]) -> str:
    if counts == {1}:
        return "one seed"
    return f"{min(counts)} to {max(counts)} seeds" if len(counts) > 1 else f"{counts.pop()} seeds"

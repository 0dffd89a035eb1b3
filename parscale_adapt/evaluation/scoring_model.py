"""lm-eval's model of transformers, which also answers by beam search. Imports lm-eval, so import it where that is there."""

import logging
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM

from .stopping import StopInEachRow


# What it says of every model that it did not load itself.
_UNASKED = (
    "`pretrained` model kwarg is not of type `str`",
    "Passed an already-initialized model through `pretrained`",
)
logging.getLogger("lm_eval.models.huggingface").addFilter(lambda record: not record.getMessage().startswith(_UNASKED))


class BeamLM(HFLM):
    """With one beam it is lm-eval's own. With more, stop sequences are looked for in each beam.

    lm-eval's own criterion looks at as many rows as there are prompts, which are not those of the prompts' beams, so that a
    beam could be cut or go on because of another.
    """

    num_beams = 1

    def _model_generate(
        self, context: torch.Tensor, max_length: int, stop: list[str], **generation_kwargs: Any
    ) -> torch.Tensor:
        if self.num_beams == 1:
            return super()._model_generate(context, max_length, stop, **generation_kwargs)
        generation_kwargs = {
            name: value for name, value in generation_kwargs.items() if name not in ("do_sample", "temperature")
        }
        return self.model.generate(
            input_ids=context,
            max_length=max_length,
            num_beams=self.num_beams,
            do_sample=False,
            stopping_criteria=[StopInEachRow(self.tokenizer, stop, context.shape[1])],
            pad_token_id=self.tokenizer.pad_token_id,
            use_cache=True,
            **generation_kwargs,
        )

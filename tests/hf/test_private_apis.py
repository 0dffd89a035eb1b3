"""Keywords of transformers' attention functions that we read or rewrite. Renamed there, they would pass us silently."""

import importlib
import inspect

import pytest
from transformers.integrations.flash_attention import flash_attention_forward
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_flash_attention_utils import _flash_attention_forward

from parscale_adapt.core.packed_documents import _LENGTHS
from parscale_adapt.hf.attention import ARGUMENTS_PER_KEY


SPARSE = {"indices": "deepseek_v32", "block_indices": "minimax_m3_vl"}


@pytest.mark.parametrize(
    ("function", "names"),
    [
        (flash_attention_forward, ("dropout", "scaling", "sliding_window", "s_aux", "cache")),
        (_flash_attention_forward, ("position_ids", *_LENGTHS)),
        (flex_attention_forward, ("scaling", "s_aux", "position_bias")),
        (sdpa_attention_forward, ("dropout", "scaling", "position_bias", "cache")),
    ],
)
def test_stock_functions_take_the_keywords_that_we_know(function, names):
    assert set(names) <= inspect.signature(function).parameters.keys()


@pytest.mark.parametrize("name", ARGUMENTS_PER_KEY)
def test_sparse_attention_names_its_keys_as_we_know(name):
    module = importlib.import_module(f"transformers.models.{SPARSE[name]}.modeling_{SPARSE[name]}")
    assert f"{name}=" in inspect.getsource(module)

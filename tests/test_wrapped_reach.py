"""What a query sees is read from the mask functions of transformers, or refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import wrapped_support as support
from transformers import masking_utils

from breakgraph.models.transformers_impl import wrap_model
from breakgraph.models.transformers_impl.reach import MaskShapeError, Reach, reach_of

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("function", "size", "reach"),
    [
        (masking_utils.causal_mask_function, None, Reach()),
        (masking_utils.bidirectional_mask_function, None, Reach(right=None)),
        (masking_utils.sliding_window_causal_mask_function(9), 9, Reach(left=8)),
        (masking_utils.sliding_window_causal_mask_function(1), 1, Reach(left=0)),
        (
            masking_utils.sliding_window_bidirectional_mask_function(5),
            5,
            Reach(left=5, right=5),
        ),
        (
            masking_utils.chunked_causal_mask_function(6, torch.zeros(1, dtype=torch.int64)),
            6,
            Reach(chunk=6),
        ),
    ],
)
def test_mask_functions_of_transformers_are_known(
    function: Any, size: int | None, reach: Reach
) -> None:
    assert reach_of(function, size, CPU) == reach


@pytest.mark.parametrize(
    "function",
    [
        lambda b, h, q, k: (k <= q) & (k != 3),
        masking_utils.and_masks(
            masking_utils.causal_mask_function,
            masking_utils.padding_mask_function(torch.ones(1, 4, dtype=torch.bool)),
        ),
    ],
)
def test_mask_of_another_shape_is_refused(function: Any) -> None:
    with pytest.raises(MaskShapeError):
        reach_of(function, 4, CPU)


@pytest.mark.parametrize(
    "reach", [Reach(), Reach(right=None), Reach(left=3), Reach(left=2, right=2), Reach(chunk=4)]
)
def test_range_of_keys_holds_all_that_are_seen(reach: Reach) -> None:
    at = torch.arange(13)
    for first in range(13):
        for end in range(first + 1, 14):
            begin, stop = reach.keys_of(first, end, 13)
            seen = reach.visible(at[first:end], at).any(0).nonzero().flatten()
            assert begin <= int(seen.min())
            assert int(seen.max()) < stop


def test_window_that_no_sequence_fills_is_none() -> None:
    assert Reach(left=127).within(128) == Reach(left=127, chunk=128).within(128) == Reach()
    assert Reach(left=126).within(128) == Reach(left=126)
    model = support.make_wrappable("MistralForCausalLM", sliding_window=128)
    assert wrap_model(model).decode_limits == ""

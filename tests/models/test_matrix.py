# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""The matrix: every promise of promises.py for every cell that it concerns, the in-tree models among them."""

from itertools import combinations

import pytest
from promises import (
    ATTENTIONS,
    CELLS,
    COMBINES,
    DTYPES,
    FAMILIES,
    MODULES,
    ROUTINGS,
    SIDES,
    a_cache_changes_nothing,
    gradients_reach_used_experts_and_no_router,
    later_tokens_change_nothing,
    packed_documents_are_independent,
    padding_changes_nothing,
    rows_are_independent,
    saving_changes_nothing,
    switching_on_changes_nothing,
)


# Each promise, and the cells that it concerns.
PROMISES = {
    later_tokens_change_nothing: lambda cell: cell.causal,
    a_cache_changes_nothing: lambda cell: cell.causal,
    rows_are_independent: lambda cell: True,
    padding_changes_nothing: lambda cell: True,
    packed_documents_are_independent: lambda cell: cell.family == "gpt2" or cell.routing != "sequence",
    switching_on_changes_nothing: lambda cell: cell.routing is not None,
    saving_changes_nothing: lambda cell: True,
    gradients_reach_used_experts_and_no_router: lambda cell: cell.routing is not None,
}
MATRIX = [(promise, cell) for promise, concerns in PROMISES.items() for cell in CELLS if concerns(cell)]


@pytest.mark.parametrize(("promise", "cell"), MATRIX, ids=lambda part: getattr(part, "__name__", str(part)))
def test_promise_holds(promise, cell, tmp_path):
    promise(cell, *([tmp_path] if promise is saving_changes_nothing else []))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_pair_of_values_is_met_in_each_family(family):
    """The matrix is no full product: what two flags do together is seen, what three do is seen in most cases."""
    cells = [cell[1:] for cell in CELLS if cell.family == family and cell.routing is not None]
    axes = (ROUTINGS, COMBINES, MODULES, ATTENTIONS, SIDES, DTYPES)
    for (one, values), (other, others) in combinations(enumerate(axes), 2):
        assert len({(cell[one], cell[other]) for cell in cells}) == len(values) * len(others)

# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""Promises of the labels for the controls: `label_at_random` and `label_by_domain`."""

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Value
from tiny import activate, tiny_model
from transformers import default_data_collator

from modeling_cse.data import label_at_random, label_by_domain


SHARES = [0.7, 0.0, 0.2, 0.1]


def sequences(count: int = 4000, length: int = 8) -> Dataset:
    ids = np.random.default_rng(0).integers(0, 500, (count, length))
    return Dataset.from_dict({"input_ids": ids.tolist(), "domain": [("a", "b", "c")[i % 3] for i in range(count)]})


def labels_of(dataset, shares=SHARES, seed=0) -> np.ndarray:
    return np.array(list(label_at_random(dataset, shares, seed)["given_clusters"]))


def test_shares_are_met_within_sampling_error():
    found = np.bincount(labels_of(sequences()), minlength=4) / 4000
    wanted = np.array(SHARES)
    assert found[1] == 0 and (np.abs(found - wanted) <= 4 * np.sqrt(wanted * (1 - wanted) / 4000)).all()
    assert len(set(found)) == 4


def test_labels_say_nothing_about_domain_or_place():
    labels = labels_of(sequences(), [0.5, 0.5])
    for part in (labels[0::3], labels[1::3], labels[2::3], labels[:1000], labels[-1000:]):
        assert abs(part.mean() - 0.5) < 4 * 0.5 / np.sqrt(len(part))


def test_a_sequence_keeps_its_label_in_any_order_batch_and_process():
    data = sequences(400)
    wanted = labels_of(data)
    order = np.random.default_rng(1).permutation(400)
    assert (labels_of(data.select(order)) == wanted[order]).all()
    assert (labels_of(data.select([7])) == wanted[[7]]).all()
    assert [row["given_clusters"] for row in label_at_random(data.to_iterable_dataset(), SHARES, 0)] == list(wanted)
    doubled = labels_of(data.select([3, 3, 5, 3]))
    assert doubled[0] == doubled[1] == doubled[3] == wanted[3]


def test_the_label_does_not_depend_on_how_tokens_are_stored_or_on_other_columns():
    data = sequences(200)
    narrow = data.cast_column("input_ids", type(data.features["input_ids"])(Value("int32"))).remove_columns("domain")
    assert (labels_of(narrow) == labels_of(data)).all()
    assert (labels_of(data.with_format("torch")) == labels_of(data)).all()


def test_labels_never_change():
    """Written down: neither another process nor another machine, nor a later version, may draw another control."""
    data = Dataset.from_dict({"input_ids": [[i, i + 1] for i in range(24)]})
    assert "".join(map(str, labels_of(data, [0.5, 0.3, 0.2], seed=7))) == "000000010220210110011001"


def test_seeds_are_independent():
    first, second = (labels_of(sequences(), [0.5, 0.5], seed) for seed in (0, 1))
    assert abs((first == second).mean() - 0.5) < 4 * 0.5 / np.sqrt(4000)


def test_a_cluster_without_a_share_gets_nothing_even_where_shares_add_up_by_rounding_only():
    shares = [1 / 3, 1 / 3, 1 / 3 - 1e-7, 0.0]
    assert set(labels_of(sequences(), shares)) == {0, 1, 2}
    assert set(labels_of(sequences(50), [1.0])) == {0}


@pytest.mark.parametrize(
    "shares",
    [[], [0.5, 0.4], [0.7, 0.7], [1.2, -0.2], [float("nan"), 1.0], [float("inf")], ["a"], None, 1.0, [70, 20, 10]],
)
def test_wrong_shares_are_refused_by_name(shares):
    with pytest.raises(ValueError, match="shares=.*is not allowed: .* with the sum 1"):
        label_at_random(sequences(4), shares, 0)


@pytest.mark.parametrize("seed", [-1, 2**64, 1.5, True, None])
def test_wrong_seed_is_refused_by_name(seed):
    with pytest.raises(ValueError, match=f"seed={seed!r} is not allowed"):
        label_at_random(sequences(4), SHARES, seed)


# ---- by domain --------------------------------------------------------------------------------------------------


def test_the_label_of_a_domain_is_its_place_and_other_text_has_none():
    data = sequences(6)
    for made in (data, data.to_iterable_dataset()):
        labelled = label_by_domain(made, ["c", "a"])
        assert [row["given_clusters"] for row in labelled] == [1, -1, 0, 1, -1, 0]
        assert labelled.features["given_clusters"] == Value("int64")
        assert [row["input_ids"] for row in labelled] == [row["input_ids"] for row in data]


def test_class_labels_go_by_their_names():
    data = sequences(6).cast_column("domain", ClassLabel(names=["a", "b", "c"]))
    assert list(label_by_domain(data, ["c", "a"])["given_clusters"]) == [1, -1, 0, 1, -1, 0]


def test_a_listed_domain_that_no_row_has_is_refused():
    with pytest.raises(ValueError, match=r"no row is of \['legall'\], they are of \['a', 'b', 'c'\]"):
        label_by_domain(sequences(6), ["a", "legall"])


def test_a_split_may_lack_a_domain_of_the_others():
    labelled = label_by_domain(sequences(6), ["aa", "b", "c"], every_domain=False)
    assert list(labelled["given_clusters"]) == [-1, 1, 2, -1, 1, 2]


@pytest.mark.parametrize("domains", [[], "abc", ["a", "a"], ["a", 3]])
def test_wrong_domains_are_refused_by_name(domains):
    with pytest.raises(ValueError, match="domains=.*is not allowed: it must be a list of different names"):
        label_by_domain(sequences(6), domains)


def test_a_row_without_a_domain_is_refused():
    data = Dataset.from_dict({"input_ids": [[1], [2]], "domain": ["a", None]})
    with pytest.raises(ValueError, match="rows without a value"):
        label_by_domain(data, ["a"])


# ---- both -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("label", "column"), [(label_at_random, "input_ids"), (label_by_domain, "domain")])
def test_missing_and_doubled_columns_are_refused(label, column):
    arguments = ([1.0], 0) if label is label_at_random else (["a"],)
    data = sequences(6)
    with pytest.raises(ValueError, match=f"no column '{column}'"):
        label(data.remove_columns(column), *arguments)
    with pytest.raises(ValueError, match="has a column 'given_clusters' already"):
        label(label(data, *arguments), *arguments)
    with pytest.raises(ValueError, match="dataset is a DatasetDict"):
        label(DatasetDict(train=data), *arguments)


def test_a_model_with_given_routes_takes_the_column():
    data = Dataset.from_dict({"input_ids": [[5, 6, 7]] * 6, "domain": ["a", "b", "c"] * 2})
    batch = default_data_collator(list(label_by_domain(data, ["c", "a"])))
    assert batch["given_clusters"].dtype == torch.int64
    with torch.no_grad():
        found = activate(tiny_model("gpt2", cse_routing="given"))(**batch, output_cluster_ids=True).cluster_ids
    assert all(layer[:, 0].tolist() == [1, -1, 0, 1, -1, 0] for layer in found)

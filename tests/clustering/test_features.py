# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""Promises of routing features: means over the tokens of a sequence alone, tokens from everywhere in it, bounded."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.metrics import adjusted_mutual_info_score
from tiny import tiny_model

from modeling_cse.clustering import FeatureStore, RoutingFeatures, find_clusters, sample_features
from modeling_cse.scope_cse import SequenceScope, sequence_means


def positions_of(*lengths: int) -> torch.Tensor:
    return torch.cat([torch.arange(length) for length in lengths])


def ragged(side: str, rows: int = 5, length: int = 12) -> torch.Tensor:
    """A mask with 12, 10, 8, ... tokens a row."""
    mask = torch.ones(rows, length, dtype=torch.long)
    for row in range(rows):
        mask[row, length - 2 * row :] = 0
    return mask.flip(1) if side == "left" else mask


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("side", ["right", "left"])
def test_means_leave_padding_out(side, dtype):
    states, mask = torch.randn(5, 12, 8).to(dtype), ragged(side)
    means, counts, index = sequence_means(states, SequenceScope.of(mask, None))
    assert means.dtype == torch.float32 and means.shape == (5, 8)
    for row in range(5):
        torch.testing.assert_close(means[row], states[row][mask[row].bool()].float().mean(0))
        assert counts[row] == mask[row].sum() and (index[row] == row).all()


def test_means_of_a_packed_row_are_those_of_its_documents():
    states = torch.randn(2, 12, 8)
    lengths = ((3, 4, 5), (6, 6))
    places = torch.stack([positions_of(*row) for row in lengths])
    means, counts, index = sequence_means(states, SequenceScope.of(None, places))
    assert counts.sum() == 24 and (counts > 0).sum() == 5
    for row, parts in enumerate(lengths):
        start = 0
        for part in parts:
            own = index[row, start : start + part]
            assert (own == own[0]).all() and counts[own[0]] == part
            torch.testing.assert_close(means[own[0]], states[row, start : start + part].mean(0))
            start += part


@pytest.mark.parametrize("filler", [0, 1])
def test_left_padding_with_positions_is_one_sequence(filler):
    """Whatever positions the padding was given."""
    states, mask = torch.randn(3, 12, 8), ragged("left", 3)
    places = (mask.cumsum(-1) - 1).masked_fill(mask == 0, filler)
    means, counts, index = sequence_means(states, SequenceScope.of(mask, places))
    for row in range(3):
        own = index[row][mask[row].bool()]
        assert (own == own[0]).all()
        torch.testing.assert_close(means[own[0]], states[row][mask[row].bool()].mean(0))


def test_a_separator_ends_a_document():
    """The same documents as by positions; beside them, both count."""
    ids, positions = torch.tensor([[5, 3, 6, 6, 3, 7], [3, 5, 5, 6, 6, 6]]), positions_of(2, 4)
    by_token = SequenceScope.of(None, None, ids, 3)
    assert by_token.segments.tolist() == [[0, 0, 1, 1, 1, 2], [0, 1, 1, 1, 1, 1]]
    assert SequenceScope.of(None, positions, ids, 3).segments.tolist() == [[0, 0, 1, 1, 1, 2], [0, 1, 2, 2, 2, 2]]
    assert SequenceScope.of(None, None, ids[:, :1], 3).segments.tolist() == [[0], [0]]
    assert SequenceScope.of(None, None, ids).segments is None


def test_separators_that_follow_each_other_part_two_documents():
    """Before and behind a document, or as padding without a mask."""
    ids = torch.tensor([[3, 3, 5, 6, 3, 3, 7, 8, 3, 3, 3]])
    assert SequenceScope.of(None, None, ids, 3).segments.tolist() == [[0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 2]]


@pytest.mark.parametrize("per_row", [True, False])
def test_padding_amid_a_row_neither_starts_nor_ends_a_document(per_row):
    """Positions go on behind it, as `generate` counts, or count it. Padding may be the separator itself."""
    mask = torch.tensor([[0, 1, 1, 0, 0, 1, 1], [1, 1, 0, 1, 1, 1, 1]])
    places = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 0)
    ids = torch.tensor([[3, 5, 5, 3, 3, 5, 5], [5, 5, 3, 5, 3, 6, 6]])
    if not per_row:
        mask, places, ids = mask[:1], places[0], ids[:1]
    segments = SequenceScope.of(mask, places).segments
    assert not segments.any() and not SequenceScope.of(mask, torch.arange(7).expand_as(places)).segments.any()
    by_token = SequenceScope.of(mask, None, ids, 3).segments
    assert by_token.tolist() == [[0] * 7, [0, 0, 0, 0, 0, 1, 1]][: len(mask)]
    packed = places.clone()
    packed[..., 5:] -= 2  # another document begins behind the padding
    assert SequenceScope.of(mask, packed).segments[0].tolist() == [0, 0, 0, 0, 0, 1, 1]


def test_a_separator_among_embeddings_is_refused():
    model = tiny_model("bert", cse_routing="sequence", cse_separator_token_id=3)
    with pytest.raises(ValueError, match="inputs_embeds is not allowed with cse_separator_token_id=3"):
        model(inputs_embeds=torch.zeros(2, 5, 32))


def test_one_row_of_positions_stands_for_all_rows():
    states = torch.randn(3, 6, 8)
    means, counts, _ = sequence_means(states, SequenceScope.of(None, positions_of(2, 4).unsqueeze(0)))
    assert sorted(counts[counts > 0].tolist()) == [2, 2, 2, 4, 4, 4]
    torch.testing.assert_close(means[counts == 2], states[:, :2].mean(1))


@pytest.mark.parametrize("side", ["right", "left"])
def test_sampled_tokens_are_valid_tokens_at_their_positions(side):
    states, mask = torch.randn(5, 12, 8), ragged(side)
    features = sample_features(states, SequenceScope.of(mask, None), 4, 0)
    assert len(features) == 5 and features.tokens.shape == (5, 4, 8)
    for row in range(5):
        own = states[row][mask[row].bool()]
        torch.testing.assert_close(features.tokens[row], own[features.positions[row]], atol=0, rtol=0)
        torch.testing.assert_close(features.embeddings[row], own.mean(0))


def test_where_no_token_is_wanted_means_and_absence_stay():
    states, mask = torch.randn(3, 3, 8), torch.tensor([[1, 1, 1], [0, 0, 0], [1, 0, 0]])
    with_tokens, without = (sample_features(states, SequenceScope.of(mask, None), m, 0).present() for m in (2, 0))
    assert without.tokens.shape == (2, 0, 8) and without.positions.shape == (2, 1)
    assert torch.equal(without.embeddings, with_tokens.embeddings)


def test_sampled_tokens_of_packed_documents_stay_in_them():
    states = torch.randn(1, 12, 8)
    features = sample_features(states, SequenceScope.of(None, positions_of(3, 4, 5).unsqueeze(0)), 3, 0)
    assert len(features) == 3
    for document, (start, length) in enumerate(((0, 3), (3, 4), (7, 5))):
        own = states[0, start : start + length]
        torch.testing.assert_close(features.embeddings[document], own.mean(0))
        assert torch.equal(features.tokens[document], own[features.positions[document]])


def test_rows_without_a_token_are_left_out():
    mask = torch.tensor([[1, 1, 1], [0, 0, 0], [1, 0, 0]])
    features = sample_features(torch.randn(3, 3, 8), SequenceScope.of(mask, None), 2, 0).present()
    assert len(features) == 2 and features.positions[1].tolist() == [0, 0]


def test_each_part_of_a_sequence_gives_a_token_and_all_positions_are_met():
    met = set()
    for offset in range(40):
        places = sample_features(torch.randn(1, 32, 4), SequenceScope(), 4, offset).positions[0]
        assert (places // 8).tolist() == [0, 1, 2, 3]
        met |= set(places.tolist())
    assert met == set(range(32))


def test_cutting_a_batch_up_changes_no_feature():
    states = torch.randn(6, 10, 4)
    whole = sample_features(states, SequenceScope(), 3, 0)
    parts = [sample_features(states[i : i + 2], SequenceScope(), 3, i) for i in (0, 2, 4)]
    joined = RoutingFeatures.concatenate(parts)
    assert torch.equal(whole.tokens, joined.tokens) and torch.equal(whole.positions, joined.positions)
    torch.testing.assert_close(whole.embeddings, joined.embeddings)


def test_features_of_half_precision_states_are_fp32():
    features = sample_features(torch.randn(2, 6, 4).bfloat16(), SequenceScope(), 3, 0)
    assert features.embeddings.dtype == features.tokens.dtype == torch.float32


def numbered(*values: int) -> RoutingFeatures:
    column = torch.tensor(values, dtype=torch.float32).unsqueeze(1)
    return RoutingFeatures(column, column.unsqueeze(1), torch.zeros(len(values), 1, dtype=torch.long))


@pytest.mark.parametrize("batch", [1, 3, 5, 8, 20])
def test_store_is_bounded_and_keeps_the_newest(batch):
    store = FeatureStore(5)
    for start in range(0, 40, batch):
        store.add(numbered(*range(start, start + batch)))
        assert len(store) <= 5
    assert store.seen == -(-40 // batch) * batch
    assert store.all().embeddings.flatten().tolist() == list(range(store.seen - 5, store.seen))


def test_store_is_empty_after_clearing():
    store = FeatureStore(5)
    assert store.all() is None
    store.add(numbered(1, 2))
    store.clear()
    assert store.all() is None and len(store) == 0 and store.seen == 2


def written(*values: int) -> RoutingFeatures:
    """Sequences as `numbered` has them, whose only token is their number."""
    ids = torch.tensor(values, dtype=torch.int32).unsqueeze(1)
    return replace(numbered(*values), ids=ids)


def test_a_store_goes_on_from_what_a_checkpoint_holds():
    store, again = FeatureStore(5), FeatureStore(5)
    for value in range(7):
        store.add(written(value))
    again.restore(store.as_it_is(), store.seen, store.passes)
    for one in (store, again):
        one.add(written(100))
    for name, tensor in vars(store.as_it_is()).items():
        assert torch.equal(vars(again.as_it_is())[name], tensor), name
    assert again.seen == 8 and again.all().ids.flatten().tolist() == [3, 4, 5, 6, 100]


def test_texts_are_kept_without_states_and_states_without_texts():
    whole = written(1, 2)
    texts, states = whole.without_states(), whole.without_ids()
    assert texts.embeddings.numel() == texts.tokens.numel() == 0 and texts.ids.tolist() == [[1], [2]]
    assert states.ids.shape == (2, 0) and torch.equal(states.embeddings, whole.embeddings)
    assert len(texts.present()) == len(states.present()) == 2


def drifting(count=400, width=6, seed=0):
    """Two clusters of texts, and a drift of all states that is wider than the gap between them."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(2, (count,), generator=generator)
    texts = torch.randn(count, width, generator=generator) * 0.1 + labels.unsqueeze(1)
    time = torch.linspace(0, 1, count).unsqueeze(1)
    drift = torch.cat([8 * time, -5 * time**2, torch.zeros(count, width - 2)], dim=1)
    states = texts + drift
    tokens = states.unsqueeze(1).expand(-1, 3, -1).clone()
    return labels, texts, RoutingFeatures(states, tokens, torch.zeros(count, 3, dtype=torch.long)), drift


def test_drift_during_the_sample_is_moved_to_its_end():
    """Clusters are those of texts again, where they had been clusters of time; tokens move with their sequence."""
    labels, texts, features, drift = drifting()

    def found(embeddings):
        clusters = find_clusters(embeddings.numpy(), "kmeans", 2, 0).labels
        return adjusted_mutual_info_score(labels.numpy(), clusters)

    assert found(features.embeddings) < 0.1
    moved = features.detrended()
    assert found(moved.embeddings) > 0.95
    # the mean of all texts at the end of the drift, up to what four numbers a dimension take of the texts' own noise
    expected = texts.mean(0) + drift[-1]
    assert (moved.embeddings.mean(0) - expected).abs().max() < 0.5
    assert torch.allclose(moved.tokens - features.tokens, (moved.embeddings - features.embeddings).unsqueeze(1))


@pytest.mark.parametrize("clusters", [None, 1, 3, 397])
def test_drift_is_the_cubic_of_least_squares_beside_a_mean_a_cluster(clusters):
    """Also with as many clusters as leave no number free: of all solutions the least one is taken."""
    _, _, features, _ = drifting()
    labels = None if clusters is None else np.arange(400) % clusters
    time = np.linspace(-1, 1, 400)
    powers = np.stack([time, time**2, time**3], axis=1)
    means = np.eye(clusters or 1)[np.zeros(400, int) if labels is None else labels]
    fitted = np.linalg.lstsq(np.concatenate([powers, means], axis=1), features.embeddings.double().numpy())[0]
    drift = powers @ fitted[:3]
    expected = features.embeddings.numpy() + (drift[-1] - drift)
    np.testing.assert_allclose(features.detrended(labels).embeddings.numpy(), expected, atol=1e-4)


def test_a_handful_of_sequences_is_left_as_it_is():
    _, _, features, _ = drifting(count=5)
    assert features.detrended() is features

# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""Promises about copies in a sample: a text under another mask is the same text, one that begins alike is not."""

import numpy as np
import pytest

from modeling_cse.clustering import held_out
from modeling_cse.clustering.copies import LEAST_SHARED, ROWS, are_copies, first_copies


MASK = 3


def masked(ids: np.ndarray, seed: int) -> np.ndarray:
    """As `DataCollatorForLanguageModeling` does it: of 15 % of the tokens 80 % are masks and 10 % are others."""
    generator = np.random.default_rng(seed)
    draws = generator.random(ids.shape)
    other = np.where(draws < 0.135, generator.integers(5, 500, ids.shape), ids)
    return np.where(ids < 0, ids, np.where(draws < 0.12, MASK, other)).astype(np.int32)


def texts(count: int, length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(5, 500, (count, length)).astype(np.int32)


@pytest.mark.parametrize("length", [32, 63, 256])
def test_a_text_under_three_masks_is_one_text(length):
    plain = texts(40, length)
    plain[7, length // 2 :] = -1
    sample = np.concatenate([masked(plain, seed) for seed in (1, 2, 3)])
    np.testing.assert_array_equal(first_copies(sample), np.tile(np.arange(40), 3))


def test_texts_without_masks_are_copies_where_they_are_equal():
    plain = texts(30, 3)
    sample = np.concatenate([plain, plain[::-1]])
    np.testing.assert_array_equal(first_copies(sample), np.append(np.arange(30), np.arange(30)[::-1]))


def test_copies_lie_anywhere_in_a_large_sample():
    plain = texts(ROWS + 50, 64)
    sample = np.concatenate([masked(plain, 1), masked(plain, 2)[::-1]])
    np.testing.assert_array_equal(first_copies(sample), np.append(np.arange(ROWS + 50), np.arange(ROWS + 50)[::-1]))


def test_half_of_the_places_make_a_copy_wherever_they_are():
    """Every second place alike, and no two in a row; one place less is another text."""
    plain = texts(1, 64).repeat(3, axis=0)
    plain[1, ::2] += 1000
    plain[2, ::2] += 2000
    plain[2, 1] += 2000
    assert (plain[0] == plain[1]).mean() == LEAST_SHARED
    np.testing.assert_array_equal(first_copies(plain), [0, 0, 2])


def test_texts_that_begin_alike_or_elsewhere_are_not_copies():
    plain = texts(20, 64)
    plain[:, :28] = plain[0, :28]  # the head of a form
    moved = np.roll(texts(20, 64, 1), 4, axis=1)
    sample = np.concatenate([plain, texts(20, 64, 1), moved])
    np.testing.assert_array_equal(first_copies(sample), np.arange(60))


def test_the_length_counts():
    """The first quarter of a text is another text."""
    plain = texts(2, 64)
    plain[1] = np.where(np.arange(64) < 16, plain[0], -1)
    np.testing.assert_array_equal(first_copies(plain), [0, 1])


def test_texts_without_a_token_are_one():
    np.testing.assert_array_equal(first_copies(np.full((3, 4), -1, np.int32)), [0, 0, 0])


def test_copies_under_masks_are_held_out_together():
    plain = texts(50, 64)
    sample = np.concatenate([masked(plain, 1), np.roll(masked(plain, 2), 1, axis=0)])
    held = held_out(len(sample), sample)
    np.testing.assert_array_equal(held[:50], held_out(50))
    np.testing.assert_array_equal(held[50:], np.roll(held[:50], 1))


@pytest.mark.parametrize("count", [40, ROWS + 50])
def test_copies_of_other_texts_are_found(count):
    """Under other masks, and in rows of another length."""
    others = texts(count, 64)
    own = np.concatenate([masked(others, 1)[::2], texts(30, 64, 3)])
    wide = np.pad(own, ((0, 0), (0, 8)), constant_values=-1)
    expected = np.arange(len(own)) < (count + 1) // 2
    np.testing.assert_array_equal(are_copies(own, masked(others, 2)), expected)
    np.testing.assert_array_equal(are_copies(wide, others), expected)
    assert not are_copies(own, others[:0]).any() and len(are_copies(own[:0], others)) == 0


def test_half_of_the_places_make_a_copy_of_another_text():
    plain = texts(1, 64)
    half, less = plain.repeat(2, axis=0)
    half[::2] += 1000
    less[:33] += 1000
    assert are_copies(np.stack([half, less, plain[0]]), plain).tolist() == [True, False, True]

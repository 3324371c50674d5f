# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""What is said of a cluster: its words and its typical sequences."""

import numpy as np

from modeling_cse.analysis import passage, top_terms, typical_rows


def test_words_tell_a_cluster_from_the_others():
    law = [f"the court and the judge heard plea {number}" for number in range(20)]
    medicine = [f"the patient and the nurse took dose {number}" for number in range(10)]
    terms = top_terms(law + medicine, np.array([0] * 20 + [1] * 10), 2)
    assert set(terms[0]) == {"court", "judge", "heard", "plea"}
    assert set(terms[1]) == {"patient", "nurse", "took", "dose"}


def test_one_text_that_repeats_a_word_does_not_speak_for_its_cluster():
    texts = ["zebra " * 500 + "court law"] + ["court law judge"] * 20 + ["dose drug nurse"] * 20
    terms = top_terms(texts, np.array([0] * 21 + [1] * 20), 2)
    assert "zebra" not in terms[0] and {"court", "judge"} <= set(terms[0])


def test_where_clusters_mean_nothing_hardly_a_word_is_told():
    generator = np.random.default_rng(0)
    words = [f"word{chr(97 + a)}{chr(97 + b)}" for a in range(20) for b in range(10)]
    texts = [" ".join(generator.choice(words, 40)).translate(str.maketrans("", "", "0123456789")) for _ in range(400)]
    found = top_terms(texts, generator.integers(0, 2, 400), 2, most=200)
    assert sum(map(len, found)) < 0.1 * len(words)


def test_text_without_words_and_empty_clusters_are_no_error():
    assert top_terms(["12 34", "56"] * 5, np.array([0, 1] * 5), 2) == [[], []]
    assert top_terms(["court law"] * 9, np.zeros(9, int), 3) == [[], [], []]


def test_typical_sequences_are_members_and_the_nearest():
    distances = np.array([[3.0, 9], [1, 9], [2, 0], [9, 1], [0.5, 9], [2.5, 9]])
    labels = np.array([0, 0, 1, 1, 0, 0])
    assert typical_rows(distances, labels, most=3) == [[4, 1, 5], [2, 3]]


def test_a_passage_is_one_line_that_begins_and_ends_at_a_word():
    assert passage("ding words\n\nthat  go on and on", most=16) == "words that go on …"
    assert passage("short\ttext") == "short text"
    assert passage("x" * 50, most=10) == "x" * 10 + " …"

# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""Promises of the downstream protocol: embeddings are those of a text alone, probes are chosen on validation, and
every base model gets the same head."""

import numpy as np
import pytest
import torch
from tiny import SIZES, activate, dense_model, tiny_model, token_ids

from modeling_cse.data import train_tokenizer
from modeling_cse.evaluation.embedding import embed, load_base_model
from modeling_cse.evaluation.encoding import GAP, TextEncoder
from modeling_cse.evaluation.finetuning import Examples, FineTuning, MeanPoolClassifier, fine_tune
from modeling_cse.evaluation.probe import Split, linear_probe
from modeling_cse.evaluation.switch import (
    SwitchBertConfig,
    SwitchBertForMaskedLM,
    SwitchGPT2Config,
    SwitchGPT2ForCausalLM,
)


SWITCH = {"gpt2": (SwitchGPT2Config, SwitchGPT2ForCausalLM), "bert": (SwitchBertConfig, SwitchBertForMaskedLM)}
WORDS = "one two three four five six seven eight nine ten"


def language_model(family: str, kind: str):
    if kind == "dense":
        return dense_model(family)
    if kind == "switch":
        config, model = SWITCH[family]
        torch.manual_seed(0)
        return model(config(**SIZES[family])).eval()
    return activate(tiny_model(family, cse_routing=kind))


def texts(count: int = 11, seed: int = 0) -> list[list[int]]:
    """Token ids of texts of many lengths."""
    return [row[: 3 + 5 * number % 17].tolist() for number, row in enumerate(token_ids(count, 20, seed))]


def accuracy(told: np.ndarray, labels: np.ndarray) -> float:
    return float((told == labels).mean())


@pytest.fixture
def tokenizer(family):
    return train_tokenizer([WORDS, "( )"] * 20, kind=family, vocab_size=300)


@pytest.mark.parametrize("kind", ["dense", "switch", "discriminant", "sequence"])
def test_an_embedding_is_the_mean_of_its_own_states_whatever_the_batch(family, kind, tmp_path):
    model, sequences = language_model(family, kind), texts()
    model.save_pretrained(tmp_path)
    base = load_base_model(tmp_path)
    with torch.no_grad():
        alone = [model.base_model(torch.tensor([ids])).last_hidden_state[0].mean(0) for ids in sequences]
    expected = torch.stack(alone).numpy()
    for batch_size in (1, 4, 11):
        np.testing.assert_allclose(embed(base, sequences, batch_size=batch_size), expected, atol=2e-5)
    assert np.abs(expected[0] - expected[1]).max() > 0.01


def test_embedding_leaves_the_model_as_it_was():
    base = tiny_model("gpt2", resid_pdrop=0.5).base_model.train()
    first = embed(base, texts())
    assert base.training and np.array_equal(first, embed(base, texts()))


def test_autocast_is_close(family):
    base = language_model(family, "discriminant" if family == "gpt2" else "sequence").base_model
    exact, rounded = embed(base, texts()), embed(base, texts(), bf16=True)
    assert rounded.dtype == np.float32 and not np.array_equal(exact, rounded)
    assert np.abs(exact - rounded).mean() < 0.05


def test_routes_that_come_with_the_data_are_refused(family, tmp_path):
    model = tiny_model(family, cse_routing="given")
    model.save_pretrained(tmp_path)
    for refused in (
        lambda: load_base_model(tmp_path),
        lambda: embed(model.base_model, texts()),
        lambda: MeanPoolClassifier(model.base_model, 2),
    ):
        with pytest.raises(ValueError, match="cse_routing='given' is not allowed for tasks"):
            refused()
    tiny_model(family, cse_routing="given", cse_layers=[]).save_pretrained(tmp_path)
    assert embed(load_base_model(tmp_path), texts(2)).shape == (2, 32)


def test_a_text_without_tokens_is_refused():
    base = dense_model("gpt2").base_model
    for sequences in ([], [[5], []]):
        with pytest.raises(ValueError, match="at least one token"):
            embed(base, sequences)


def test_texts_and_pairs_are_encoded_as_the_tokenizer_does(family, tokenizer):
    encoder = TextEncoder(tokenizer, 16)
    assert encoder.text("one two") == tokenizer("one two")["input_ids"]
    if family == "bert":
        assert encoder.pair("one two", "three") == tokenizer("one two", "three")["input_ids"]
    else:
        ends = tokenizer("one two")["input_ids"], tokenizer("three")["input_ids"]
        assert encoder.pair("one two", "three") == [*ends[0], tokenizer.eos_token_id, *ends[1]]


def test_long_texts_lose_their_end_and_pairs_that_of_the_longer(family, tokenizer):
    encoder = TextEncoder(tokenizer, 16)
    assert encoder.text(WORDS * 9)[:8] == encoder.text(WORDS)[:8] and len(encoder.text(WORDS * 9)) == 16
    for first, second in ((WORDS * 9, "six ten"), ("six ten", WORDS * 9)):
        ids = encoder.pair(first, second)
        assert len(ids) == 16 and "six ten" in tokenizer.decode(ids)
    both = encoder.pair(WORDS * 9, WORDS * 9)
    assert len(both) == 16 and tokenizer.decode(both).count("one") == 2


def test_a_choice_stands_in_the_gap_and_the_text_next_to_it_is_kept(family, tokenizer):
    encoder = TextEncoder(tokenizer, 64)
    decoded = tokenizer.decode(encoder.around_gap(f"one two ({GAP}) nine", "five"), skip_special_tokens=True)
    assert "".join(decoded.split()) == "onetwo(five)nine"
    ids = encoder.around_gap(f"{'seven ' * 90}two {GAP} nine {'eight ' * 90}", "five", 24)
    decoded = tokenizer.decode(ids)
    assert len(ids) == 24 and "two five nine eight" in decoded and decoded.count("seven") > decoded.count("eight") > 1
    assert "four" in tokenizer.decode(encoder.around_gap("one two", "four"))  # no gap: behind the text
    assert len(encoder.around_gap(f"one {GAP}", "six " * 90, 24)) <= 24


def test_a_room_too_small_is_refused(family, tokenizer):
    with pytest.raises(ValueError, match="max_length=8 is not allowed"):
        TextEncoder(tokenizer, 8)


def split(rows: int, seed: int, flipped: bool = False) -> Split:
    """The sign of the first of six features tells the class; 300 times wider features tell nothing."""
    generator = np.random.default_rng(seed)
    features = generator.normal(size=(rows, 6)).astype(np.float32)
    labels = (features[:, 0] > 0).astype(np.int64)
    return Split(features * np.float32([1, 300, 300, 300, 300, 300]), 1 - labels if flipped else labels)


def test_a_probe_reads_what_is_there_to_be_read():
    probed = linear_probe(split(400, 0), split(100, 1), split(100, 2), accuracy)
    assert accuracy(probed.test, split(100, 2).labels) > 0.95
    assert accuracy(probed.validation, split(100, 1).labels) > 0.95


def test_the_penalty_is_chosen_on_validation_and_the_strongest_of_equals():
    train, test = split(200, 0), split(100, 2)
    asked = []

    def best_is(value):
        def score(told, labels):
            asked.append(len(labels))
            return value[len(asked) - 1]

        return score

    assert linear_probe(train, split(50, 1), test, best_is([0.1, 0.7, 0.7, 0.2])).c == 0.01
    assert asked == [50] * 4  # never the 100 rows of the test
    with pytest.raises(ValueError, match="grid"):
        linear_probe(train, train, test, accuracy, ())


def questions(rows: int, seed: int) -> Split:
    """The right choice has the largest first feature; what a question's choices share is far larger."""
    generator = np.random.default_rng(seed)
    features = generator.normal(size=(rows, 5, 4))
    labels = features[:, :, 0].argmax(1)
    return Split((features + 100 * generator.normal(size=(rows, 1, 4))).astype(np.float32), labels)


def test_a_scorer_tells_the_right_choice():
    probed = linear_probe(questions(300, 0), questions(50, 1), questions(100, 2), accuracy)
    assert probed.test.shape == (100,) and accuracy(probed.test, questions(100, 2).labels) > 0.9


def rows(count: int, seed: int, choices: int | None) -> Examples:
    """Texts of low tokens are class 0, of high ones class 1; the right choice is the one of high tokens."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, choices or 2, count)

    def text(high: bool) -> list[int]:
        return (generator.integers(5, 50, generator.integers(3, 9)) + 45 * high).tolist()

    made = [[text(i == label) for i in range(choices)] if choices else text(bool(label)) for label in labels]
    return Examples(made, labels)


@pytest.mark.parametrize("choices", [None, 3])
@pytest.mark.parametrize("kind", ["dense", "switch", "sequence"])
def test_fine_tuning_learns_with_every_base(family, kind, choices):
    settings = FineTuning(learning_rates=(1e-6, 5e-3), epochs=4, batch_size=8)
    splits = rows(64, 0, choices), rows(24, 1, choices), rows(40, 2, choices)
    classes = None if choices else 2
    tuned = fine_tune(lambda: language_model(family, kind).base_model, classes, *splits, accuracy, settings)
    assert tuned.learning_rate == 5e-3
    assert accuracy(tuned.test, splits[2].labels) > 0.85 and tuned.validation.shape == (24,)


def test_fine_tuning_is_the_same_again():
    settings = FineTuning(learning_rates=(1e-3,), epochs=1)
    splits = rows(32, 0, None), rows(8, 1, None), rows(64, 2, None)
    scores = []
    for noise in (1, 2):
        torch.manual_seed(noise)
        tuned = fine_tune(lambda: dense_model("bert").base_model, 2, *splits, accuracy, settings)
        scores.append(tuned.test.tolist())
    assert scores[0] == scores[1]


def test_every_base_is_tuned_on_the_same_batches_of_like_length():
    settings = FineTuning(learning_rates=(1e-3,), epochs=2, batch_size=4)
    generator = np.random.default_rng(0)
    train = Examples([[7] * n for n in generator.permutation(np.arange(1, 65))], np.arange(64) % 2)

    def batches(family: str, **dropout) -> list[list[int]]:
        """Lengths of the rows of each training batch."""
        base, seen = dense_model(family, **dropout).base_model, []

        def record(module, args, kwargs):
            if module.training:
                seen.append(kwargs["attention_mask"].sum(1).tolist())

        base.register_forward_pre_hook(record, with_kwargs=True)
        fine_tune(lambda: base, 2, train, rows(8, 1, None), rows(8, 2, None), accuracy, settings)
        return seen

    seen = batches("gpt2")
    assert seen == batches("bert", hidden_dropout_prob=0.5)
    epochs = seen[:16], seen[16:]
    assert all(sorted(sum(epoch, [])) == list(range(1, 65)) for epoch in epochs) and epochs[0] != epochs[1]
    padded, tokens = sum(max(batch) * len(batch) for batch in epochs[0]), sum(range(1, 65))
    assert padded < 1.2 * tokens  # 1.6 times in random order


def test_a_classifier_does_not_see_padding(family):
    model = MeanPoolClassifier(language_model(family, "sequence").base_model, 3).eval()
    ids = token_ids(2, 10)
    mask = torch.ones_like(ids)
    longer = torch.nn.functional.pad(ids, (0, 6), value=7), torch.nn.functional.pad(mask, (0, 6))
    with torch.no_grad():
        torch.testing.assert_close(model(ids, mask).logits, model(*longer).logits, atol=2e-5, rtol=1e-4)

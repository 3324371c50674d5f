# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""A tokenizer trained on one's own text, for work without a network and for domains of one's own."""

from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import islice, repeat

from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordPiece
from tokenizers.trainers import WordPieceTrainer
from transformers import BertTokenizer, GPT2Tokenizer, PreTrainedTokenizerFast


_END_OF_TEXT = "<|endoftext|>"
_GPT2_ALPHABET = 256
_BERT_ALPHABET = 1000
_BATCH = 1000


def train_tokenizer(texts: Iterable[str], *, kind: str, vocab_size: int) -> PreTrainedTokenizerFast:
    """Trains a tokenizer in the form of GPT-2's or of BERT's. The same texts in the same order give the same one.

    Args:
        texts: the documents, read once.
        kind: "gpt2" for byte-level BPE as a `GPT2Tokenizer`, whose `<|endoftext|>` is begin, end, unknown and padding;
            "bert" for lower-case WordPiece as a `BertTokenizer` with [PAD], [UNK], [CLS], [SEP] and [MASK]. Its
            alphabet is the 1000 most frequent characters, words with any other become [UNK].
        vocab_size: size of the vocabulary, special tokens included; less where the text has no more to merge.

    Returns:
        A tokenizer without a `model_max_length`; set it to the length that the model takes.

    Raises:
        ValueError: unknown `kind`, no text, or a `vocab_size` below special tokens and alphabet.
    """
    trainers = {"gpt2": _train_gpt2, "bert": _train_bert}
    if kind not in trainers:
        raise ValueError(f"kind={kind!r} must be one of {sorted(trainers)}.")
    if texts is None or isinstance(texts, str):
        raise ValueError(f"texts={texts!r:.40} must be an iterable of strings, one for each document.")
    texts = iter(texts)
    first = next((text for text in texts if text.strip()), None)
    if first is None:
        raise ValueError("texts holds no text to train on; it must have at least one string that is not blank.")
    return trainers[kind](_chain(first, texts), vocab_size)


def _chain(first: str, rest: Iterator[str]) -> Iterator[str]:
    yield first
    yield from rest


def _check_vocab_size(vocab_size: int, special_tokens: int, alphabet: int) -> None:
    if vocab_size < special_tokens + alphabet:
        raise ValueError(
            f"vocab_size={vocab_size} must be at least {special_tokens + alphabet}: {special_tokens} special tokens "
            f"and an alphabet of {alphabet}."
        )


def _train_gpt2(texts: Iterator[str], vocab_size: int) -> GPT2Tokenizer:
    _check_vocab_size(vocab_size, special_tokens=1, alphabet=_GPT2_ALPHABET)
    batches = iter(lambda: list(islice(texts, _BATCH)), [])
    untrained = GPT2Tokenizer(pad_token=_END_OF_TEXT)
    return untrained.train_new_from_iterator(batches, vocab_size=vocab_size, show_progress=False)


def _train_bert(texts: Iterator[str], vocab_size: int) -> BertTokenizer:
    """As `BertTokenizer().train_new_from_iterator`, which gives different vocabularies from run to run.

    `tokenizers` numbers the characters in the inside of words, and breaks ties at the rim of the alphabet, in the
    order of a randomly seeded hash map; the numbers then break ties between merges. So the alphabet is chosen here
    and handed over numbered, as special tokens of the trainer that are no special tokens of the result.
    """
    untrained = BertTokenizer()
    words = _count_words(texts, untrained.backend_tokenizer)
    initial, inner = _alphabet(words)
    special_tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    _check_vocab_size(vocab_size, len(special_tokens), len(initial) + len(inner))

    wordpiece = Tokenizer(WordPiece(unk_token="[UNK]"))
    wordpiece.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    numbered = special_tokens + initial + [f"##{character}" for character in inner]
    trainer = WordPieceTrainer(vocab_size=vocab_size, special_tokens=numbered, show_progress=False)
    repeated = (" ".join(repeat(word, count)) for word, count in sorted(words.items()))
    wordpiece.train_from_iterator(repeated, trainer=trainer)
    return BertTokenizer(vocab=wordpiece.get_vocab())


def _count_words(texts: Iterator[str], tokenizer: Tokenizer) -> Counter[str]:
    """How often each word occurs, of those that the alphabet can spell."""
    words: Counter[str] = Counter()
    for text in texts:
        normalized = tokenizer.normalizer.normalize_str(text)
        words.update(word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(normalized))
    characters: Counter[str] = Counter()
    for word, count in words.items():
        for character in word:
            characters[character] += count
    ranked = sorted(characters, key=lambda character: (-characters[character], character))
    rare = set(ranked[_BERT_ALPHABET:])
    return Counter({word: count for word, count in words.items() if rare.isdisjoint(word)})


def _alphabet(words: Counter[str]) -> tuple[list[str], list[str]]:
    """The characters that begin words, and those that stand inside them."""
    return sorted({word[0] for word in words}), sorted({character for word in words for character in word[1:]})

# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""Promises of `train_tokenizer`."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer, BertTokenizer, GPT2Tokenizer

from modeling_cse.data import train_tokenizer


KINDS = {"gpt2": GPT2Tokenizer, "bert": BertTokenizer}
WORDS = [
    f"{a}{b}{c}" for a in ("re", "un", "over") for b in ("do", "lock", "write") for c in ("ing", "er", "s", "able")
]


def make_texts(count=400):
    generator = random.Random(0)
    return [" ".join(generator.choices(WORDS, k=20)).capitalize() + "." for _ in range(count)]


@pytest.mark.parametrize("kind", KINDS)
def test_form_and_special_tokens(kind):
    tokenizer = train_tokenizer(iter(make_texts()), kind=kind, vocab_size=300)
    assert type(tokenizer) is KINDS[kind]
    assert len(tokenizer) <= 300
    if kind == "gpt2":
        assert tokenizer.eos_token == tokenizer.bos_token == tokenizer.pad_token == "<|endoftext|>"
        assert tokenizer.decode(tokenizer("Undoing ü 中.")["input_ids"]) == "Undoing ü 中."
    else:
        tokens = [tokenizer.pad_token, tokenizer.unk_token, tokenizer.cls_token, tokenizer.sep_token]
        assert tokens == ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
        assert tokenizer.convert_tokens_to_ids([*tokens, "[MASK]"]) == [0, 1, 2, 3, 4]
        assert tokenizer.decode(tokenizer("Undoing it.")["input_ids"]).startswith("[CLS] undoing")
        assert set(tokenizer.all_special_tokens) == {"[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"}


def test_learns_whole_words():
    for kind in KINDS:
        tokenizer = train_tokenizer(make_texts(), kind=kind, vocab_size=600)
        assert len(tokenizer(" overlocking", add_special_tokens=False)["input_ids"]) == 1


TRAIN = """
import json, sys
from modeling_cse.data import train_tokenizer
texts = json.load(sys.stdin)
for kind in ("gpt2", "bert"):
    print(train_tokenizer(texts, kind=kind, vocab_size=290).backend_tokenizer.to_str())
"""


def test_same_texts_give_the_same_tokenizer_in_another_process():
    # More characters than the alphabet takes, all equally frequent, and many ties between merges.
    generator = random.Random(0)
    characters = "abcdefghijklmnop"
    texts = ["".join(generator.choices(characters + " ", k=200)) for _ in range(50)]
    here = [train_tokenizer(texts, kind=kind, vocab_size=290).backend_tokenizer.to_str() for kind in KINDS]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    run = subprocess.run(
        [sys.executable, "-c", TRAIN],
        check=False,
        input=json.dumps(texts),
        capture_output=True,
        text=True,
        env=environment,
    )
    assert run.stdout.splitlines() == here, run.stderr


def test_rare_characters_beyond_the_alphabet_are_unknown_and_ties_are_settled():
    rare = [chr(code) for code in range(0x1200, 0x1700) if chr(code).isalpha()]
    assert len(rare) > 1000
    texts = [*rare, "common words common words"] * 2
    first, again = (train_tokenizer(texts, kind="bert", vocab_size=1100) for _ in range(2))
    assert first.get_vocab() == again.get_vocab()
    assert first.tokenize("common") == ["common"]
    assert first.tokenize(rare[-1]) == ["[UNK]"]


@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_loaded_is_identical(tmp_path, kind):
    tokenizer = train_tokenizer(make_texts(), kind=kind, vocab_size=300)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert type(loaded) is type(tokenizer)
    assert loaded.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()
    assert loaded.special_tokens_map == tokenizer.special_tokens_map
    text = make_texts(1)[0] + " Unseen-words, 42!"
    assert loaded(text) == tokenizer(text)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "gpt2", "vocab_size": 256}, "vocab_size=256 must be at least 257: 1 special tokens"),
        ({"kind": "bert", "vocab_size": 20}, r"vocab_size=20 must be at least \d+: 5 special tokens and an alphabet"),
        ({"kind": "t5", "vocab_size": 999}, r"kind='t5' must be one of \['bert', 'gpt2'\]"),
        ({"kind": "gpt2", "vocab_size": 999, "texts": []}, "texts holds no text"),
        ({"kind": "bert", "vocab_size": 999, "texts": ["", " "]}, "texts holds no text"),
        (
            {"kind": "bert", "vocab_size": 999, "texts": "one string"},
            "texts='one string' must be an iterable of strings",
        ),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    arguments = {"texts": make_texts(5), **arguments}
    with pytest.raises(ValueError, match=message):
        train_tokenizer(arguments.pop("texts"), **arguments)

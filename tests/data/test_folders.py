# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""Promises of folders of text: a file is a document, a subfolder a domain, and what has changed is read again."""

import pytest

from modeling_cse.data import load_corpus
from modeling_cse.data.folders import undecodable
from modeling_cse.runs.extract import digest


@pytest.fixture
def folder(tmp_path):
    texts = {"law/a.txt": "first\n\nparagraphs", "law/deep/b.txt": "second"}
    texts |= {"medicine/c.txt": "third", "d.txt": "last"}
    for name, text in texts.items():
        path = tmp_path / "texts" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    (tmp_path / "texts" / "notes.md").write_text("not read")
    return tmp_path / "texts"


def load(folder, tmp_path, **options):
    return load_corpus(train_file=folder, validation_file=folder, cache_dir=tmp_path / "cache", **options)["train"]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_file_is_a_document_and_a_subfolder_its_domain(folder, tmp_path, streaming):
    rows = list(load(folder, tmp_path, domain_column="domain", streaming=streaming))
    expected = [("texts", "last"), ("law", "first\n\nparagraphs"), ("law", "second"), ("medicine", "third")]
    assert [(row["domain"], row["text"]) for row in rows] == expected


def test_several_folders_follow_each_other(folder, tmp_path):
    rows = list(load([folder / "medicine", folder / "law"], tmp_path))
    assert [(row["domain"], row["text"]) for row in rows][0] == ("medicine", "third") and len(rows) == 3


def test_what_has_changed_is_read_again_and_told(folder, tmp_path):
    before = digest([str(folder)])
    assert digest([str(folder)]) == before and load(folder, tmp_path)["text"][0] == "last"
    (folder / "d.txt").write_text("new!")
    assert load(folder, tmp_path)["text"][0] == "new!" and digest([str(folder)]) != before


def test_what_cannot_be_read_is_named(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty' is a folder without a .txt file"):
        load(tmp_path / "empty", tmp_path)
    with pytest.raises(ValueError, match="mixes folders and files"):
        load([folder, folder / "d.txt"], tmp_path)
    (folder / "d.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="d.txt' is no UTF-8 text"):
        load(folder, tmp_path)


@pytest.mark.parametrize("before", [0, 5, (1 << 20) - 1, (1 << 20) + 3])
def test_the_first_bad_byte_is_found_wherever_a_file_is_cut(tmp_path, before):
    good, bad, short = (str(tmp_path / name) for name in ("good", "bad", "short"))
    for path, end in ((good, "é".encode()), (bad, b"\xe9 x"), (short, b"\xc3")):
        with open(path, "wb") as file:
            file.write(b"a" * before + end)
    assert undecodable([good]) is None
    for path in (bad, short):
        assert undecodable([good, path]).startswith(f"{path!r} is no UTF-8 text: ")
        assert undecodable([good, path]).endswith(f" in position {before}")

# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""Folders of plain text: a file is a document, and the folder it lies in may name its domain."""

import codecs
import gzip
import hashlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from datasets import Dataset, IterableDataset
from datasets.exceptions import DatasetGenerationError


SUFFIX = ".txt"


def expand(paths: Iterable[str | os.PathLike]) -> list[Path]:
    """Files as they are, and in place of a folder the text files in it and below, in order.

    Raises:
        ValueError: a folder without one.
    """
    files: list[Path] = []
    for path in map(Path, paths):
        inside = sorted(file for file in path.rglob(f"*{SUFFIX}") if file.is_file()) if path.is_dir() else [path]
        if not inside:
            raise ValueError(f"{str(path)!r} is a folder without a {SUFFIX} file: name files of other formats.")
        files += inside
    return files


def digest_of(files: Iterable[str | os.PathLike]) -> str:
    """A short number for the content of files."""
    digest = hashlib.blake2b(digest_size=8)
    for file in files:
        with open(file, "rb") as handle:
            while chunk := handle.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()


def undecodable(files: Iterable[str]) -> str | None:
    """The first of the files, .gz among them, that is no UTF-8 text, and where in it, in words; None if all are."""
    for file in files:
        decoder, read, chunk = codecs.getincrementaldecoder("utf-8")(), 0, b"-"
        with gzip.open(file) if file.endswith(".gz") else open(file, "rb") as handle:
            while chunk:
                begun = len(decoder.getstate()[0])  # bytes of a character that the last chunk ended within
                chunk = handle.read(1 << 20)
                try:
                    decoder.decode(chunk, final=not chunk)
                except UnicodeDecodeError as error:
                    return f"{file!r} is no UTF-8 text: {error.reason} in position {read - begun + error.start}"
                read += len(chunk)
    return None


def load_folders(argument: str, folders: list[str], cache_dir: str | os.PathLike | None, streaming: bool):
    """
    The text files of folders, a row each: `text`, and as `domain` the folder's first subfolder on the way to the file
    (of a file that lies in the folder itself the folder's name).

    Args:
        argument: what the folders were passed as, for errors.
        streaming: read lazily, as an `IterableDataset`.

    Raises:
        ValueError: a folder without a text file, or a file that is no UTF-8.
    """
    rows = [(str(file), _domain(file, Path(folder))) for folder in folders for file in expand([folder])]
    files, domains = map(list, zip(*rows, strict=True))
    if streaming:
        return IterableDataset.from_generator(_read, gen_kwargs={"files": files, "domains": domains})
    # `datasets` knows what it has converted by these arguments, so that the content must be among them.
    content = {"files": files, "domains": domains, "digest": digest_of(files)}
    try:
        return Dataset.from_generator(_read, gen_kwargs=content, cache_dir=cache_dir)
    except DatasetGenerationError as error:
        raise ValueError(f"{argument}={folders}: {error.__cause__ or error}") from error


def _domain(file: Path, folder: Path) -> str:
    parts = file.relative_to(folder).parts
    return parts[0] if len(parts) > 1 else folder.resolve().name


def _read(files: list[str], domains: list[str], digest: str = "") -> Iterator[dict[str, str]]:
    for file, domain in zip(files, domains, strict=True):
        try:
            yield {"text": Path(file).read_text(encoding="utf-8"), "domain": domain}
        except UnicodeDecodeError as error:
            raise ValueError(f"{file!r} is no UTF-8 text: {error}.") from error

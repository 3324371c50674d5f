# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""A corpus: rows of text, with or without the name of their domain, in a "train" and a "validation" split."""

import hashlib
import os
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias, cast

import numpy as np
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict, load_dataset
from datasets.exceptions import DatasetGenerationError

from .folders import digest_of, load_folders, undecodable
from .packing import check_domain


PathLike = str | os.PathLike
Files = PathLike | Sequence[PathLike]
AnyDataset: TypeAlias = Dataset | IterableDataset

_BUILDERS = {".txt": "text", ".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
# Parquet is compressed inside already, and its footer cannot be found within a gzip stream.
_EXTENSIONS = [*_BUILDERS, *(f"{extension}.gz" for extension in _BUILDERS if extension != ".parquet")]
_PEEKED_ROWS = 100


def load_corpus(
    *,
    dataset_name: str | None = None,
    dataset_config_name: str | None = None,
    train_file: Files | None = None,
    validation_file: Files | None = None,
    validation_split_percentage: float = 5,
    text_column: str = "text",
    domain_column: str | None = None,
    streaming: bool = False,
    max_train_samples: int | None = None,
    max_eval_samples: int | None = None,
    cache_dir: PathLike | None = None,
    token: str | bool | None = None,
    trust_remote_code: bool = False,
    seed: int = 0,
) -> DatasetDict | IterableDatasetDict:
    """Loads documents from local files or from the Hub. Rows without text are left out.

    Where the source has no validation split, one is taken from the training documents. In memory it is a seeded
    sample of `validation_split_percentage` per cent of *every* domain, and at least one document of every domain that
    has two. A stream cannot be sampled so: there a hash of the text decides for each document, hence the share is
    met on average, and the two splits stay disjoint however the stream is sharded over workers.

    Args:
        dataset_name: dataset on the Hub, or a local dataset directory. Either this or `train_file`.
        dataset_config_name: configuration of `dataset_name`.
        train_file: one path or several of one format: .txt (a line is a document), .json, .jsonl, .csv, each also
            with .gz, or .parquet. Or folders: each .txt file in and below is a document there, and the first
            subfolder on the way to it its `domain`.
        validation_file: as `train_file`, for the validation split; only together with `train_file`.
        validation_split_percentage: per cent of the documents for validation where the source has no such split.
        text_column: column with the text.
        domain_column: column with the name of the domain, if there is one.
        streaming: read lazily; the splits are then `IterableDataset`s.
        max_train_samples: keep this many training documents: a seeded sample, of a stream the first ones.
        max_eval_samples: the same for the validation split.
        cache_dir: where `datasets` keeps what it has converted.
        token: access token for the Hub.
        trust_remote_code: handed to `datasets`; recent versions no longer run loading scripts and say so.
        seed: seed of the validation split and of the samples.

    Returns:
        The splits "train" and "validation", with all columns of the source.

    Raises:
        ValueError: no source or two; a file that is missing, of an unknown format, or unreadable; no "train" split;
            no such column; a text that is no string, a domain that is a list or mapping; no text at all; too few
            documents to split.
    """
    _check_source(dataset_name, train_file, validation_file)
    if not 0 < validation_split_percentage < 100:
        raise ValueError(
            f"validation_split_percentage={validation_split_percentage!r} must lie between 0 and 100, both excluded."
        )
    for name, value in (("max_train_samples", max_train_samples), ("max_eval_samples", max_eval_samples)):
        if value is not None and value < 1:
            raise ValueError(f"{name}={value!r} must be at least 1, or None for all documents.")

    if dataset_name is not None:
        options: dict[str, Any] = {"trust_remote_code": True} if trust_remote_code else {}
        options |= {"cache_dir": cache_dir, "token": token, "streaming": streaming}
        splits = _load_named(dataset_name, dataset_config_name, options)
    else:
        splits = {"train": _load_files("train_file", cast(Files, train_file), cache_dir, streaming)}
        if validation_file is not None:
            splits["validation"] = _load_files("validation_file", validation_file, cache_dir, streaming)

    try:
        splits = {name: _keep_text(split, name, text_column, domain_column) for name, split in splits.items()}
        if "validation" not in splits:
            if streaming:
                splits = _split_stream(splits["train"], text_column, validation_split_percentage, seed)
            else:
                splits = _split_documents(splits["train"], domain_column, validation_split_percentage, seed)
    except UnicodeDecodeError as error:  # the builder of JSON does not look at its texts
        for argument, files in (("train_file", train_file), ("validation_file", validation_file)):
            if files is not None and (found := undecodable(_paths(files))):
                raise ValueError(f"{argument}: {found}.") from error
        raise
    splits["train"] = _limit(splits["train"], max_train_samples, seed)
    splits["validation"] = _limit(splits["validation"], max_eval_samples, seed)
    return IterableDatasetDict(splits) if streaming else DatasetDict(splits)


def _check_source(dataset_name: str | None, train_file: Files | None, validation_file: Files | None) -> None:
    if dataset_name is None and train_file is None:
        hint = f" validation_file={validation_file!r} alone is not enough." if validation_file is not None else ""
        raise ValueError(f"dataset_name=None and train_file=None: one of the two must be given.{hint}")
    if dataset_name is not None and (train_file is not None or validation_file is not None):
        raise ValueError(
            f"dataset_name={dataset_name!r} cannot be combined with train_file={train_file!r} or "
            f"validation_file={validation_file!r}: give either a dataset or files."
        )


def _load_named(dataset_name: str, config_name: str | None, options: dict) -> dict[str, AnyDataset]:
    loaded = load_dataset(dataset_name, config_name, **options)
    if "train" not in loaded:
        raise ValueError(f'dataset_name={dataset_name!r} has no "train" split; it has {sorted(loaded)}.')
    return {name: loaded[name] for name in ("train", "validation") if name in loaded}


def _load_files(argument: str, files: Files, cache_dir: PathLike | None, streaming: bool) -> AnyDataset:
    paths = _paths(files)
    for path in paths:
        if not (Path(path).is_file() or Path(path).is_dir()):
            raise ValueError(f"{argument}={path!r} is not an existing file or folder.")
    folders = [path for path in paths if Path(path).is_dir()]
    if folders:
        if folders != paths:
            raise ValueError(f"{argument}={paths} mixes folders and files: name one kind.")
        return load_folders(argument, folders, cache_dir, streaming)
    builder = _builder_of(argument, paths)
    # `datasets` knows a local file by its path and time of change. A copied or unpacked file may keep both and hold
    # other text, so that the content goes into the name under which the conversion is cached.
    name = None if streaming else f"default-{digest_of(paths)}"
    options = {"data_files": {"train": paths}, "split": "train", "cache_dir": cache_dir, "streaming": streaming}
    try:
        dataset = load_dataset(builder, name, **options)
        next(iter(dataset), None)  # a stream is not read, and does not fail, before its first row
    except (DatasetGenerationError, StopIteration, ValueError) as error:
        # The builders fail in many ways on an empty or broken file; bad JSON and bad Parquet are ValueErrors too.
        cause = error.__cause__ or error
        if isinstance(cause, UnicodeDecodeError):  # it holds all the text that was read with the bad byte
            raise ValueError(f"{argument}: {undecodable(paths) or cause.reason}.") from error
        raise ValueError(f"{argument}={paths} holds no rows readable as {builder}: {cause!r}.") from error
    return dataset


def _paths(files: Files) -> list[str]:
    return [str(path) for path in ([files] if isinstance(files, (str, os.PathLike)) else files)]


def _builder_of(argument: str, paths: list[str]) -> str:
    if not paths:
        raise ValueError(f"{argument}=[] names no file.")
    extensions = set()
    for path in paths:
        suffixes = Path(path).suffixes
        extension = "".join(suffixes[-2:] if suffixes[-1:] == [".gz"] else suffixes[-1:])
        if extension not in _EXTENSIONS:
            raise ValueError(f"{argument}={path!r} has the extension {extension!r}; allowed are {_EXTENSIONS}.")
        extensions.add(extension.removesuffix(".gz"))
    builders = sorted({_BUILDERS[extension] for extension in extensions})
    if len(builders) > 1:
        raise ValueError(f"{argument}={paths} mixes the formats {builders}; the files of a split must share one.")
    return builders[0]


def _keep_text(dataset: AnyDataset, split: str, text_column: str, domain_column: str | None) -> AnyDataset:
    """`dataset` without its blank rows, after a check of its columns."""
    peeked = list(islice(dataset, _PEEKED_ROWS))
    columns = dataset.column_names or sorted({column for row in peeked for column in row})
    if not peeked:
        raise ValueError(f'the "{split}" split is empty: it has no rows.')
    for argument, column in (("text_column", text_column), ("domain_column", domain_column)):
        if column is not None and column not in columns:
            raise ValueError(f'{argument}={column!r} is not a column of the "{split}" split; it has {columns}.')
    read = [text_column] if domain_column is None else [text_column, domain_column]
    kept = dataset.filter(_has_text, input_columns=read, fn_kwargs={"columns": read})
    if next(iter(kept), None) is None:
        raise ValueError(f'the "{split}" split is empty: text_column={text_column!r} holds only blank text.')
    return kept


def _has_text(text: str | None, *domain: Any, columns: list[str]) -> bool:
    """Every row comes by here: JSON may hold anything in any of them."""
    if text is not None and not isinstance(text, str):
        raise ValueError(f"text_column={columns[0]!r} must hold strings; found {type(text).__name__} {text!r}.")
    for value in domain:
        check_domain(columns[1], value)
    return text is not None and not (text == "" or text.isspace())


def _split_documents(dataset: Dataset, domain_column: str | None, percentage: float, seed: int) -> dict[str, Dataset]:
    domains = np.asarray([str(domain) for domain in dataset[domain_column]] if domain_column else [""] * len(dataset))
    generator = np.random.default_rng(seed)
    held_out = np.zeros(len(dataset), dtype=bool)
    for domain in np.unique(domains):
        rows = np.flatnonzero(domains == domain)
        count = min(max(1, round(len(rows) * percentage / 100)), len(rows) - 1)
        held_out[generator.choice(rows, size=count, replace=False)] = True
    if not held_out.any():
        raise ValueError(
            f"validation_split_percentage={percentage}: {len(dataset)} document(s) are too few to split; give "
            "validation_file, or a corpus with two documents or more in a domain."
        )
    return {"train": dataset.select(np.flatnonzero(~held_out)), "validation": dataset.select(np.flatnonzero(held_out))}


def _split_stream(
    dataset: IterableDataset, text_column: str, percentage: float, seed: int
) -> dict[str, IterableDataset]:
    splits = {}
    for name, wanted in (("train", False), ("validation", True)):
        arguments = {"wanted": wanted, "percentage": percentage, "seed": seed}
        splits[name] = dataset.filter(_is_on_side, input_columns=[text_column], fn_kwargs=arguments)
        if next(iter(splits[name]), None) is None:
            raise ValueError(
                f'validation_split_percentage={percentage} leaves the "{name}" split without documents; give '
                "validation_file, another percentage or another seed, or load without streaming."
            )
    return splits


def _is_on_side(text: str, wanted: bool, percentage: float, seed: int) -> bool:
    digest = hashlib.blake2b(f"{seed}/{text}".encode("utf-8", "surrogatepass"), digest_size=8)
    is_validation = int.from_bytes(digest.digest(), "little") < percentage / 100 * 2**64
    return is_validation == wanted


def _limit(dataset: AnyDataset, count: int | None, seed: int) -> AnyDataset:
    if count is None:
        return dataset
    if isinstance(dataset, IterableDataset):
        return dataset.take(count)
    # A sample, since a corpus is often sorted by domain and its first rows would then be all of one.
    chosen = np.random.default_rng(seed).permutation(len(dataset))[:count]
    return dataset.select(np.sort(chosen))

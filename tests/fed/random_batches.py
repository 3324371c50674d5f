# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""Random batches for every head: what is allowed in any mixture, and now and then something that is not."""

from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from tiny import EVERY_HEAD, VOCAB, labelled


LONGEST, WIDTH, CLUSTERS = 64, 32, 16
# By part of the batch: what is allowed, and what is wrong or unusual.
PARTS: dict[str, tuple[list[str], list[str]]] = {
    "input_ids": (["int64", "int32"], ["int16", "float", "negative", "vocabulary", "huge", "one dimension"]),
    "inputs_embeds": (["none", "none", "instead"], ["both", "neither", "nan", "inf", "1e30", "narrow", "half"]),
    "attention_mask": (
        ["none", "ones", "right", "left", "middle", "ragged", "empty rows", "all padding", "bool", "float", "int32"],
        ["3-D", "4-D float", "4-D bool", "long", "short", "one dimension", "one row"],
    ),
    "position_ids": (
        ["none", "none", "arange", "packed", "one row", "int32"],
        ["one dimension", "negative", "far", "long", "float"],
    ),
    "token_type_ids": (["none", "zeros", "ones"], ["far", "negative", "long"]),
    "labels": (["none", "right", "ignored"], ["far", "negative", "long", "float"]),
    "given_clusters": (
        ["rows", "tokens", "none of them", "int32"],
        ["missing", "unknown", "long", "float", "bool", "negative", "three dimensions"],
    ),
    "length": (["9", "16", "1", "2", "64"], ["0", "65", "80"]),
    "rows": (["2", "3", "1"], ["0"]),
}
# Names that an error about a part may give it.
NAMED = {part: (part,) for part in PARTS} | {
    "length": ("input_ids", "inputs_embeds", "position_ids", "sequence"),
    "rows": ("input_ids", "inputs_embeds", "batch"),
    "input_ids": ("input_ids",),
    "inputs_embeds": ("input_ids", "inputs_embeds"),
    "labels": ("labels", "batch_size", "Target size"),
}
# Heads whose outputs hold the cache.
CACHED = [("gpt2", head) for head in ("Model", "ForCausalLM", "ForSequenceClassification")]
OWNERS = [[-1, 2, 0, -1, 3], [-1, 2, 0, -1, 3], [0, 1, 2], [-1, -1], []]


class RandomBatch(NamedTuple):
    """A model (head, flags, dtype, whose clusters own what), the way it takes, and what kind of thing each part of
    the batch is."""

    family: str
    head: str
    routing: str
    combine: str
    modules: tuple[str, ...]
    dtype: torch.dtype
    owners: tuple[int, ...]
    static: bool
    training: bool
    chunked: bool  # the second half goes on from a cache of the first
    recorded: bool
    parts: dict[str, str]
    wrong: frozenset[str]
    seed: int

    def size(self) -> tuple[int, int]:
        return int(self.parts["rows"]), int(self.parts["length"])

    def flags(self) -> dict[str, Any]:
        return {"cse_routing": self.routing, "cse_combine": self.combine, "cse_modules": list(self.modules)}

    def inputs(self) -> dict[str, torch.Tensor]:
        """The batch, without the labels of routes."""
        rows, length = self.size()
        made = {
            "input_ids": self._ids(rows, length),
            "inputs_embeds": self._embeds(rows, length),
            "attention_mask": self._mask(rows, length),
            "position_ids": self._positions(rows, length),
            "token_type_ids": self._types(rows, length),
        }
        if self.parts["inputs_embeds"] not in ("none", "both"):
            made["input_ids"] = None
        made = {name: tensor for name, tensor in made.items() if tensor is not None}
        if self.head == "ForMultipleChoice":
            made = {name: torch.stack([tensor, tensor], dim=1) for name, tensor in made.items() if tensor.dim() > 1}
        return made | self._labels(rows, length)

    def _draw(self, *shape: int) -> torch.Tensor:
        """Numbers from 0 to 1, the same each time."""
        return torch.rand(shape, generator=torch.Generator().manual_seed(self.seed))

    def _ids(self, rows: int, length: int) -> torch.Tensor:
        kind = self.parts["input_ids"]
        ids = (self._draw(rows, length) * VOCAB).long()
        wrong = {"negative": -1, "vocabulary": VOCAB, "huge": 2**40}
        if kind in wrong:
            return ids.masked_fill(self._draw(rows, length) > 0.7, wrong[kind])
        if kind == "one dimension":
            return ids.flatten()
        dtypes = {"int64": torch.int64, "int32": torch.int32, "int16": torch.int16, "float": torch.float32}
        return ids.to(dtypes[kind])

    def _embeds(self, rows: int, length: int) -> torch.Tensor | None:
        kind = self.parts["inputs_embeds"]
        if kind in ("none", "neither"):
            return None
        width = WIDTH - 8 if kind == "narrow" else WIDTH
        embeds = self._draw(rows, length, width) - 0.5
        if kind in ("nan", "inf", "1e30"):
            embeds = embeds.masked_fill(self._draw(rows, length, 1) > 0.9, float(kind))
        return embeds.to(torch.float16 if kind == "half" else self.dtype)

    def _mask(self, rows: int, length: int) -> torch.Tensor | None:
        kind = self.parts["attention_mask"]
        if kind == "none":
            return None
        mask = torch.ones(rows, length, dtype=torch.long)
        places, edge = torch.arange(length), (self._draw(rows, 1) * length).long()
        if kind in ("right", "bool", "float", "int32"):
            mask = (places <= edge).long()
        elif kind == "left":
            mask = (places >= edge).long()
        elif kind == "middle":
            mask = ((places < edge // 2) | (places >= edge)).long()
        elif kind == "ragged":
            mask = (self._draw(rows, length) > 0.5).long()
        elif kind == "empty rows":
            mask[1:] = 0
        elif kind == "all padding":
            mask = torch.zeros_like(mask)
        shapes = {"3-D": (rows, length, length), "4-D float": (rows, 1, length, length)}
        shapes |= {"4-D bool": (rows, 1, length, length), "long": (rows, length + 3)}
        shapes |= {"short": (rows, length // 2), "one dimension": (length,), "one row": (1, length)}
        if kind in shapes:
            mask = torch.ones(shapes[kind], dtype=torch.long)
        if kind == "4-D float":
            return torch.zeros_like(mask, dtype=self.dtype)
        return mask.to({"bool": torch.bool, "4-D bool": torch.bool, "float": torch.float32, "int32": torch.int32}.get(
            kind, torch.int64
        ))

    def _positions(self, rows: int, length: int) -> torch.Tensor | None:
        kind = self.parts["position_ids"]
        if kind == "none":
            return None
        places = torch.arange(length + 3 if kind == "long" else length).remainder(LONGEST).expand(rows, -1)
        if kind == "packed":
            return places.remainder(max(length // 2, 1))
        if kind in ("negative", "far"):
            return places + {"negative": -1, "far": LONGEST}[kind]
        if kind in ("one row", "one dimension"):
            places = torch.arange(length).remainder(LONGEST)
            return places if kind == "one dimension" else places.unsqueeze(0)
        return places.to({"int32": torch.int32, "float": torch.float32}.get(kind, torch.int64))

    def _types(self, rows: int, length: int) -> torch.Tensor | None:
        kind = self.parts["token_type_ids"]
        if kind == "none":
            return None
        value = {"ones": 1, "far": VOCAB, "negative": -1}.get(kind, 0)
        return torch.full((rows, length + 3 if kind == "long" else length), value)

    def _labels(self, rows: int, length: int) -> dict[str, torch.Tensor]:
        """What the head calls its labels, of the right shape unless they are to be wrong."""
        kind = self.parts["labels"]
        if kind == "none":
            return {}
        example = labelled(self.family, self.head, rows=4, length=16)
        found = {}
        for name in example.keys() - {"input_ids", "attention_mask"}:
            count = rows if example[name].dim() == 1 else length
            shape = (rows,) if example[name].dim() == 1 else (rows, length)
            labels = torch.arange(count).remainder(2).expand(shape).clone()
            fills = {"ignored": -100, "far": 10**6, "negative": -7}
            labels = labels.fill_(fills[kind]) if kind in fills else labels
            labels = torch.cat([labels, labels[:1]]) if kind == "long" else labels
            found[name] = labels.float() if kind == "float" else labels
        return found

    def given_clusters(self) -> dict[str, torch.Tensor]:
        """The labels of routes. Models with other routes take no notice of them."""
        kind, (rows, length) = self.parts["given_clusters"], self.size()
        if kind == "missing":
            return {}
        rows *= 2 if self.head == "ForMultipleChoice" else 1
        shape = {"tokens": (rows, length), "long": (rows + 1,), "three dimensions": (rows, length, 1)}
        fills = {"none of them": -1, "unknown": CLUSTERS + 5, "negative": -9}
        labels = (self._draw(*shape.get(kind, (rows,))) * 6).long() - 1
        labels = labels.fill_(fills[kind]) if kind in fills else labels
        dtypes = {"int32": torch.int32, "float": torch.float32, "bool": torch.bool}
        return {"given_clusters": labels.to(dtypes.get(kind, torch.int64))}


@st.composite
def random_batches(draw) -> RandomBatch:
    family, head = draw(st.sampled_from(EVERY_HEAD))
    parts = {part: draw(st.sampled_from(right)) for part, (right, _) in PARTS.items()}
    wrong = draw(st.one_of(st.just([]), st.lists(st.sampled_from(sorted(PARTS)), unique=True, min_size=1, max_size=2)))
    parts |= {part: draw(st.sampled_from(PARTS[part][1])) for part in wrong}
    return RandomBatch(
        family,
        head,
        routing=draw(st.sampled_from(["discriminant", "sequence", "given"])),
        combine=draw(st.sampled_from(["replace", "add"])),
        modules=draw(st.sampled_from([("ffn",), ("attention",), ("attention", "ffn")])),
        dtype=draw(st.sampled_from([torch.float32, torch.bfloat16])),
        owners=tuple(draw(st.sampled_from(OWNERS))),
        static=draw(st.booleans()),
        training=draw(st.booleans()),
        chunked=(family, head) in CACHED and draw(st.sampled_from([False, False, False, True])),
        recorded=draw(st.booleans()),
        parts=parts,
        wrong=frozenset(wrong),
        seed=draw(st.integers(0, 99)),
    )

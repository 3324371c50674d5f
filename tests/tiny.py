# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""Models small enough for every test, with experts that really matter, and batches to feed them."""

import pytest
import torch
from packaging.version import Version
from transformers.models.bert import modeling_bert
from transformers.models.gpt2 import modeling_gpt2

import modeling_cse
from modeling_cse import CSEBertConfig, CSEGPT2Config
from modeling_cse.dispatch_cse import Site


# Older versions break the graph where a model asks whether autocast is on.
ONE_GRAPH = pytest.mark.skipif(Version(torch.__version__) < Version("2.13"), reason="one graph needs torch 2.13")
VOCAB = 99
CONFIGS = {"gpt2": CSEGPT2Config, "bert": CSEBertConfig}
SIZES = {
    "gpt2": {"vocab_size": VOCAB, "n_positions": 64, "n_embd": 32, "n_layer": 3, "n_head": 4}
    | {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    | {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "initializer_range": 0.1},
    "bert": {"vocab_size": VOCAB, "max_position_embeddings": 64, "hidden_size": 32, "num_hidden_layers": 3}
    | {"num_attention_heads": 4, "intermediate_size": 64, "hidden_dropout_prob": 0.0}
    | {"attention_probs_dropout_prob": 0.0, "pad_token_id": 0, "initializer_range": 0.1},
}
# Short name of a head, as the Auto classes call it: the class with experts, the stock class.
HEADS = {
    "gpt2": {
        "Model": "GPT2Model",
        "ForCausalLM": "GPT2LMHeadModel",
        "ForSequenceClassification": "GPT2ForSequenceClassification",
        "ForTokenClassification": "GPT2ForTokenClassification",
        "ForQuestionAnswering": "GPT2ForQuestionAnswering",
    },
    "bert": {
        "Model": "BertModel",
        "ForMaskedLM": "BertForMaskedLM",
        "ForPreTraining": "BertForPreTraining",
        "ForNextSentencePrediction": "BertForNextSentencePrediction",
        "ForSequenceClassification": "BertForSequenceClassification",
        "ForMultipleChoice": "BertForMultipleChoice",
        "ForTokenClassification": "BertForTokenClassification",
        "ForQuestionAnswering": "BertForQuestionAnswering",
    },
}
EVERY_HEAD = [(family, head) for family, heads in HEADS.items() for head in heads]
LANGUAGE_HEAD = {"gpt2": "ForCausalLM", "bert": "ForMaskedLM"}
LANGUAGE_HEADS = list(LANGUAGE_HEAD.items())
# Two common clusters, three that own an expert; one slot of four stays free.
OWNERS = [-1, 2, 0, -1, 3]


# What most tests look at, whatever is the default of a family.
FLAGS = {
    "gpt2": {"cse_combine": "replace", "cse_routing": "discriminant"},
    "bert": {"cse_combine": "replace", "cse_routing": "sequence"},
}
# What both do by default.
EVIDENCE = {"cse_combine": "add", "cse_routing": "evidence"}


def tiny_config(family: str, **flags):
    """A configuration of three layers, experts in the last two."""
    return CONFIGS[family](**{**SIZES[family], **FLAGS[family], **flags})


def model_class(family: str, head: str):
    return getattr(modeling_cse, f"CSE{'GPT2' if family == 'gpt2' else 'Bert'}{head}")


def tiny_model(family: str, head: str | None = None, seed: int = 0, **flags):
    """A model of the family in evaluation mode; without `head`, the one that models language."""
    torch.manual_seed(seed)
    return model_class(family, head or LANGUAGE_HEAD[family])(tiny_config(family, **flags)).eval()


def dense_model(family: str, head: str | None = None, seed: int = 0, **fields):
    """The stock model of the same sizes."""
    module = modeling_gpt2 if family == "gpt2" else modeling_bert
    stock = getattr(module, HEADS[family][head or LANGUAGE_HEAD[family]])
    torch.manual_seed(seed)
    return stock(stock.config_class(**{**SIZES[family], **fields})).eval()


def routed_modules(model) -> dict:
    return model.base_model.routed_modules()


def routed_module(model, layer: int, module: str = "ffn"):
    return routed_modules(model)[Site(layer, module)]


def router_state(config, seed: int, owners: list[int] | None = None) -> dict[str, torch.Tensor]:
    """Clusters far from each other, in directions at right angles and at one distance from the origin, so that
    neither a large row of the discriminant nor a small centroid wins everywhere."""
    owners = OWNERS if owners is None else owners
    generator = torch.Generator().manual_seed(seed)
    directions = torch.linalg.qr(torch.randn(config.hidden_size, len(owners), generator=generator)).Q.T.contiguous()
    return {
        "centroids": 2.0 * directions,
        "radii": 1.0 + 0.02 * torch.rand(len(owners), generator=generator),
        "cluster_sizes": torch.arange(len(owners)) + 5,
        "discriminant_weight": 3.0 * directions,
        "discriminant_bias": 0.1 * torch.randn(len(owners), generator=generator),
        "cluster_expert": torch.tensor(owners),
    }


@torch.no_grad()
def activate(model, seed: int = 0, owners: list[int] | None = None, noise: float = 0.2):
    """Writes clusters into all routers, some common and some with an expert, fills the experts from the base, and
    then moves them away from it, so that a wrong route shows."""
    generator = torch.Generator().manual_seed(seed)
    for site, ffn in routed_modules(model).items():
        place = site.layer + (100 if site.module == "attention" else 0)
        ffn.router.write(**router_state(model.config, seed + place, owners))
        for slot in range(ffn.experts.num_experts):
            ffn.fill_expert(slot, generator)
        for parameter in ffn.experts.parameters():
            parameter += noise * torch.randn(parameter.shape, generator=generator)
    if hasattr(model.base_model, "evidence_router"):
        clusters = len(OWNERS if owners is None else owners)
        evidence = 2.0 * torch.randn(model.config.vocab_size, clusters, generator=generator)
        model.base_model.evidence_router.write(evidence, torch.full((clusters,), 1 / clusters))
    return model


def token_ids(rows: int = 4, length: int = 16, seed: int = 0) -> torch.Tensor:
    """Random tokens, special ones left out."""
    return torch.randint(5, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def labelled(family: str, head: str, rows: int = 4, length: int = 16, seed: int = 0) -> dict[str, torch.Tensor]:
    """A batch with padding at the end of some rows, and the labels that the head wants (none for the base)."""
    ids = token_ids(rows, length, seed)
    mask = torch.ones_like(ids)
    for row in range(rows):
        mask[row, length - 2 * (row % 3) :] = 0
    ids = ids.masked_fill(mask == 0, 0)
    batch = {"input_ids": ids, "attention_mask": mask}
    classes = torch.arange(rows) % 2
    if head in ("ForCausalLM", "ForMaskedLM"):
        batch["labels"] = ids.masked_fill(mask == 0, -100)
    elif head == "ForTokenClassification":
        batch["labels"] = (ids % 2).masked_fill(mask == 0, -100)
    elif head in ("ForSequenceClassification", "ForNextSentencePrediction"):
        batch["labels"] = classes
    elif head == "ForQuestionAnswering":
        batch |= {"start_positions": classes, "end_positions": classes + 3}
    elif head == "ForPreTraining":
        batch |= {"labels": ids.masked_fill(mask == 0, -100), "next_sentence_label": classes}
    elif head == "ForMultipleChoice":
        batch = {name: value.view(rows // 2, 2, length) for name, value in batch.items()}
        batch["labels"] = classes[: rows // 2]
    return batch


def first_tensor(outputs) -> torch.Tensor:
    """The logits of a head, or the states of a base model."""
    for name in ("logits", "prediction_logits", "start_logits", "last_hidden_state"):
        if outputs.get(name) is not None:
            return outputs[name]
    raise AssertionError(f"no logits among {list(outputs)}")


def expert_ids(model, cluster_ids: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """The expert of every token, (layers, B, T), -1 for the base."""
    routers = [ffn.router for ffn in routed_modules(model).values()]
    pairs = zip(routers, cluster_ids, strict=True)
    return torch.stack([torch.where(ids >= 0, router.cluster_expert[ids], -1) for router, ids in pairs])

# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""What the routers saw, carried through heads whose stock `forward` drops what their base model recorded."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from inspect import Parameter, Signature, signature
from threading import get_ident

import torch
from transformers.modeling_outputs import CausalLMOutputWithCrossAttentions, MaskedLMOutput, ModelOutput
from transformers.models.bert.modeling_bert import BertForPreTrainingOutput


ROUTING_KEYS = ("router_logits", "cluster_ids")


@dataclass
class CSECausalLMOutput(CausalLMOutputWithCrossAttentions):
    """`router_logits`: per CSE layer and module (B * T, C) fp32, with `output_router_logits=True`; `cluster_ids`: per
    CSE layer and module (B, T) int64, with `output_cluster_ids=True`."""

    router_logits: tuple[torch.FloatTensor, ...] | None = None
    cluster_ids: tuple[torch.LongTensor, ...] | None = None


@dataclass
class CSEMaskedLMOutput(MaskedLMOutput):
    """See `CSECausalLMOutput`."""

    router_logits: tuple[torch.FloatTensor, ...] | None = None
    cluster_ids: tuple[torch.LongTensor, ...] | None = None


@dataclass
class CSEPreTrainingOutput(BertForPreTrainingOutput):
    """See `CSECausalLMOutput`."""

    router_logits: tuple[torch.FloatTensor, ...] | None = None
    cluster_ids: tuple[torch.LongTensor, ...] | None = None


def carries_routing(forward: Callable, output_class: type[ModelOutput] | None = None) -> Callable:
    """
    Wraps a head's stock `forward` so that its output has what the base model recorded of the routers.

    Args:
        forward: the stock head's `forward`; its signature stays visible to those who inspect it.
        output_class: type that declares the fields, where callers look for them in the type; otherwise they are set
            on the stock output.
    """

    @wraps(forward)
    def wrapper(self, *args, **kwargs):
        asked = [key for key in ROUTING_KEYS if kwargs.get(f"output_{key}", getattr(self.config, f"output_{key}"))]
        if not asked:
            outputs = forward(self, *args, **kwargs)
            return outputs if output_class is None or isinstance(outputs, tuple) else output_class(**outputs)
        recorded = {}
        thread = None if torch.compiler.is_compiling() else get_ident()

        def record(module, inputs, output):
            # other threads may be in the same base model, and find this hook too
            if torch.compiler.is_compiling() or get_ident() == thread:
                recorded.update({key: output[key] for key in asked})

        hook = self.base_model.register_forward_hook(record)
        try:
            outputs = forward(self, *args, **kwargs)
        finally:
            hook.remove()
        if isinstance(outputs, tuple):
            return outputs + tuple(recorded[key] for key in asked)
        if output_class is not None:
            return output_class(**outputs, **recorded)
        for key in asked:
            outputs[key] = recorded[key]
        return outputs

    wrapper.__signature__ = _with_labels(signature(forward))  # type: ignore[attr-defined]  # unknown to typeshed
    if output_class is not None:
        wrapper.__annotations__ = {**forward.__annotations__, "return": output_class}
    return wrapper


def takes_choices(forward: Callable) -> Callable:
    """Wraps the `forward` of a head whose rows (B, choices, T) the stock one flattens: `given_clusters` of rows (B,),
    choices (B, choices) or tokens (B, choices, T) are too."""
    stock = signature(forward)

    @wraps(forward)
    def wrapper(self, *args, given_clusters=None, **kwargs):
        told = {} if given_clusters is None else stock.bind(self, *args, **kwargs).arguments
        tokens = told.get("input_ids") if told.get("input_ids") is not None else told.get("inputs_embeds")
        if tokens is not None and tokens.dim() > 2:  # whatever else comes, the stock head complains of
            batch, choices = tokens.shape[:2]
            if given_clusters.shape == (batch,):
                given_clusters = given_clusters.repeat_interleave(choices)
            elif given_clusters.shape[:2] == (batch, choices):
                given_clusters = given_clusters.flatten(0, 1)
        return forward(self, *args, given_clusters=given_clusters, **kwargs)

    wrapper.__signature__ = stock  # type: ignore[attr-defined]  # unknown to typeshed
    return wrapper


def _with_labels(stock: Signature) -> Signature:
    """`given_clusters` reaches the base model among the keyword arguments; `Trainer` keeps a column of the data set
    only if the signature names it."""
    parameters = list(stock.parameters.values())
    place = next(i for i, p in enumerate(parameters) if p.kind is Parameter.VAR_KEYWORD)
    parameters.insert(place, Parameter("given_clusters", Parameter.KEYWORD_ONLY, default=None))
    return stock.replace(parameters=parameters)


__all__ = [
    "CSECausalLMOutput",
    "CSEMaskedLMOutput",
    "CSEPreTrainingOutput",
    "ROUTING_KEYS",
    "carries_routing",
    "takes_choices",
]

# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""
Cluster-guided Sparse Experts for Hugging Face Transformers.

Importing the package registers its configurations, models and tokenizers with the Auto classes. What trains and
clusters is imported when it is first asked for, so that loading a model needs torch and transformers alone.
"""

from importlib import import_module
from pathlib import Path

from transformers import (
    AutoConfig,
    AutoTokenizer,
    BertTokenizer,
    GPT2Tokenizer,
)
from transformers.models.auto import modeling_auto

from . import modeling_cse_bert as _bert
from . import modeling_cse_gpt2 as _gpt2
from .configuration_cse import BERT_AUTO_MAP, GPT2_AUTO_MAP, CSEBertConfig, CSEGPT2Config
from .modeling_cse_bert import (
    CSEBertForMaskedLM,
    CSEBertForMultipleChoice,
    CSEBertForNextSentencePrediction,
    CSEBertForPreTraining,
    CSEBertForQuestionAnswering,
    CSEBertForSequenceClassification,
    CSEBertForTokenClassification,
    CSEBertModel,
)
from .modeling_cse_gpt2 import (
    CSEGPT2ForCausalLM,
    CSEGPT2ForQuestionAnswering,
    CSEGPT2ForSequenceClassification,
    CSEGPT2ForTokenClassification,
    CSEGPT2Model,
)


__version__ = "0.1.0"


def _shipped(name: str) -> Path:
    """A folder that comes with the package: inside it where it is installed, beside it in a checkout."""
    inside = Path(__file__).resolve().parent / name
    return inside if inside.is_dir() else inside.parents[1] / name


# Named configurations and recipes; templates of model cards.
CONFIGURATION = _shipped("configuration")
HUB_CARDS = _shipped("hub_cards")

_LAZY = {
    "ClusterExpertsCallback": ".training",
    "ModelCardCallback": ".hub",
    "check_checkpoint": ".training",
    "describe_experts": ".hub",
    "fit_experts": ".training",
    "from_dense": ".training",
    "last_complete_checkpoint": ".training",
}


def _register() -> None:
    families = (
        (CSEGPT2Config, GPT2_AUTO_MAP, _gpt2, GPT2Tokenizer),
        (CSEBertConfig, BERT_AUTO_MAP, _bert, BertTokenizer),
    )
    for config_class, auto_map, module, tokenizer_class in families:
        AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
        AutoTokenizer.register(config_class, tokenizer_class, exist_ok=True)
        for auto_class, name in auto_map.items():
            if auto_class != "AutoConfig":
                model_class = getattr(module, name.split(".")[-1])
                auto = getattr(modeling_auto, auto_class)
                auto.register(config_class, model_class, exist_ok=True)
                # Label smoothing, serving and the harness look a model up by name in upstream's own tables, which
                # `register` leaves alone: the Trainer would smooth against labels that are not shifted.
                auto._model_mapping._model_mapping[config_class.model_type] = model_class.__name__


_register()


def __getattr__(name: str):
    if name in _LAZY:
        return getattr(import_module(_LAZY[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})


__all__ = [
    "CONFIGURATION",
    "HUB_CARDS",
    "CSEBertConfig",
    "CSEBertForMaskedLM",
    "CSEBertForMultipleChoice",
    "CSEBertForNextSentencePrediction",
    "CSEBertForPreTraining",
    "CSEBertForQuestionAnswering",
    "CSEBertForSequenceClassification",
    "CSEBertForTokenClassification",
    "CSEBertModel",
    "CSEGPT2Config",
    "CSEGPT2ForCausalLM",
    "CSEGPT2ForQuestionAnswering",
    "CSEGPT2ForSequenceClassification",
    "CSEGPT2ForTokenClassification",
    "CSEGPT2Model",
    "ClusterExpertsCallback",
    "ModelCardCallback",
    "check_checkpoint",
    "describe_experts",
    "fit_experts",
    "from_dense",
    "last_complete_checkpoint",
]

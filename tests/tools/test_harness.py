# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""Promises under the lm-evaluation-harness: its log-likelihoods are the model's own, whatever stands in the batch."""

import json

import pytest
import torch
from tiny import SIZES, activate, model_class
from transformers import AutoTokenizer

from modeling_cse import CSEGPT2Config
from modeling_cse.data import train_tokenizer


pytest.importorskip("lm_eval")

ROUTINGS = ("discriminant", "sequence", "evidence")
QUESTIONS = [
    {"text": "the court of law", "right": " heard the case", "wrong": " rained"},
    {"text": "the patient was", "right": " given a drug", "wrong": " a hill"},
    {"text": "snow", "right": " fell over the hills in the north", "wrong": " court"},
    {"text": "a long case about rain in the north and a court of law", "right": " ended", "wrong": " the the the"},
]
TASK = """
task: tiny_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_choice: "{{{{[right, wrong]}}}}"
doc_to_target: 0
target_delimiter: ""
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model with experts for each routing, its tokenizer, and a task with data of its own."""
    root = tmp_path_factory.mktemp("harness")
    texts = [" ".join(question.values()) for question in QUESTIONS]
    tokenizer = train_tokenizer(texts * 3, kind="gpt2", vocab_size=300)
    ids = {name: tokenizer.eos_token_id for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    torch.manual_seed(0)
    for routing in ROUTINGS:
        config = CSEGPT2Config(**{**SIZES["gpt2"], **ids, "vocab_size": len(tokenizer), "cse_routing": routing})
        model = activate(model_class("gpt2", "ForCausalLM")(config).eval())
        model.save_pretrained(root / routing)
        tokenizer.save_pretrained(root / routing)
    (root / "tasks").mkdir()
    data = root / "questions.jsonl"
    data.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    (root / "tasks" / "tiny.yaml").write_text(TASK.format(data=data))
    return root


def loglikelihoods(folder, routing: str) -> list[list[float]]:
    """Of both answers to each question, one forward pass each."""
    tokenizer = AutoTokenizer.from_pretrained(folder / routing)
    model = model_class("gpt2", "ForCausalLM").from_pretrained(folder / routing).eval()
    found = []
    for question in QUESTIONS:
        found.append([])
        for answer in ("right", "wrong"):
            asked = len(tokenizer(question["text"])["input_ids"])
            ids = torch.tensor([tokenizer(question["text"] + question[answer])["input_ids"]])
            with torch.no_grad():
                scores = model(ids).logits.log_softmax(-1)[0, :-1]
            found[-1].append(scores.gather(-1, ids[0, 1:, None])[asked - 1 :].sum().item())
    return found


@pytest.mark.parametrize("name", ["cse", "hf"])
@pytest.mark.parametrize("routing", ["discriminant", "evidence"])
def test_loglikelihoods_are_those_of_the_model(folder, name, routing):
    """Also through the harness's own `hf`, which knows the model once this package is imported."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    import modeling_cse.evaluation.harness  # noqa: F401  registers `cse`

    results = simple_evaluate(
        model=name,
        model_args={"pretrained": str(folder / routing), "dtype": "float32"},
        tasks=["tiny_choice"],
        task_manager=TaskManager(include_path=str(folder / "tasks"), include_defaults=False),
        batch_size=3,
        device="cpu",
        bootstrap_iters=0,
    )
    wanted = loglikelihoods(folder, routing)
    samples = sorted(results["samples"]["tiny_choice"], key=lambda sample: sample["doc_id"])
    found = [[float(answer[0][0]) for answer in sample["resps"]] for sample in samples]
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-4)
    right = sum(first > second for first, second in wanted) / len(wanted)
    assert results["results"]["tiny_choice"]["acc,none"] == right


def test_routes_over_the_answer_are_refused(folder):
    from modeling_cse.evaluation.harness import CSEHarnessLM

    with pytest.raises(ValueError, match="cse_routing='sequence' is not allowed in the harness"):
        CSEHarnessLM(pretrained=str(folder / "sequence"), device="cpu")

# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""Promises of the card that a Trainer makes: results, recipe and experts of its run, not the Trainer's draft."""

import math
from types import SimpleNamespace

import pytest
from hub_tiny import texts, tokenizer
from huggingface_hub import ModelCard
from tiny import EVIDENCE, tiny_model
from tiny_runs import make_trainer, settings

from modeling_cse import ClusterExpertsCallback, ModelCardCallback


def run(folder, first: bool = False, train: bool = True, evaluated=None, **options):
    """A trained tiny model with a card; `first`: the card's callback is attached before that of the clusters."""
    data = [{"input_ids": row["input_ids"], "labels": row["input_ids"]} for row in texts(seed=0)]
    clusters = ClusterExpertsCallback(**settings(algorithm="text", sample_size=48))
    trainer = make_trainer(folder, model=tiny_model("gpt2", **EVIDENCE), data=data)
    cards = ModelCardCallback(**options)
    for callback in (cards, clusters) if first else (clusters, cards):
        callback.attach(trainer)
    trainer.eval_dataset = evaluated or trainer.eval_dataset
    if train:
        trainer.train()
    return trainer, cards


def test_a_run_ends_with_its_card(tmp_path):
    trainer, _ = run(tmp_path / "my-run", texts=texts(), tokenizer=tokenizer(), license="mit", language=["en", "de"])
    card = ModelCard.load(tmp_path / "my-run" / "README.md")
    assert card.data.license == "mit" and card.data.language == ["en", "de"]
    assert "## The experts" in card.text and "medicine 100%" in card.text and "none (common text)" in card.text
    for row in (r"learning\_rate | 0.005", r"clusters.warmup | 4", r"clusters.num\_clusters | 3", "steps taken | 10"):
        assert f"| {row} |" in card.text
    assert "| hardware | 1 x CPU" in card.text and "| training time |" in card.text
    assert "## Results" not in card.text, "nothing was evaluated"


def test_a_resumed_run_does_not_tell_a_part_of_its_time_for_the_whole(tmp_path):
    trainer, cards = run(tmp_path)
    cards.on_train_begin(trainer.args, trainer.state, trainer.control)  # with the steps of another process
    assert "| training time |" not in trainer.create_model_card().text


def test_it_has_the_results_of_the_last_evaluation_and_stands_for_the_trainers_draft(tmp_path):
    evaluated = {"law": [{"input_ids": row["input_ids"], "labels": row["input_ids"]} for row in texts(8)]}
    trainer, _ = run(tmp_path, evaluated=evaluated, results={"dense": {"law": 100.0}}, base_model="org/base")
    trainer.evaluate()
    found = trainer.evaluate()
    trainer.create_model_card(
        tags="mine", model_name="My model", dataset_tags="org/text", dataset="Texts", dataset_args="small"
    )
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.eval_results[0].metric_value == pytest.approx(math.exp(found["eval_law_loss"]))
    assert "| law | " in card.text and "| 100.00 |" in card.text and "`eval_loss`, a mean over batches" in card.text
    assert "# My model" in card.text and "grown from org/base" in card.text and "| Texts | small |" in card.text
    assert card.data.datasets == ["org/text"] and card.data.base_model == "org/base"
    assert "mine" in card.data.tags and "cse_gpt2" in card.data.tags
    assert "generated automatically" not in card.text, "the Trainer's own draft"
    trainer.create_model_card(finetuned_from="org/other", license="mit", language="fr")
    again = ModelCard.load(tmp_path / "README.md").data
    assert (again.base_model, again.license, again.language) == ("org/other", "mit", "fr")


def test_exact_perplexities_go_before_those_of_mean_losses():
    cards = ModelCardCallback(results={"dense": {"law": 2.0}})
    args = SimpleNamespace(load_best_model_at_end=False)
    cards.trainer = SimpleNamespace(state=SimpleNamespace(), model=tiny_model("gpt2", "ForCausalLM"), args=args)
    cards.trainer.state.log_history = [
        {"eval_loss": 9.0, "loss": 3.0},
        {"eval_law_loss": 1.0, "eval_law_perplexity": 3.0, "step": 4},
        {"eval_loss": 2.0},
        {"eval_far_loss": 1e4},
    ]
    assert cards._perplexities() == ({"all": math.exp(2), "law": 3.0, "far": math.inf}, False)
    cards.trainer.state.log_history = [{"eval_loss": 9.0}, {"eval_loss": 1.0, "eval_perplexity": 3.0}]
    assert cards._perplexities() == ({"all": 3.0}, True)


def test_the_results_are_those_of_the_model_that_is_left(tmp_path):
    """The Trainer goes back to its best; what is evaluated afterwards is of that one."""
    cards = ModelCardCallback()
    args = SimpleNamespace(load_best_model_at_end=True)
    log = [{"step": step, "eval_loss": 1.0 + step, "eval_perplexity": 1.0 + step} for step in (2, 4)]
    log.append({"step": 4, "train_runtime": 1.0})
    state = SimpleNamespace(best_global_step=2, log_history=log)
    cards.trainer = SimpleNamespace(state=state, model=tiny_model("gpt2", "ForCausalLM"), args=args)
    assert cards._perplexities() == ({"all": 3.0}, True)
    state.log_history.append({"step": 4, "eval_loss": 7.0, "eval_perplexity": 8.0})
    assert cards._perplexities() == ({"all": 8.0}, True)
    state.best_global_step = None
    assert cards._perplexities() == ({"all": 8.0}, True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"texts": iter(texts())}, "without a length"),
        ({"texts": []}, "dataset has no rows"),
        ({"texts": [{"body": "wab"}]}, r"rows of \['body'\]"),
        ({"texts": ["wab"]}, "rows that are str: they must be dicts"),
        ({"template": "missing.md"}, "there is no file 'missing.md'"),
        ({"tokenizer": None}, "tokenizer=None is not allowed"),
    ],
)
def test_what_a_card_cannot_be_made_of_is_refused_before_training(tmp_path, changes, message):
    options = {"texts": texts(), "tokenizer": tokenizer(), **changes}
    trainer, _ = run(tmp_path, train=False, **options)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        trainer.train()
    assert trainer.state.global_step == 0


@pytest.mark.parametrize("flags", [{"cse_layers": []}, {"cse_routing": "given"}], ids=["dense", "given"])
def test_a_model_whose_experts_texts_cannot_tell_gets_a_card_without_them(tmp_path, flags):
    trainer = make_trainer(tmp_path, model=tiny_model("gpt2", **flags))
    ModelCardCallback(texts=texts(), tokenizer=tokenizer()).attach(trainer)
    trainer.create_model_card()
    assert "## The experts" not in (tmp_path / "README.md").read_text(encoding="utf-8")


def test_the_loss_of_another_head_is_no_perplexity(tmp_path):
    cards = ModelCardCallback()
    model = tiny_model("bert", "ForSequenceClassification", num_labels=2)
    rows = [{"input_ids": row["input_ids"], "labels": number % 2} for number, row in enumerate(texts(8))]
    cards.attach(make_trainer(tmp_path, model=model, data=rows))
    cards.trainer.state.log_history = [{"eval_loss": 0.7, "eval_accuracy": 0.5}]
    card = cards.create_model_card()
    assert card.data.pipeline_tag == "text-classification" and card.data.eval_results is None
    assert "perplexity" not in card.text and "AutoModelForSequenceClassification" in card.text


def test_adapters_get_a_card_too(tmp_path):
    peft = pytest.importorskip("peft")
    model = run(tmp_path / "before")[0].model
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["c_proj"], fan_in_fan_out=True))
    rows = [{"input_ids": row["input_ids"], "labels": row["input_ids"]} for row in texts(8)]
    cards = ModelCardCallback(texts=texts(), tokenizer=tokenizer())
    cards.attach(make_trainer(tmp_path / "after", model=adapted, data=rows)).trainer.train()
    card = ModelCard.load(tmp_path / "after" / "README.md")
    assert "## The experts" in card.text and card.data.pipeline_tag == "text-generation"


def test_the_order_of_callbacks_does_not_matter(tmp_path):
    texts_of = {"texts": texts(), "tokenizer": tokenizer()}
    cards = []
    for first in (True, False):
        run(tmp_path / "same", first=first, **texts_of)
        text = (tmp_path / "same" / "README.md").read_text(encoding="utf-8")
        cards.append([line for line in text.splitlines() if "training time" not in line])
    assert cards[0] == cards[1]


def test_without_clusters_or_texts_it_says_nothing_of_experts(tmp_path):
    trainer, _ = run(tmp_path, train=False, texts=texts(), tokenizer=tokenizer())
    trainer.create_model_card()
    assert "## The experts" not in (tmp_path / "README.md").read_text(encoding="utf-8")
    run(tmp_path)
    assert "## The experts" not in (tmp_path / "README.md").read_text(encoding="utf-8")


def test_wrong_use_is_named(tmp_path):
    with pytest.raises(ValueError, match="results has the run 'cse'"):
        ModelCardCallback(results={"cse": {"law": 1.0}})
    with pytest.raises(ValueError, match="tokenizer=None is not allowed"):
        run(tmp_path, texts=texts())
    cards = ModelCardCallback()
    with pytest.raises(ValueError, match="knows no trainer"):
        make_trainer(tmp_path, callbacks=[cards]).train()

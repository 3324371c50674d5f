# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""Promises of the model card: it says what the run knows, its usage block runs, and no value can turn into markup."""

import re
import socket

import pytest
from huggingface_hub import ModelCard
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    GPT2Config,
    LlamaConfig,
    PreTrainedTokenizerFast,
)

import modeling_cse
from modeling_cse import CSEBertConfig, CSEBertForMaskedLM, CSEGPT2Config, CSEGPT2ForCausalLM
from modeling_cse.hub import cards, write_model_card


NASTY = 'x | `a` </td><script>alert(1)</script> [l](javascript:1) *b* _i_ ~~s~~ $m$ {{ 7 * 7 }}\n---\n# head\n"q" \\|'
RESULTS = {"cse": {"medical": 20.0, "general": 30.0}, "dense": {"medical": 25.0, "general": 30.0}}


class FamilyConfig(GPT2Config):
    """Stands for the package's own configuration, so that this file needs none of the models."""

    model_type = "cse_gpt2"


class MaskedFamilyConfig(BertConfig):
    model_type = "cse_bert"


def config(kind: type = FamilyConfig, **flags):
    made = kind()
    for name, value in {"cse_layers": [-2, -1], "cse_routing": "discriminant", **flags}.items():
        setattr(made, name, value)
    return made


def write(folder, *, of=None, results=RESULTS, recipe=None, data=None, **options) -> str:
    write_model_card(folder, config=of or config(), results=results, recipe=recipe or {}, data=data or {}, **options)
    return (folder / "README.md").read_text(encoding="utf-8")


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a card must not need the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def test_metadata_says_what_the_hub_wants_to_know(tmp_path):
    data = {"medical": {"dataset": "org/medicine", "sequences": 10}, "general": "mixed text"}
    said = {"base_model": "openai-community/gpt2", "license": "apache-2.0", "language": ["en", "de"]}
    write(tmp_path / "my-model", data=data, **said)
    found = ModelCard.load(tmp_path / "my-model" / "README.md").data
    assert found.library_name == "transformers" and found.pipeline_tag == "text-generation"
    assert {"cluster-guided-sparse-experts", "mixture-of-experts", "cse_gpt2"} <= set(found.tags)
    assert (found.license, found.language) == ("apache-2.0", ["en", "de"])
    assert found.datasets == ["org/medicine"] and found.base_model == "openai-community/gpt2"
    assert found.model_name == "my-model"
    results = {(entry.dataset_name, entry.dataset_type, entry.metric_value) for entry in found.eval_results}
    assert results == {("medical", "org/medicine", 20.0), ("general", "custom", 30.0)}


def test_a_card_claims_no_license_or_language_that_nobody_named(tmp_path):
    text = write(tmp_path)
    found = ModelCard.load(tmp_path / "README.md").data
    assert found.license is None and found.language is None
    assert "\nNo license is named: ask the author before you use the model.\n" in text
    assert "\nLicense: mit\n" in write(tmp_path, license="mit")


def test_the_body_shows_results_against_the_twin_flags_recipe_data_and_versions(tmp_path):
    text = write(
        tmp_path,
        results=RESULTS | {"wide": {"medical": 22.0}},
        recipe={"training": {"learning_rate": 1e-3}},
        data={"medical": {"sequences": 10}},
    )
    assert "| domain | this model | dense twin | ratio to the twin | wide |" in text
    assert "| medical | 20.00 | 25.00 | 0.800 | 22.00 |" in text
    assert "| general | 30.00 | 30.00 | 1.000 | – |" in text
    for row in (r"cse\_layers | \[-2, -1\]", r"training.learning\_rate | 0.001", "medical.sequences | 10"):
        assert f"| {row} |" in text
    for package in ("torch", "transformers", r"modeling\_cse"):
        assert re.search(rf"^\| {re.escape(package)} \| \S", text, re.MULTILINE)
    assert "Once Read is Enough" in text and "discriminant" in text


def test_a_package_that_is_not_installed_is_said_so(tmp_path, monkeypatch):
    monkeypatch.setattr(cards, "VERSIONED", ("no_such_package_at_all",))
    assert r"| no\_such\_package\_at\_all | not installed as a package" in write(tmp_path)


@pytest.mark.parametrize(
    "of, sentence",
    [
        (config(), "generation with a cache"),
        (config(cse_routing="sequence"), "depend on later"),
        (config(MaskedFamilyConfig, cse_routing="sequence"), "need `position_ids` that begin anew"),
        (config(cse_routing="evidence"), "those read so far"),
        (config(MaskedFamilyConfig, cse_routing="evidence"), "whole text has to be in view"),
        (config(cse_routing="given"), "routed by the cluster that is passed with it"),
        (config(cse_layers=[]), "without experts: the dense model"),
    ],
)
def test_the_limits_of_the_routing_are_told(tmp_path, of, sentence):
    text = write(tmp_path, of=of)
    assert sentence in text
    assert ("## Routing and its limits" in text) == (of.cse_layers != [])


@pytest.mark.parametrize(
    "combine, sentence", [("add", "as well, whose output is added"), ("replace", "everything else goes through")]
)
def test_how_experts_combine_with_the_base_is_told(tmp_path, combine, sentence):
    text = write(tmp_path, of=config(cse_combine=combine))
    assert sentence in text and "So rare domains get parameters" in text
    assert ("whose output is added" in text) == (combine == "add")
    assert "In the chosen layers" not in write(tmp_path, of=config(cse_combine=combine, cse_layers=[]))


def test_empty_parts_are_left_out(tmp_path):
    text = write(tmp_path, results={})
    assert not re.search(r"^## (Results|Data|Training)", text, re.MULTILINE)
    assert "model-index" not in text and "{{" not in text and "{%" not in text


def test_diverged_results_are_in_the_table_but_not_in_the_metadata(tmp_path):
    text = write(tmp_path, results={"cse": {"medical": float("nan"), "general": 3.0}})
    assert "| medical | nan |" in text
    assert [entry.dataset_name for entry in ModelCard.load(tmp_path / "README.md").data.eval_results] == ["general"]


def test_no_value_becomes_markup_or_breaks_out_of_its_cell(tmp_path):
    folder = tmp_path / "model_*name*"
    text = write(
        folder,
        of=config(cse_odd=NASTY),
        results={"cse": {NASTY: 2.0}, NASTY: {NASTY: 3.0}},
        recipe={NASTY: NASTY},
        data={NASTY: {"dataset": NASTY}},
        base_model=NASTY,
        license=NASTY,
    )
    card = ModelCard.load(folder / "README.md")
    assert card.data.pipeline_tag == "text-generation" and card.data.base_model is None and card.data.datasets is None
    body = card.text.split("## Citation")[0]
    assert "<script" not in body and "](javascript" not in body.replace(r"\](", "") and "49" not in body
    assert not re.search(r"^(---|# head)", body, re.MULTILINE)
    assert r"# model\_\*name\*" in body
    for table in re.findall(r"(?:^\|.*\n)+", body, re.MULTILINE):
        assert len({line.count("|") for line in table.splitlines()}) == 1
    assert text.count("```") == 4


@pytest.mark.parametrize("raw", ["https://a.b", "HTTP://a.b", "www.a.b"])
def test_addresses_do_not_link_by_themselves(raw):
    assert not re.search(r"(?i)https?:|www\.", cards.escape(raw))


def test_a_local_base_model_shows_its_name_but_neither_its_place_nor_a_hub_link(tmp_path):
    base = tmp_path / "somewhere" / "dense-run"
    base.mkdir(parents=True)
    text = write(tmp_path / "card", base_model=str(base))
    assert "grown from dense-run" in text and "somewhere" not in text and "base_model" not in text


def test_wrong_input_is_named(tmp_path):
    with pytest.raises(ValueError, match="`results` has the runs"):
        write(tmp_path, results={"dense": {"medical": 3.0}})
    with pytest.raises(ValueError, match="`repo_id` is 'a b'"):
        write(tmp_path, repo_id="a b")
    with pytest.raises(ValueError, match="`config` is of type 'llama'"):
        write(tmp_path, of=LlamaConfig())
    with pytest.raises(ValueError, match="`config` has the architecture 'CSEGPT2ForSpeech'"):
        write(tmp_path, of=config(architectures=["CSEGPT2ForSpeech"]))
    assert not (tmp_path / "README.md").exists()


def test_a_missing_template_is_named_and_another_one_is_taken(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"other\.md'$"):
        write(tmp_path, template=tmp_path / "other.md")
    (tmp_path / "other.md").write_text("---\n{{ card_data }}\n---\nmy {{ title }}\n")
    assert write(tmp_path / "run", template=tmp_path / "other.md").endswith("my run\n")
    monkeypatch.setattr(cards, "TEMPLATE", tmp_path / "gone" / "model_card.md")
    with pytest.raises(FileNotFoundError, match=r"gone/model_card\.md'"):
        write(tmp_path)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    words = ["[UNK]", "[EOS]", "[MASK]", "The", "patient", "was", "given", "."]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"unk_token": "[UNK]", "eos_token": "[EOS]", "mask_token": "[MASK]"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


@pytest.mark.parametrize("routing", ["discriminant", "evidence", "sequence", "given"])
@pytest.mark.parametrize("masked", [False, True])
def test_the_usage_block_runs_when_pasted(tmp_path, monkeypatch, capsys, masked, routing):
    if masked:
        sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
        model = CSEBertForMaskedLM(CSEBertConfig(vocab_size=8, cse_routing=routing, cse_layers=[-1], **sizes))
    else:
        sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2}
        flags = {"cse_routing": routing, "cse_layers": [-1], "bos_token_id": 1, "eos_token_id": 1}
        model = CSEGPT2ForCausalLM(CSEGPT2Config(vocab_size=8, **flags, **sizes))
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    block = re.search(r"```python\n(.*?)```", write(tmp_path, of=model.config), re.DOTALL)[1]
    # The tokenizer too: it reads the configuration, and would else stop to ask.
    assert block.count("trust_remote_code=True") == 2
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "usage", "exec"), {})
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize("task", ["SequenceClassification", "TokenClassification", "QuestionAnswering"])
def test_another_head_is_not_told_for_a_language_model(tmp_path, monkeypatch, task):
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "cse_layers": [-1], "pad_token_id": 0}
    model = getattr(modeling_cse, f"CSEGPT2For{task}")(CSEGPT2Config(vocab_size=8, **sizes))
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    text = write(tmp_path, of=model.config, results={})
    wanted = re.sub("(?<!^)([A-Z])", r"-\1", task).lower().replace("sequence", "text")
    assert ModelCard.load(tmp_path / "README.md").data.pipeline_tag == wanted
    assert f"A model for {wanted} of the type cse\\_gpt2" in text and "those read so far" in text
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(compile(re.search(r"```python\n(.*?)```", text, re.DOTALL)[1], "usage", "exec"), names)
    assert type(names["model"]).__name__ == type(model).__name__


def test_the_usage_block_names_the_repository_when_it_is_known(tmp_path):
    assert 'source = "user/model"\n' in write(tmp_path, repo_id="user/model")

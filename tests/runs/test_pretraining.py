# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""Whole runs, as the scripts make them."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from datasets import ClassLabel, Dataset
from safetensors.torch import load_file
from small_run import ROOT, SHORT, flags, metrics
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer, Trainer

from modeling_cse.runs import BERT, GPT2, pretrain, write_run_card
from modeling_cse.runs.arguments import parse_arguments
from modeling_cse.runs.folder import check_folder, write_settings
from modeling_cse.runs.pretraining import Pretraining


@pytest.fixture(scope="module")
def gpt2_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpt2") / "run"
    return folder, pretrain(GPT2, flags(folder))


def test_a_run_is_one_folder_with_everything_in_it(gpt2_run):
    folder, report = gpt2_run
    for name in ("run.json", "report.json", "report.md", "figure.png", "cse/README.md", "cse/model.safetensors"):
        assert (folder / name).stat().st_size > 0, name
    assert json.loads((folder / "report.json").read_text()) == report
    steps = [entry["step"] for entry in metrics(folder / "cse" / "metrics.jsonl") if "loss" in entry]
    assert steps == [2, 4, 6, 8, 10, 12, 14]


def test_the_report_compares_with_the_dense_twin_by_domain(gpt2_run):
    folder, report = gpt2_run
    assert set(report["perplexity"]) == {"cse", "dense"}
    assert set(report["perplexity"]["cse"]) == {"general", "legal", "medical", "all"}
    assert "cse / dense" in (folder / "report.md").read_text()
    assert all(len(shares) == 4 and 0 <= sum(shares) <= 1 for shares in report["routing"].values())
    assert report["sentence"].startswith("The")


def test_the_card_can_be_written_again_for_another_place(gpt2_run, tmp_path):
    folder, found = gpt2_run
    path = folder / "cse" / "README.md"
    before = path.read_text(encoding="utf-8")
    assert "## The experts" in before and "| domains |" in before and "## Training" in before
    assert re.search(r"\| training time \| 0\.\d minutes \|", before)
    assert [expert["expert"] for expert in found["experts"]][-1] == -1
    write_run_card(folder, repo_id="user/mine", license="mit")
    after = path.read_text(encoding="utf-8")
    assert 'source = "user/mine"' in after and "license: mit" in after
    own = [re.split("No license is named|License:", card.split("## Routing")[1])[0] for card in (before, after)]
    assert own[0] == own[1] and "No license is named" in before
    path.write_text(before, encoding="utf-8")
    with pytest.raises(ValueError, match="a finished run's, with report.json"):
        write_run_card(tmp_path)


def test_evaluation_inside_training_and_of_the_saved_model_agree(gpt2_run):
    folder, report = gpt2_run
    last = {}
    for entry in metrics(folder / "cse" / "metrics.jsonl"):
        last.update(entry)
    for domain in ("general", "legal", "medical"):
        assert last[f"eval_{domain}_perplexity"] == pytest.approx(report["perplexity"]["cse"][domain], rel=1e-5)


def test_twins_are_the_same_until_experts_come_on(gpt2_run):
    folder, _ = gpt2_run
    runs = [metrics(folder / name / "metrics.jsonl") for name in ("cse", "dense")]
    losses = [{entry["step"]: entry["loss"] for entry in run if "loss" in entry} for run in runs]
    assert losses[0][2] == losses[1][2] and losses[0][4] == losses[1][4]
    assert losses[0][14] != losses[1][14]


def test_the_saved_model_loads_by_its_name_alone(gpt2_run):
    folder, _ = gpt2_run
    model = AutoModelForCausalLM.from_pretrained(folder / "cse")
    tokenizer = AutoTokenizer.from_pretrained(folder / "cse")
    assert type(model).__name__ == "CSEGPT2ForCausalLM" and len(tokenizer) == model.config.vocab_size
    assert all(ffn.router.num_clusters == 3 for ffn in model.base_model.routed_modules().values())


def test_rows_of_one_domain_are_one_text(gpt2_run):
    assert AutoConfig.from_pretrained(gpt2_run[0] / "cse").cse_separator_token_id is None


@pytest.mark.parametrize(
    ("said", "own", "expected"), [(None, 5, 5), (None, None, None), (False, 5, None), (True, 5, "end")]
)
def test_a_trained_model_keeps_its_texts_unless_a_flag_says_otherwise(tmp_path, gpt2_run, said, own, expected):
    """Here without a domain column, where a model from scratch or a dense one parts documents."""
    shutil.copytree(gpt2_run[0] / "cse", tmp_path / "cse", ignore=shutil.ignore_patterns("checkpoint-*"))
    config = AutoConfig.from_pretrained(tmp_path / "cse", cse_separator_token_id=own)
    config.save_pretrained(tmp_path / "cse")
    changes = {"model_name_or_path": tmp_path / "cse", "config_overrides": None, "tokenizer_vocab_size": None}
    changes |= {"domain_column": None, "separate_documents": said}
    run = Pretraining(GPT2, *parse_arguments(flags(tmp_path / "run", **changes)))
    run.tokenizer = AutoTokenizer.from_pretrained(tmp_path / "cse")
    expected = run.tokenizer.eos_token_id if expected == "end" else expected
    assert run._config().cse_separator_token_id == expected


def test_recipes_find_their_configuration_from_any_folder(tmp_path, gpt2_run, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv = [str(ROOT / "configuration" / "recipes" / "quickstart.yaml"), "--output_dir", str(tmp_path / "run")]
    run = Pretraining(GPT2, *parse_arguments(argv))
    run.tokenizer = AutoTokenizer.from_pretrained(gpt2_run[0] / "cse")
    shipped = AutoConfig.from_pretrained(ROOT / "configuration" / "cse-gpt2-1m")
    assert run._config().n_embd == shipped.n_embd
    shipped.n_embd *= 2
    shipped.save_pretrained(tmp_path / "configuration" / "cse-gpt2-1m")  # a folder of one's own goes before it
    assert run._config().n_embd == shipped.n_embd


def test_a_run_that_was_killed_after_its_last_step_ends_with_the_best_model(tmp_path, monkeypatch):
    """Evaluations are planted: the first is the best."""
    evaluate = Trainer.evaluate

    def planted(self, *args, **options):
        return {**evaluate(self, *args, **options), "eval_general_loss": float(self.state.global_step)}

    monkeypatch.setattr(Trainer, "evaluate", planted)
    changes = {**SHORT, "eval_strategy": "steps", "eval_steps": 4, "load_best_model_at_end": True}
    changes |= {"metric_for_best_model": "general_loss", "greater_is_better": False, "resume_from_checkpoint": "last"}
    folder = tmp_path / "run" / "cse"
    pretrain(GPT2, flags(tmp_path / "run", **changes))
    wanted, last = ((part / "model.safetensors").read_bytes() for part in (folder, folder / "checkpoint-8"))
    assert wanted != last
    for name in ("training_args.bin", "model.safetensors"):
        (folder / name).unlink()
    pretrain(GPT2, flags(tmp_path / "run", **changes))
    assert (folder / "model.safetensors").read_bytes() == wanted


def test_a_finished_run_is_not_trained_again(gpt2_run):
    folder, report = gpt2_run
    before = (folder / "cse" / "model.safetensors").stat().st_mtime_ns
    assert pretrain(GPT2, flags(folder, resume_from_checkpoint="last"))["perplexity"] == report["perplexity"]
    assert (folder / "cse" / "model.safetensors").stat().st_mtime_ns == before


def test_bert_runs_by_the_same_script(tmp_path):
    changes = {"eval_strategy": "no", "eval_steps": None, "separate_documents": True}
    report = pretrain(BERT, flags(tmp_path / "run", "bert", **changes))
    assert set(report["perplexity"]["dense"]) == {"general", "legal", "medical", "all"}
    model = AutoModelForMaskedLM.from_pretrained(tmp_path / "run" / "cse")
    assert type(model).__name__ == "CSEBertForMaskedLM"
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "cse")
    assert model.config.cse_separator_token_id == tokenizer.sep_token_id


def test_it_goes_on_from_a_dense_checkpoint(tmp_path, gpt2_run):
    folder, _ = gpt2_run
    dense = AutoModelForCausalLM.from_pretrained(folder / "dense")
    from transformers import GPT2Config, GPT2LMHeadModel

    names = set(GPT2Config().to_dict())
    values = {k: v for k, v in dense.config.to_dict().items() if k in names and k not in ("model_type", "auto_map")}
    stock = GPT2LMHeadModel(GPT2Config(**values))
    stock.load_state_dict(dense.state_dict())
    stock.save_pretrained(tmp_path / "stock")
    AutoTokenizer.from_pretrained(folder / "dense").save_pretrained(tmp_path / "stock")
    report = pretrain(
        GPT2,
        [
            *flags(
                tmp_path / "run",
                model_name_or_path=tmp_path / "stock",
                config_overrides=None,
                tokenizer_vocab_size=None,
                compare_with_dense=False,
                separate_documents=True,
            ),
            "--cse_layers",
            "-1",
        ],
    )
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "cse")
    assert list(model.base_model.routed_modules()) == [(2, "ffn")] and set(report["perplexity"]) == {"cse"}
    assert model.config.cse_separator_token_id == model.config.eos_token_id


def going_on_from(folder, tmp_path, **changes) -> Pretraining:
    """A run that starts from the checkpoint in a folder."""
    own = {"model_name_or_path": folder, "config_overrides": None, "tokenizer_vocab_size": None, **changes}
    return Pretraining(GPT2, *parse_arguments(flags(tmp_path / "run", **own)))


def test_both_models_of_a_checkpoint_in_half_precision_train_in_full(tmp_path, gpt2_run):
    """The saved dense twin: its config names experts in no layer, which a flag sets."""
    half = AutoModelForCausalLM.from_pretrained(gpt2_run[0] / "dense", dtype=torch.bfloat16)
    half.save_pretrained(tmp_path / "half")
    AutoTokenizer.from_pretrained(gpt2_run[0] / "dense").save_pretrained(tmp_path / "half")
    run = going_on_from(tmp_path / "half", tmp_path)
    run.model_arguments.cse_layers = [-1]
    run.tokenizer = AutoTokenizer.from_pretrained(tmp_path / "half")
    assert half.dtype == torch.bfloat16
    for name in ("cse", "dense"):
        model = run._model(name)
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
        assert len(model.base_model.routed_modules()) == (name == "cse")


def test_a_twin_without_what_experts_have_learned_is_refused(tmp_path, gpt2_run):
    run = going_on_from(gpt2_run[0] / "cse", tmp_path)
    with pytest.raises(ValueError, match="compare_with_dense=True is not allowed .* lack what its experts have"):
        run.run()
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("step", [3, 9])
def test_a_killed_run_resumes_to_the_bit(tmp_path, gpt2_run, step):
    """SIGKILL after some step; then the same command finishes as if nothing had been."""
    whole, _ = gpt2_run
    folder = tmp_path / "run"
    command = [sys.executable, "examples/run_clm.py", *flags(folder, resume_from_checkpoint="last")]
    # sums over another number of threads round differently
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    log, deadline = folder / "cse" / "metrics.jsonl", time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if log.is_file() and any(entry.get("step", 0) >= step for entry in metrics(log)):
            break
        time.sleep(0.02)
    assert process.poll() is None, process.stdout.read().decode()[-2000:]
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (folder / "cse" / "model.safetensors").exists()
    pretrain(GPT2, flags(folder, resume_from_checkpoint="last"))
    for name in ("cse", "dense"):
        # the mean over the whole run is the Trainer's, over the steps of its last process
        runs = [metrics(path / name / "metrics.jsonl") for path in (whole, folder)]
        kept = [[entry for entry in run if "train_loss" not in entry] for run in runs]
        assert kept[0] == kept[1]
        weights = [load_file(path / name / "model.safetensors") for path in (whole, folder)]
        assert weights[0].keys() == weights[1].keys()
        assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


@pytest.mark.slow
def test_a_masked_model_resumes_to_the_bit(tmp_path):
    """Its masks are drawn by the data, ahead of the step that sees them: a resumed run must get the same."""
    changes = {"eval_strategy": "no", "eval_steps": None, "compare_with_dense": None, "save_steps": 5, "max_steps": 12}
    settings = flags(tmp_path / "run", "bert", **changes)
    pretrain(BERT, settings)
    folder = tmp_path / "run" / "cse"
    whole, entries = load_file(folder / "model.safetensors"), metrics(folder / "metrics.jsonl")
    for name in ("checkpoint-10", "checkpoint-12"):
        shutil.rmtree(folder / name)
    (folder / "training_args.bin").unlink()  # the run looks as if it had been killed between steps 5 and 10
    pretrain(BERT, [*settings, "--resume_from_checkpoint", "last"])
    resumed = load_file(folder / "model.safetensors")
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())
    # the Trainer's log at step 6 is a mean over the steps since its process began
    last = [
        [entry for entry in run if entry["step"] > 6 and "train_loss" not in entry]
        for run in (entries, metrics(folder / "metrics.jsonl"))
    ]
    assert last[0] == last[1]


def test_a_run_killed_after_its_last_step_makes_no_other(tmp_path, gpt2_run):
    whole, _ = gpt2_run
    folder = Path(shutil.copytree(whole, tmp_path / "run"))
    for name in ("training_args.bin", "model.safetensors"):
        (folder / "cse" / name).unlink()
    pretrain(GPT2, flags(folder, resume_from_checkpoint="last"))
    weights = [load_file(path / "cse" / "model.safetensors") for path in (whole, folder)]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    assert max(entry["step"] for entry in metrics(folder / "cse" / "metrics.jsonl")) == 14
    assert "training time" not in (folder / "cse" / "README.md").read_text(encoding="utf-8"), "it knows a part only"


@pytest.mark.parametrize("name", ["cluster_state_rank0.safetensors", "optimizer.pt"])
def test_a_named_checkpoint_that_was_cut_is_refused_by_name(tmp_path, gpt2_run, name):
    folder = tmp_path / "run"
    shutil.copytree(gpt2_run[0], folder)
    (folder / "cse" / "training_args.bin").unlink()
    place = folder / "cse" / "checkpoint-8"
    (place / name).write_bytes((place / name).read_bytes()[:-7])
    with pytest.raises(ValueError, match=f"checkpoint-8' is not a complete checkpoint: .*{name}"):
        pretrain(GPT2, flags(folder, resume_from_checkpoint=str(place)))


def test_the_oracle_routes_by_domain(tmp_path):
    changes = {**SHORT, "control": "oracle", "common_share": "elbow", "sample_size": 20}
    report = pretrain(GPT2, flags(tmp_path / "run", **changes))
    assert {domain: round(sum(shares), 6) for domain, shares in report["routing"].items()} == {
        **{"general": 0, "legal": 1, "medical": 1}
    }


def jsonl(path, domains, count: int = 8):
    """Texts of these domains, each with words of its own."""
    rows = [{"text": f"{name} " * 60, "domain": name} for name in domains for _ in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_the_oracle_s_labels_are_those_of_training(tmp_path):
    """Validation lacks the first domain, and has one that no expert can know."""
    files = {"train_file": jsonl(tmp_path / "train.jsonl", "abc")}
    files["validation_file"] = jsonl(tmp_path / "validation.jsonl", "bcd")
    changes = {**SHORT, **files, "control": "oracle", "tokenizer_vocab_size": 300, "max_eval_samples": None}
    run = Pretraining(GPT2, *parse_arguments(flags(tmp_path / "run", **changes)))
    run._load_data()
    assert set(run.training["given_clusters"]) == {0, 1, 2}
    found = {domain: set(blocks["given_clusters"]) for domain, blocks in run.validation.items()}
    assert found == {"b": {1}, "c": {2}, "d": {-1}}


def test_changed_text_is_refused_by_name(tmp_path):
    """Also where a text only moves to another domain; a stream is not read beforehand."""

    def settings(**changes):
        return Pretraining(GPT2, *parse_arguments(flags(tmp_path / "run", **{**files, **changes})))._settings()

    (tmp_path / "texts" / "a").mkdir(parents=True)
    (tmp_path / "texts" / "a" / "one.txt").write_text("one")
    files = {"train_file": tmp_path / "texts", "validation_file": jsonl(tmp_path / "validation.jsonl", "b")}
    write_settings(tmp_path / "run", settings())
    check_folder(tmp_path / "run", settings(), resume=True)
    before = files["validation_file"].read_text()
    jsonl(files["validation_file"], "c")
    with pytest.raises(ValueError, match=r"other settings of \['data.content'\]"):
        pretrain(GPT2, flags(tmp_path / "run", **files, resume_from_checkpoint="last"))
    files["validation_file"].write_text(before)
    check_folder(tmp_path / "run", settings(), resume=True)
    (tmp_path / "texts" / "a").rename(tmp_path / "texts" / "b")
    with pytest.raises(ValueError, match=r"other settings of \['data.content'\]"):
        check_folder(tmp_path / "run", settings(), resume=True)
    assert settings(streaming=True)["data.content"] is None


def test_streams_keep_the_names_of_class_labels(tmp_path):
    names = ClassLabel(names=["law", "news"])
    rows = Dataset.from_list([{"text": "word " * 60, "domain": row % 2} for row in range(16)])
    rows.cast_column("domain", names).to_parquet(tmp_path / "a.parquet")
    files = {"train_file": tmp_path / "a.parquet", "validation_file": tmp_path / "a.parquet", "streaming": True}
    changes = {**SHORT, **files, "tokenizer_vocab_size": 300, "max_eval_samples": None}
    run = Pretraining(GPT2, *parse_arguments(flags(tmp_path / "run", **changes)))
    run._load_data()
    assert list(run.validation) == ["law", "news"] and next(iter(run.training))["domain"] in names.names


def test_random_routes_have_the_sizes_they_were_given(tmp_path):
    run = [*flags(tmp_path / "run", **{**SHORT, "control": "random"}), "--random_shares", "0.5", "0.3", "0.2"]
    report = pretrain(GPT2, [*run, "--common_share", "0.4"])
    settings = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (settings["clusters.algorithm"], settings["clusters.update"]) == ("given", "frozen")
    shares = [sum(by_expert) for by_expert in report["routing"].values()]
    assert all(0.1 < share < 0.9 for share in shares) and max(shares) - min(shares) < 0.4


def test_a_control_takes_the_recipe_of_its_run(tmp_path):
    changes = {"cse_routing": "evidence", "cse_combine": "add", "algorithm": "text", "control": "oracle"}
    pretrain(GPT2, flags(tmp_path / "run", **{**SHORT, **changes}))
    config = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "cse").config
    assert (config.cse_routing, config.cse_combine, config.gate) == ("given", "add", "hard")


def test_a_command_that_was_refused_may_be_put_right_in_its_folder(tmp_path):
    with pytest.raises(ValueError, match="warmup=5000 is not allowed: it ends at step 5000"):
        pretrain(GPT2, flags(tmp_path / "run", **{**SHORT, "warmup": 5000}))
    pretrain(GPT2, flags(tmp_path / "run", **SHORT))
    assert json.loads((tmp_path / "run" / "run.json").read_text())["clusters.warmup"] == "5"


def test_an_oracle_without_domains_is_refused(tmp_path):
    with pytest.raises(ValueError, match="control='oracle' is not allowed without a domain_column"):
        pretrain(GPT2, flags(tmp_path / "run", **{**SHORT, "control": "oracle", "domain_column": None}))


def test_every_new_choice_reaches_a_run(tmp_path):
    """Layers and warm-up chosen by the run, attention experts, a range of clusters, moving averages in between."""
    changes = {**SHORT, "max_steps": 10, "warmup": "auto", "cse_layers": "auto", "layer_budget": 1}
    changes |= {"num_clusters": None, "update": "recluster+ema", "recluster_every": 2}
    changes |= {"recluster_growth": 1.5, "recluster_until": "0.9"}
    run = [*flags(tmp_path / "run", **changes), "--cse_modules", "attention", "ffn", "--num_clusters", "2", "4"]
    run += ["--cse_routing", "discriminant", "--algorithm", "spherical", "--projection", "8"]
    pretrain(GPT2, run)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "cse")
    assert len(model.config.cse_layers) == 1 and model.config.cse_modules == ["attention", "ffn"]
    entries = metrics(tmp_path / "run" / "cse" / "metrics.jsonl")
    # the candidates are compared once, where the warm-up ends for want of a peak
    assert [entry["step"] for entry in entries if "cse/layer_0/ffn/clarity" in entry][:1] == [3]

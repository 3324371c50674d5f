# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""The comparison on a user's corpus: one page, from one command, of which nothing that is done is done again."""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from tiny import tiny_config
from transformers import AutoConfig, HfArgumentParser

from modeling_cse.data import load_corpus
from modeling_cse.runs import compare, comparison
from modeling_cse.runs.extract import OTHER, make_extract
from modeling_cse.runs.folder import check_folder, write_settings
from modeling_cse.runs.measuring import read_measured


ROOT = Path(__file__).parents[2]
DATA = ROOT / "examples" / "data"
RECIPE = """
cse_routing: evidence
cse_combine: add
block_size: 64
algorithm: text
warmup: "0.3"
num_clusters: 4
sample_size: 512
common_share: 0.6
compare_with_dense: true
per_device_train_batch_size: 4
per_device_eval_batch_size: 32
eval_strategy: steps
use_cpu: true
report_to: none
disable_tqdm: true
"""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """A part of the sample corpus, rare domains drawn more often than they occur; and a tiny model to train on it."""
    folder = tmp_path_factory.mktemp("corpus")
    with gzip.open(DATA / "train.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    by_domain = {name: [row for row in rows if row["domain"] == name] for name in ("general", "legal", "medical")}
    kept = by_domain["general"][:40] + by_domain["legal"][:25] + by_domain["medical"][:25]
    (folder / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
    (folder / "recipe.yaml").write_text(RECIPE)
    (folder / "states.yaml").write_text(
        RECIPE.replace("cse_routing: evidence\n", "").replace("algorithm: text", "algorithm: kmeans")
    )
    tiny_config("gpt2", vocab_size=600).save_pretrained(folder / "tiny")
    return folder


def arguments(corpus, output, **changes) -> list[str]:
    values = {"train": corpus / "text.jsonl", "output": output, "size": corpus / "tiny", "steps": 20}
    values |= {"recipe": corpus / "recipe.yaml", **changes}
    return [part for name, value in values.items() for part in (f"--{name.replace('_', '-')}", str(value))]


@pytest.fixture(scope="module")
def with_domains(corpus, tmp_path_factory):
    output = tmp_path_factory.mktemp("compare") / "run"
    return output, compare(arguments(corpus, output, domain_column="domain"))


def test_the_page_has_all_it_promises(with_domains):
    output, found = with_domains
    page = (output / "page.md").read_text(encoding="utf-8")
    assert json.loads((output / "page.json").read_text(encoding="utf-8")) == found
    for heading in ("# Is CSE worth it on text.jsonl?", "## Worth it?", "## Who gains what", "## Clusters\n"):
        assert heading in page
    assert "## Clusters and domains" in page and "## Cost" in page
    assert "one seed" in page and "nothing of the noise of training" in page
    for picture in ("losses.png", "gains.png", "clusters.png"):
        assert f"]({picture})" in page and (output / picture).read_bytes().startswith(b"\x89PNG")
    tables = [line for line in page.splitlines() if line.startswith("| domain: ")]
    assert [line.split("|")[1].strip() for line in tables] == ["domain: general", "domain: legal", "domain: medical"]


def test_its_numbers_are_those_of_the_runs(with_domains):
    """Perplexities of the run's own report; shares and sequences that add up."""
    output, found = with_domains
    report = json.loads((output / "seed_0" / "report.json").read_text())["perplexity"]
    for domain in ("general", "legal", "medical"):
        gain = found["gains"][f"domain: {domain}"]
        assert gain["dense"] == pytest.approx(report["dense"][domain], rel=1e-4)
        assert gain["cse"] == pytest.approx(report["cse"][domain], rel=1e-4)
    clusters = found["seeds"][0]["clusters"]
    assert sum(cluster["share"] for cluster in clusters) == pytest.approx(1)
    counted = {name: gain["sequences"] for name, gain in found["gains"].items()}
    everything = counted.pop("all held-out text")
    assert everything == found["extract"]["blocks"]["validation"]
    for part in ("domain: ", "cluster "):
        assert sum(count for name, count in counted.items() if name.startswith(part)) == everything
    assert np.sum(found["domains"]["table"]) == found["extract"]["blocks"]["train"]
    assert all(value > 0 for value in found["seeds"][0]["seconds"].values())
    parameters = found["seeds"][0]["parameters"]
    assert parameters["dense"] < found["seeds"][0]["active_parameters"] < parameters["cse"]


def test_routes_by_evidence_are_told_as_such(with_domains):
    output, found = with_domains
    page, seed = (output / "page.md").read_text(encoding="utf-8"), found["seeds"][0]
    assert seed["kind"] == "evidence" and seed["posterior_gate"] and seed["evidence"] == [600, 16]
    own = "\n".join(line for line in page.splitlines() if not line.startswith(("- cluster", "| cluster")))
    for wrong in ("state", "centroid", "silhouette", "discriminant", "layer_"):
        assert wrong not in own  # the corpus may say what it likes
    for right in ("likeliest by all of its tokens", "Surest of each", "separation", "counts for the probability"):
        assert right in page
    measured = [part["clarity"] for part in seed["clusters"] if part["expert"] >= 0 and part["clarity"] is not None]
    assert found["separation"] == max(measured)
    counted = {name: gain["sequences"] for name, gain in found["gains"].items() if name.startswith("cluster ")}
    with_text = sum(part["clarity"] is not None for part in seed["clusters"])
    assert len(counted) == with_text > 1  # separation is of held-out text


def test_routes_by_hidden_states_are_told_as_such(corpus, tmp_path):
    found = compare(arguments(corpus, tmp_path / "run", recipe=corpus / "states.yaml"))
    page, seed = (tmp_path / "run" / "page.md").read_text(encoding="utf-8"), found["seeds"][0]
    assert seed["kind"] == "states" and not seed["posterior_gate"] and seed["evidence"] is None
    for right in ("nearest to its mean state", "Nearest to each centroid", "silhouette", "from their own state"):
        assert right in page
    for wrong in ("separation", "likeliest by all", "table of evidence", "counts for the probability"):
        assert wrong not in page
    measured = [part["clarity"] for part in seed["clusters"] if part["share"] > 0]  # a cluster may have no sequence
    assert len(measured) > 1 and all(-1 <= clarity <= 1 for clarity in measured)
    config = AutoConfig.from_pretrained(tmp_path / "run" / "seed_0" / "cse")
    assert config.cse_separator_token_id == config.eos_token_id  # no domain column parts the documents


def test_what_is_done_is_not_done_again_and_more_seeds_may_come(with_domains, corpus, monkeypatch, tmp_path):
    output, found = with_domains
    made = []
    run = comparison.Pretraining.run
    monkeypatch.setattr(comparison.Pretraining, "run", lambda self: (made.append(self.args.seed), run(self)))
    page = (output / "page.md").read_text(encoding="utf-8")
    assert compare(arguments(corpus, output, domain_column="domain")) == found and made == []
    assert (output / "page.md").read_text(encoding="utf-8") == page
    more = compare(arguments(corpus, output, domain_column="domain", seeds=2))
    assert made == [1] and more["seeds"][0] == found["seeds"][0]
    assert "Student's t over 2 seeds" in (output / "page.md").read_text(encoding="utf-8")
    losses = [read_measured(output / f"seed_{seed}")[0]["dense"] for seed in range(2)]
    assert losses[0].shape == losses[1].shape and not np.allclose(*losses)  # the same text, other models
    with pytest.raises(ValueError, match=r"other settings of \['steps'\]"):
        compare(arguments(corpus, output, domain_column="domain", steps=21))


def test_another_model_in_the_same_folder_is_told(corpus, tmp_path):
    """Its seeds would be averaged with those of the one before."""
    config = tiny_config("gpt2", vocab_size=600)
    config.save_pretrained(tmp_path / "model")
    (asked,) = HfArgumentParser(comparison.ComparisonArguments).parse_args_into_dataclasses(
        arguments(corpus, tmp_path / "run", size=tmp_path / "model")
    )
    settings = comparison.Comparison(asked)._settings()
    write_settings(tmp_path / "run", settings)
    config.n_embd *= 2
    config.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=r"other settings of \['config'\]"):
        comparison.Comparison(asked).run()
    write_settings(tmp_path / "run", {name: value for name, value in settings.items() if name != "config"})
    check_folder(tmp_path / "run", comparison.Comparison(asked)._settings(), resume=True)  # made before it was noted


def test_a_model_too_short_for_the_recipe_is_refused_before_anything_is_written(corpus, tmp_path):
    tiny_config("gpt2", vocab_size=600, n_positions=48).save_pretrained(tmp_path / "short")
    with pytest.raises(ValueError, match="size=.*short' is not allowed: it has 48 positions, .* block_size=64"):
        compare(arguments(corpus, tmp_path / "run", size=tmp_path / "short"))
    assert not (tmp_path / "run").exists()


def test_one_domain_is_answered_too(corpus, tmp_path, monkeypatch):
    """Here without a number of steps, of which the page says how many they were."""
    monkeypatch.setattr(comparison, "MOST_STEPS", 20)
    rows = [json.loads(line) for line in (corpus / "text.jsonl").read_text(encoding="utf-8").splitlines()]
    rows = [{"body": row["text"], "field": "speech"} for row in rows if row["domain"] == "general"]
    (tmp_path / "speech.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    changes = {"train": tmp_path / "speech.jsonl", "text_column": "body", "domain_column": "field"}
    flags = arguments(corpus, tmp_path / "run", **changes)
    del flags[flags.index("--steps") : flags.index("--steps") + 2]
    found = compare(flags)
    assert found["domains"]["names"] == ["speech"] and "domain: speech" in found["gains"]
    page = (tmp_path / "run" / "page.md").read_text(encoding="utf-8")
    assert "There is one domain only" in page and "same batches, 20 steps," in page


@pytest.mark.parametrize(("blocks", "steps"), [(400, 200), (401, 201), (10**6, 900)])
def test_without_steps_the_text_is_read_twice_but_not_for_ever(corpus, blocks, steps):
    asked = comparison.ComparisonArguments(train=["any.jsonl"], recipe=str(corpus / "recipe.yaml"))
    made = comparison.Comparison(asked)
    made.extract = SimpleNamespace(blocks={"train": blocks})
    assert made._steps() == steps


def test_batches_are_counted_whole_where_gradients_are_accumulated(corpus, tmp_path):
    """Two passes in half as many steps."""
    whole = tmp_path / "recipe.yaml"
    whole.write_text((corpus / "recipe.yaml").read_text() + "gradient_accumulation_steps: 2\n")
    made = comparison.Comparison(comparison.ComparisonArguments(train=["any.jsonl"], recipe=str(whole)))
    made.extract = SimpleNamespace(blocks={"train": 400})
    assert made._step_blocks() == 8 and made._steps() == 100


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": "none.jsonl"}, "'none.jsonl' is not allowed: it must be an existing file"),
        ({"text_column": "body"}, "text_column='body' is not a column"),
        ({"domain_column": "field"}, "domain_column='field' is not a column"),
        ({"size": "70b"}, r"size='70b' is not allowed: it must be one of \['1m', '7m'\]"),
        ({"steps": 3}, "steps=3 is not allowed: it must be at least 20"),
        ({"seeds": 0}, "seeds=0 is not allowed"),
        ({"recipe": "none.yaml"}, "the recipe 'none.yaml' does not exist"),
    ],
)
def test_wrong_arguments_are_named_before_anything_is_written(corpus, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        compare(arguments(corpus, tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


def test_a_corpus_too_small_to_tell_is_refused(corpus, tmp_path):
    (tmp_path / "tiny.jsonl").write_text("".join(json.dumps({"text": f"word {n} " * 30}) + "\n" for n in range(20)))
    with pytest.raises(ValueError, match=r"train: the text is too short .* 128 are needed \(about 33 kB"):
        compare(arguments(corpus, tmp_path / "run", train=tmp_path / "tiny.jsonl"))
    assert not (tmp_path / "run").exists()


def test_a_domain_named_as_the_union_is_refused(corpus, tmp_path):
    text = (corpus / "text.jsonl").read_text(encoding="utf-8").replace('"domain": "legal"', '"domain": "all"')
    (tmp_path / "text.jsonl").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"domain 'all' is not allowed beside others \['general', 'medical'\]"):
        compare(arguments(corpus, tmp_path / "run", train=tmp_path / "text.jsonl", domain_column="domain"))
    assert not (tmp_path / "run").exists()


def test_small_domains_become_one_and_no_text_is_in_both_splits(corpus, tmp_path):
    rows = [json.loads(line) for line in (corpus / "text.jsonl").read_text(encoding="utf-8").splitlines()]
    for number, row in enumerate(rows):
        if row["domain"] == "legal" and number % 5 == 0:
            row |= {"domain": f"small {number % 2}", "text": row["text"][:1200]}
    (tmp_path / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    sizes = {"tokens": 10**6, "block_size": 256, "vocab_size": 600}
    columns = {"text_column": "text", "domain_column": "domain"}
    files = {"train": [str(tmp_path / "text.jsonl")], "validation": None}
    extract = make_extract(tmp_path / "data", **files, **columns, **sizes)
    assert extract.merged == ["small 0", "small 1"] and set(extract.domains["train"]) == {
        *("general", "legal", "medical", OTHER)
    }
    assert make_extract(tmp_path / "data", **files, **columns, **sizes) == extract
    paths = {f"{name}_file": str(tmp_path / "data" / f"{name}.jsonl") for name in ("train", "validation")}
    splits = load_corpus(**paths, domain_column="domain")
    assert sorted(splits["train"]["text"][:] + splits["validation"]["text"][:]) == sorted(r["text"] for r in rows)


@pytest.mark.parametrize("characters", [60, 6000], ids=["less than a block", "some blocks"])
def test_a_domain_of_validation_alone_is_left_out(corpus, tmp_path, characters):
    rows = [json.loads(line) for line in (corpus / "text.jsonl").read_text(encoding="utf-8").splitlines()]
    rows.append({"text": "never seen " * (characters // 11), "domain": "new"})
    (tmp_path / "validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    extract = make_extract(
        tmp_path / "data",
        train=[str(corpus / "text.jsonl")],
        validation=[str(tmp_path / "validation.jsonl")],
        text_column="text",
        domain_column="domain",
        tokens=10**6,
        block_size=64,
        vocab_size=600,
    )
    assert extract.left_out == ["new"] and extract.merged == []
    assert all(set(counts) == {"general", "legal", "medical"} for counts in extract.domains.values())
    kept = load_corpus(train_file=str(tmp_path / "data" / "validation.jsonl"))["train"]
    assert set(kept["domain"]) == {"general", "legal", "medical"}


def test_of_a_large_corpus_only_what_a_run_reads_is_kept(corpus, tmp_path):
    found = {}
    for tokens in (9_000, 10**6):
        found[tokens] = make_extract(
            tmp_path / str(tokens),
            train=[str(corpus / "text.jsonl")],
            validation=[str(corpus / "text.jsonl")],
            text_column="text",
            domain_column=None,
            tokens=tokens,
            block_size=64,
            vocab_size=600,
        ).blocks
    assert 9_000 / 64 <= found[9_000]["train"] < 0.7 * found[10**6]["train"]


@pytest.mark.slow
@pytest.mark.parametrize("domains", [True, False], ids=["domains", "plain"])
def test_as_a_user_would(corpus, tmp_path, domains):
    command = [sys.executable, "examples/compare.py", *arguments(corpus, tmp_path / "run")]
    command += ["--domain-column", "domain"] if domains else []
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "worth it: " in done.stdout and "page.md" in done.stdout
    page = (tmp_path / "run" / "page.md").read_text(encoding="utf-8")
    assert "cluster 0 (" in page and "all held-out text" in page
    assert ("## Clusters and domains" in page) == ("domain: legal" in page) == domains

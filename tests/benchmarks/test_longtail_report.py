# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""Promises of the long-tail report, on made-up run folders whose ratios are known: every number comes from a run, and
what no run stands behind is "not measured"."""

import json
import math
import shutil
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset
from longtail_tiny import ROLES
from safetensors.numpy import save_file

from modeling_cse.data import train_tokenizer


# the benchmark is a folder of scripts, which find each other there
sys.path.append(str(Path(__file__).resolve().parents[2] / "examples" / "longtail_benchmark"))

import keep  # noqa: E402
import report  # noqa: E402
from arms import Arm  # noqa: E402
from corpus import FEATURES, SPLITS, Corpus, Mixture  # noqa: E402
from cost import empty_model, run_cost  # noqa: E402
from run_folders import Run, read_runs  # noqa: E402
from run_records import TestBlocks, position_bins, record_of  # noqa: E402


BLOCK, STEPS, BATCH = 32, 20, 4
DOMAINS = ("general", "legal", "medical")
SITE = "layer_1/ffn"
CONFIG = {"n_layer": 2, "n_embd": 16, "n_head": 2, "n_positions": BLOCK}
TRAINING = {"per_device_train_batch_size": BATCH, "max_steps": STEPS}
EXPERTS = {"cse_layers": [1], "cse_combine": "add", "cse_num_experts": 2, "cse_routing": "discriminant"}
STAGE = {"num_train_epochs": 1, "learning_rate": 1e-3, "warmup_steps": 0.1, "eval_steps": 2}
ARMS = {
    "dense": Arm("dense", "dense"),
    "cse": Arm("cse", "cse", model=EXPERTS),
    "oracle": Arm("oracle", "cse", model=EXPERTS, control="oracle"),
    "dense_legal": Arm("dense_legal", "dense", training=STAGE, start="dense", domain="legal"),
    "dense_medical": Arm("dense_medical", "dense", training=STAGE, start="dense", domain="medical"),
}
# Perplexity over dense of each long-tail domain, beyond the first 8 positions; the general text's all over.
LONG, GENERAL = {"cse": 0.8, "oracle": 0.64, "dense_legal": 0.9, "dense_medical": 0.9}, {"dense_legal": 1.5}


def write_corpus(folder: Path, shares=(0.8, 0.1, 0.1)) -> Corpus:
    tokenizer = train_tokenizer(["a court held that the cell line grew"], kind="gpt2", vocab_size=270)
    mixture = Mixture(dict.fromkeys(DOMAINS, ["made/up"]), dict(zip(DOMAINS, shares, strict=True)), block_size=BLOCK)
    generator = np.random.default_rng(0)
    domains = np.repeat(DOMAINS, 6)
    for split in SPLITS:
        ids = generator.integers(0, 250, (len(domains), BLOCK)).astype(np.uint16)
        rows = {"input_ids": list(ids), "domain": domains.tolist()}
        Dataset.from_dict(rows, features=FEATURES).to_parquet(folder / f"{split}.parquet")
    (folder / "corpus.json").write_text(json.dumps({"mixture": asdict(mixture)}))
    tokenizer.save_pretrained(folder / "tokenizer")
    return Corpus.load(folder)


def write_run(
    folder: Path,
    arm: Arm,
    seed: int,
    corpus: Corpus,
    tasks: dict | None = None,
    noise: float = 0.0,
    machine: str = "one abacus",
    measured: dict | None = None,
) -> Run:
    """A finished run: dense losses of the seed, plus the logarithms of the ratios above."""
    folder = folder / f"{arm.name}-{seed}"
    folder.mkdir(parents=True)
    domains = np.asarray(corpus.test["domain"][:])
    nll = np.random.default_rng(seed).uniform(2, 6, (len(domains), BLOCK - 1))
    nll[domains != "general", 8:] += math.log(LONG.get(arm.name, 1.0)) + noise
    nll[domains == "general"] += math.log(GENERAL.get(arm.name, 1.0))
    tensors = {"nll": nll.astype(np.float16)}
    means = {name: tensors["nll"][domains == name].astype(np.float64).mean() for name in DOMAINS}
    if arm.kind == "cse":
        experts = np.repeat(np.select([domains == "legal", domains == "medical"], [0, 1], -1)[:, None], BLOCK, 1)
        experts[:, :8] = -1
        tensors[f"experts.{SITE}"] = experts.astype(np.int8)
    routed = {name: {"routed": 0.0 if name == "general" else 0.75} for name in DOMAINS}
    test = {"perplexity": {name: math.exp(mean) for name, mean in means.items()}}
    test["routing"] = {SITE: routed} if arm.kind == "cse" else {}
    size = {"name": "tiny", "family": "gpt2", "config": CONFIG, "training": TRAINING}
    settings = {"arm": arm.settings(), "seed": seed, "size": size, "mixture": asdict(corpus.mixture), "steps": None}
    total = sum(p.numel() for p in empty_model(Run(folder, settings, {}), corpus.tokenizer).parameters())
    result = {"arm": arm.name, "seed": seed, "parameters": {"total": total}, "seconds": 100.0, "resumed": False}
    result["origin"] = {"date": "2026-02-03", "machine": machine, "versions": {"torch": "9.9"}}
    (folder / "run.json").write_text(json.dumps(settings))
    result["validation"] = {"perplexity": {name: 2.0 + place for place, name in enumerate(DOMAINS)}}
    (folder / "result.json").write_text(json.dumps({**result, "test": test}))
    log = [{"step": STEPS // 4, f"cse/{SITE}/clusters": 3}] if arm.kind == "cse" else []
    (folder / "metrics.jsonl").write_text("".join(json.dumps(e) + "\n" for e in [*log, {"step": STEPS, "loss": 1.0}]))
    if tasks is not None:
        numbers = {task: {"metric": "accuracy", "test": {"accuracy": value}} for task, value in tasks.items()}
        if "cola" in tasks:  # right less often than another, and yet the better of the two
            matthews = {"accuracy": 1 - tasks["cola"], "matthews_correlation": tasks["cola"] - 0.5}
            numbers["cola"] = {"metric": "matthews_correlation", "test": matthews}
        how = {"model": f"{arm.name} {seed}", "rows": [1000, 500, 1000], "bf16": False, **(measured or {})}
        (folder / "tasks.json").write_text(json.dumps({"probe": {"settings": how, "tasks": numbers}}))
    save_file(tensors, folder / "test.safetensors")
    return Run.load(folder)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("corpora") / "main"


@pytest.fixture(scope="module")
def corpus(place):
    return write_corpus(place)


@pytest.fixture(scope="module")
def outcome(tmp_path_factory, corpus, place):
    """Three seeds of every arm, reported: the page, the JSON, the folder."""
    root = tmp_path_factory.mktemp("runs")
    accuracies = {"dense": 0.5, "cse": 0.75, "dense_legal": 0.625, "dense_medical": 0.6875}
    for arm in ARMS.values():
        for seed in range(3):
            known = ("overruling", "gad", "cola")
            tasks = dict.fromkeys(known, accuracies[arm.name]) if arm.name in accuracies else None
            noise = 0.01 * (seed - 1) if arm.name == "cse" else 0.0
            write_run(root / "tiny" / "main", arm, seed, corpus, tasks, noise)
    folder = root / "out"
    options = ["--size", "tiny", "--results", str(folder)]
    arms = {name: {key: value for key, value in arm.settings().items() if key != "name"} for name, arm in ARMS.items()}
    (root / "arms.yaml").write_text(json.dumps(arms))
    keep.main([*options, "--runs", str(root), "--corpus", str(place), "--arms", str(root / "arms.yaml")])
    report.main([*options, *(word for role, arm in asdict(ROLES).items() for word in (f"--{role}", arm))])
    return (folder / "tiny-main.md").read_text(), json.loads((folder / "tiny-main.json").read_text()), folder


@pytest.fixture(scope="module")
def records(outcome):
    return keep.read_records(outcome[2] / "tiny" / "main")


def row(page: str, section: str, name: str) -> list[str]:
    """The cells of the first row of a section that begins with a name."""
    lines = page.partition(f"## {section}\n")[2].partition("\n## ")[0].splitlines()
    return [cell.strip() for cell in next(line for line in lines if line.startswith(f"| {name}")).split("|")[1:-1]]


def test_ratios_are_those_of_the_runs(outcome):
    page, results, _ = outcome
    expected = 0.8 ** (23 / 31)  # 23 of 31 predictions are beyond position 8
    ratios = results["comparisons"]["cse"]["perplexity_over_baseline"]
    for name in ("legal", "medical", "long-tail"):
        assert ratios[name]["value"] == pytest.approx(expected, rel=1e-3) and ratios[name]["seeds"] == 3
        assert ratios[name]["lower"] < expected < ratios[name]["upper"]
    assert ratios["general"]["value"] == 1
    assert results["comparisons"]["cse"]["share_of_oracle"]["value"] == pytest.approx(0.5, abs=2e-3)
    cells = row(page, "Arms", "cse")
    assert cells[1] == "3" and cells[2] == cells[3] == f"{ratios['legal']['value']:.3f}"
    assert cells[4] == "{value:.3f} [{lower:.3f}, {upper:.3f}]".format(**ratios["long-tail"])
    assert row(page, "Arms", "oracle")[7].startswith("100")


def test_the_gain_stands_at_its_positions(outcome):
    page, results, _ = outcome
    places = results["comparisons"]["cse"]["long_tail_by_position"]
    assert places["0-8"]["value"] == pytest.approx(1) and places["8-32"]["value"] == pytest.approx(0.8, rel=1e-3)
    assert row(page, "By position in the block", "cse")[1:4:2] == ["3", "0.800 (50 %)"]
    assert position_bins(256) == [(0, 8), (8, 32), (32, 128), (128, 256)]
    assert position_bins(1024)[3:] == [(128, 256), (256, 512), (512, 1024)] and position_bins(20) == [(0, 8), (8, 20)]


def test_routing_forgetting_and_frequency_are_told(outcome, records):
    page, results, _ = outcome
    purity = row(page, "Routing", "cse")
    assert purity[1:3] == [SITE, "3"] and purity[3].startswith("1.00") and purity[5].startswith("1.00")
    assert 0 < records[0]["purity"][SITE]["tokens"]["adjusted_mutual_information"] < 1
    forgetting = row(page, "Forgetting", "dense_legal")
    assert forgetting[1:4] == ["dense", "legal", "3"] and forgetting[-1].startswith("1.500")
    by_bin = results["comparisons"]["cse"]["by_frequency"]
    assert set(by_bin) == {"1", "2", "3"} and all(0.8 < value["value"] <= 1 for value in by_bin["1"])
    assert sum(entry["blocks"] for entry in results["frequency_bins"]) == 18


def test_the_judgement_says_reached_missed_or_not_measured(outcome):
    _, results, _ = outcome
    verdicts = {entry["measure"]: entry for entry in results["judgement_rows"]}
    assert len(verdicts) == 13
    found = {name: (entry["must_verdict"], entry["aim_verdict"]) for name, entry in verdicts.items()}
    assert found["long-tail perplexity, default CSE / dense"] == ("reached", "reached")
    assert found["general perplexity, default CSE / dense"] == ("reached", "missed")
    assert found["share of the oracle's gain on the long tail"] == ("missed", "missed")
    assert found["long-tail perplexity, default CSE / Switch"] == ("not measured", "not measured")
    assert found["probe accuracy on sst2, default CSE minus dense"] == ("not measured", "")
    assert found["probe accuracy on cola, default CSE minus dense"] == ("missed", "")
    assert found["probe matthews correlation on cola, default CSE minus dense"] == ("reached", "")
    tasks = next(entry for name, entry in verdicts.items() if name.startswith("mean probe accuracy on long-tail"))
    # overruling by the legal stage, gad by the medical one
    assert tasks["value"]["value"] == pytest.approx(0.75 - (0.625 + 0.6875) / 2) and "`dense_*`" in tasks["note"]
    assert tasks["must_verdict"] == tasks["aim_verdict"] == "reached"


def test_a_task_tells_its_own_metric_where_that_is_not_accuracy(outcome):
    """By accuracy `cse` loses on cola, by the correlation that its penalty is chosen by it wins."""
    page, _, _ = outcome
    assert row(page, "Tasks", "cse")[-1].startswith("25.0 (-25.0")
    probe, tuning = page.partition("The metrics that")[2].partition("## Forgetting")[0].split("Full fine-tuning:")
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in probe.splitlines() if line.startswith("|")]
    found = {name: cell for name, _, cell in table[2:]}
    assert table[0] == ["arm", "seeds", "cola, matthews_correlation"] and set(found) == set(ARMS) - {"oracle"}
    assert found["dense"] == "0.000" and found["cse"].startswith("0.250 (0.250 [")
    assert found["dense_medical"].startswith("0.188 (0.188 [") and tuning.strip() == "Not measured."


def test_every_number_has_its_run(outcome, records):
    page, results, folder = outcome
    assert {(run["arm"], run["seed"]) for run in records} == {(arm, seed) for arm in ARMS for seed in range(3)}
    assert results["runs"] == 15 and "15 runs on one abacus" in page
    for run in records:
        assert (run["date"], run["machine"], run["versions"]) == ("2026-02-03", "one abacus", {"torch": "9.9"})
        assert f"--arm {run['arm']} --seed {run['seed']} --size tiny" in run["command"]
        assert run["settings"]["arm"] == ARMS[run["arm"]].settings()
    assert not any(str(folder.parent) in path.read_text() for path in folder.rglob("*.json"))
    for name in ("ratios", "positions"):
        assert (folder / f"tiny-main-{name}.png").read_bytes().startswith(b"\x89PNG")


def test_a_domain_stage_costs_what_came_before_too(records):
    cost = {run["arm"]: run["cost"] for run in records if run["seed"] == 0}
    tokens = STEPS * BATCH * BLOCK
    assert cost["dense"]["tokens"] == tokens and cost["dense_legal"]["tokens"] == 2 * tokens
    assert cost["dense_legal"]["flops"] == 2 * cost["dense"]["flops"] and cost["dense_legal"]["seconds"] == 200
    # of 20 steps 5 were dense; 0.2 of the training text is routed for 3 / 4 of its tokens
    cse = cost["cse"]
    expert = 6 * 0.15 * 2 * 16 * 64
    assert cse["per_token"]["flops"] - cse["per_token"]["dense_flops"] == pytest.approx(expert + 2 * 16 * 16)
    mean = (cse["per_token"]["dense_flops"] + 3 * cse["per_token"]["flops"]) / 4
    assert cse["flops"] == pytest.approx(tokens * mean)


def test_what_was_not_run_is_not_measured(tmp_path, corpus, place):
    (tmp_path / "tiny" / "main").mkdir(parents=True)
    results = tmp_path / "out"
    with pytest.raises(ValueError, match="corpus='main' is not allowed: keep.py has kept no runs"):
        report.write_report(results, "tiny", "main", ROLES)
    keep.keep(tmp_path / "tiny", place, results)
    empty = report.write_report(results, "tiny", "main", ROLES).read_text()
    assert empty.count("| not measured |") == 12 and "reached" not in empty and "missed" not in empty
    for name in ("dense", "cse"):
        write_run(tmp_path / "tiny" / "main", ARMS[name], 0, corpus)
    keep.keep(tmp_path / "tiny", place, results)
    single = report.write_report(results, "tiny", "main", ROLES).read_text()
    gain = 0.8 ** (23 / 31)  # of a fifth of all text
    assert row(single, "Arms", "cse")[4:8] == [f"{gain:.3f}", "1.000", f"{gain**0.2:.3f}", "not measured"]
    verdict = row(single, "Against what was asked for", "long-tail perplexity, default CSE / dense")
    assert "1 of 3 seeds" in verdict[1] and verdict[2].endswith("not measured")


def test_records_stay_when_folders_go(tmp_path, corpus, place):
    folder, results = tmp_path / "tiny" / "main", tmp_path / "out"
    for name in ("dense", "cse"):
        write_run(folder, ARMS[name], 0, corpus)
    keep.keep(tmp_path / "tiny", place, results)
    shutil.rmtree(folder)
    for name in ("dense", "cse"):
        write_run(folder, ARMS[name], 1, corpus, machine="two abaci")
    write_run(folder, ARMS["dense"], 0, corpus, tasks={"gad": 0.5}, machine="two abaci")
    keep.keep(tmp_path / "tiny", place, results)
    found = {(run["arm"], run["seed"]): run for run in keep.read_records(results / "tiny" / "main")}
    machines = {name: run["machine"] for name, run in found.items()}
    assert machines.pop(("cse", 0)) == "one abacus" and set(machines.values()) == {"two abaci"}
    assert found["dense", 0]["tasks"] == {"probe": {"gad": 0.5}}
    by_domain = {"general": 2.0, "legal": 3.0, "medical": 4.0}
    assert found["dense", 0]["validation"] == {**by_domain, "long-tail": pytest.approx(math.sqrt(3 * 4))}
    page = report.write_report(results, "tiny", "main", ROLES).read_text()
    assert "1 runs on one abacus" in page and "3 runs on two abaci" in page and row(page, "Arms", "cse")[1] == "2"


def test_the_gain_by_share_takes_corpora_beside_it(tmp_path, corpus, place):
    other, results = write_corpus(tmp_path / "share-2", shares=(0.96, 0.02, 0.02)), tmp_path / "out"
    for name in ("dense", "cse"):
        write_run(tmp_path / "tiny" / "main", ARMS[name], 0, corpus)
        write_run(tmp_path / "tiny" / "share-2", ARMS[name], 0, other)
    for folder in (place, tmp_path / "share-2"):
        keep.keep(tmp_path / "tiny", folder, results)
    rows = report.share_rows(results / "tiny", "main", ROLES)
    assert [(entry["corpus"], entry["domain"], entry["share"]) for entry in rows] == [
        ("share-2", "legal", 0.02), ("share-2", "medical", 0.02), ("main", "legal", 0.1), ("main", "medical", 0.1)
    ]  # fmt: skip
    assert all(entry["default"].value == pytest.approx(0.8 ** (23 / 31), rel=1e-3) for entry in rows)
    assert report.draw_shares(rows, tmp_path / "shares.png") and (tmp_path / "shares.png").is_file()


def test_a_resumed_run_without_a_stopwatch_has_no_seconds(tmp_path, corpus):
    run = write_run(tmp_path, ARMS["dense"], 0, corpus)
    assert run_cost(run, None, corpus.tokenizer).seconds == 100
    run.result["resumed"] = True
    assert run_cost(run, None, corpus.tokenizer).seconds is None
    (run.folder / "seconds.jsonl").write_text("")
    assert run_cost(run, None, corpus.tokenizer).seconds == 100


def test_the_last_model_of_a_stage_is_an_arm_of_its_own(tmp_path, corpus):
    best = write_run(tmp_path / "tiny" / "main", ARMS["dense_legal"], 0, corpus)
    last = write_run(tmp_path / "tiny" / "main", replace(ARMS["dense_legal"], name="dense_legal_last"), 0, corpus)
    for name in ("run.json", "metrics.jsonl"):
        (last.folder / name).unlink()
    runs = read_runs(tmp_path / "tiny" / "main")
    assert [run.arm.name for run in runs] == ["dense_legal", "dense_legal_last"]
    assert runs[1].log == best.log and runs[1].command == best.command and runs[1].settings != best.settings


def test_runs_that_do_not_belong_together_are_refused(tmp_path, corpus, place):
    folder = tmp_path / "tiny" / "main"
    write_run(folder, ARMS["dense"], 0, corpus)
    write_run(folder, replace(ARMS["dense"], training={"learning_rate": 1.0}), 1, corpus)
    with pytest.raises(ValueError, match="arm=.dense. is not allowed: seed 1"):
        keep.keep(tmp_path / "tiny", place, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    alone = tmp_path / "alone" / "main"
    write_run(alone, ARMS["dense"], 0, corpus)
    by_now = {"dense": replace(ARMS["dense"], training={"max_steps": 3})}
    with pytest.raises(ValueError, match="arm='dense' is not allowed: seed 0 ran with other settings"):
        keep.keep(alone.parent, place, tmp_path / "out", by_now)
    assert keep.keep(alone.parent, place, tmp_path / "out", ARMS)
    write_run(tmp_path / "stage", ARMS["dense_legal"], 0, corpus)
    with pytest.raises(ValueError, match="start='dense'"):
        keep.starts(read_runs(tmp_path / "stage"))


@pytest.mark.parametrize("name", ["size", "mixture", "steps"])
def test_a_kept_record_of_another_table_is_refused(tmp_path, corpus, place, name):
    folder = tmp_path / "tiny" / "main"
    write_run(folder, ARMS["dense"], 0, corpus)
    (path,) = keep.keep(tmp_path / "tiny", place, tmp_path / "out")
    record = json.loads(path.read_text())
    record["settings"][name], record["arm"] = 5, "other"
    path.with_name("other-0.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=f"{name}=.* is not allowed beside"):
        keep.keep(tmp_path / "tiny", place, tmp_path / "out")
    with pytest.raises(ValueError, match=f"{name}=.* is not allowed beside"):
        report.write_report(tmp_path / "out", "tiny", "main", ROLES)


def test_tasks_that_were_measured_in_another_way_are_refused(tmp_path, corpus, place):
    """Each run has a model of its own; rows, precision and penalties are one for all."""
    folder, results = tmp_path / "tiny" / "main", tmp_path / "out"
    for name in ("dense", "cse"):
        write_run(folder, ARMS[name], 0, corpus, tasks={"gad": 0.5})
    paths = keep.keep(tmp_path / "tiny", place, results)
    found = {path.stem: json.loads(path.read_text())["task_settings"]["probe"] for path in paths}
    assert found["cse-0"] == {"model": "cse 0", "rows": [1000, 500, 1000], "bf16": False}
    write_run(folder, ARMS["cse"], 1, corpus, tasks={"gad": 0.5}, measured={"bf16": True})
    with pytest.raises(ValueError, match=r"task_settings\['probe'\]=.*True.* is not allowed in cse-1 beside .*False"):
        keep.keep(tmp_path / "tiny", place, results)
    assert not (results / "tiny" / "main" / "cse-1.json").exists()
    shutil.rmtree(folder / "cse-1")


def test_tasks_that_do_not_say_how_they_were_measured_were_measured_with_copies(tmp_path, corpus, place):
    folder, results = tmp_path / "tiny" / "main", tmp_path / "out"
    write_run(folder, ARMS["dense"], 0, corpus, tasks={"gad": 0.5}, measured={"without_copies": False})
    (path,) = keep.keep(tmp_path / "tiny", place, results)
    for seed in (1, 2):
        silent = {**json.loads(path.read_text()), "task_settings": {}, "seed": seed}
        path.with_name(f"dense-{seed}.json").write_text(json.dumps(silent))
    assert len(keep.read_records(path.parent)) == 3
    write_run(folder, ARMS["cse"], 0, corpus, tasks={"gad": 0.5}, measured={"without_copies": True})
    with pytest.raises(ValueError, match=r"'without_copies': True\} is not allowed in cse-0 beside .*False"):
        keep.keep(tmp_path / "tiny", place, results)


def test_runs_of_another_mixture_are_refused(tmp_path, corpus, place):
    write_run(tmp_path / "tiny" / "main", ARMS["dense"], 0, replace(corpus, mixture=replace(corpus.mixture, tokens=1)))
    with pytest.raises(ValueError, match="corpus='main' is not allowed: its mixture is not that of the runs"):
        keep.keep(tmp_path / "tiny", place, tmp_path / "out")


def test_losses_of_other_blocks_are_refused(tmp_path, corpus):
    run = write_run(tmp_path, ARMS["dense"], 0, corpus)
    run.result["test"]["perplexity"]["legal"] *= 1.01
    with pytest.raises(ValueError, match="the losses of its tokens"):
        record_of(run, None, TestBlocks.of(corpus))

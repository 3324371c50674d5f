# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""Promises of the long-tail benchmark's tasks: the same rows for every model, each task once, nothing mixed."""

import gzip
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny import tiny_model

from modeling_cse.data import train_tokenizer


EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "longtail_benchmark"
sys.path.insert(0, str(EXAMPLES))
import tasks as tool  # noqa: E402
from corpus import TEN_FOLDS  # noqa: E402


LOW, HIGH = "one two three four five", "six seven eight nine ten"
PAIRS, QUESTIONS = ("mrpc", "rte"), ("casehold",)


def row(task: str, generator: np.random.Generator, number: int) -> dict:
    """Low words are one class, high words the other; the right choice repeats the words of the question."""
    words = [" ".join(generator.permutation(each.split())[:4]) for each in (LOW, HIGH)]
    label = int(generator.integers(2))
    if task in QUESTIONS:
        right, wrong = words if label else words[::-1]
        return {"text": f"{right} (<HOLDING>)", "choices": [wrong, right] if number % 2 else [right, wrong]} | {
            "label": number % 2
        }
    if task in PAIRS:
        return {"text": "", "text_a": words[label], "text_b": words[label], "label": label}
    return {"text": words[label], "label": ["background", "result"][label]}


def write(folder: Path, task: str, counts: dict[str, int]) -> None:
    """No split has a row of another one."""
    (folder / task).mkdir(parents=True)
    seen: set[str] = set()
    for name, count in counts.items():
        generator, made = np.random.default_rng(len(name)), []
        while len(made) < count:
            each = row(task, generator, len(made))
            if repr(each) not in seen:
                made.append(each)
        seen.update(map(repr, made))
        if name == "all_10fold":
            made = [{**each, "fold": 1 + number % 10} for number, each in enumerate(made)]
        with gzip.open(folder / task / f"{name}.jsonl.gz", "wt") as file:
            file.writelines(json.dumps(each) + "\n" for each in made)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Tasks of every kind, and a model with its tokenizer."""
    folder = tmp_path_factory.mktemp("longtail")
    for task in ("scicite", "mrpc", "casehold", "cola"):
        write(folder / "tasks", task, {"train": 60, "validation": 20, "test": 30})
    write(folder / "tasks", "euadr", {"all_10fold": 40})
    tokenizer = train_tokenizer([LOW, HIGH, "( )"] * 20, kind="gpt2", vocab_size=300)
    tokenizer.save_pretrained(folder / "tokenizer")
    tiny_model("gpt2", vocab_size=len(tokenizer)).save_pretrained(folder / "model")
    return folder


def command(place: Path, output: Path, *extra: str) -> dict:
    paths = {"model": place / "model", "tokenizer": place / "tokenizer", "output": output, "tasks": place / "tasks"}
    tool.main([*(str(part) for name, path in paths.items() for part in (f"--{name}", path)), *extra])
    return json.loads(output.read_text())


def test_every_kind_of_task_is_probed_and_recorded(place, tmp_path):
    names = ["scicite", "mrpc", "casehold", "euadr"]
    record = command(place, tmp_path / "tasks.json", "--only", *names)["probe"]
    assert list(record["tasks"]) == names
    scicite, euadr = record["tasks"]["scicite"], record["tasks"]["euadr"]
    assert scicite["metric"] == "macro_f1" and scicite["domain"] == "academic" and scicite["train_rows"] == 60
    assert scicite["test"]["accuracy"] > 0.9 and scicite["test"]["macro_f1"] > 0.9
    assert scicite["test"]["rows"] == 30 and scicite["validation"]["rows"] == 20
    assert scicite["c"] in tool.GRID and scicite["seconds"] > 0
    assert record["tasks"]["mrpc"]["test"]["accuracy"] > 0.9
    assert record["tasks"]["casehold"]["test"]["rows"] == 30
    assert euadr["test"]["rows"] == euadr["validation"]["rows"] == 40  # every row is told once
    assert len(euadr["c"]) == 10 and euadr["train_rows"] == 32


def test_a_task_in_the_file_is_not_computed_again(place, tmp_path, monkeypatch):
    output = tmp_path / "tasks.json"
    command(place, output, "--only", "mrpc")
    asked = []
    monkeypatch.setattr(tool.Benchmark, "probe", lambda self, task, *rest: asked.append(task) or {"c": 1} | FAKE)
    record = command(place, output, "--only", "scicite", "mrpc")["probe"]["tasks"]
    assert asked == ["scicite"] and record["mrpc"]["seconds"] > 0 and record["scicite"]["c"] == 1


FAKE = {"metric": "accuracy", "test": {"accuracy": 0.5}, "seconds": 0.0, "domain": "academic"}


def test_numbers_of_other_settings_or_another_model_are_not_mixed(place, tmp_path):
    output = tmp_path / "tasks.json"
    command(place, output, "--only", "mrpc")
    before = output.read_text()
    with pytest.raises(ValueError, match="holds numbers with the settings"):
        command(place, output, "--only", "scicite", "--train_rows", "30")
    other = tmp_path / "other"
    tiny_model("gpt2", seed=1, vocab_size=300).save_pretrained(other)
    with pytest.raises(ValueError, match="holds numbers with the settings"):
        command(place, output, "--only", "scicite", "--model", str(other))
    assert output.read_text() == before


def test_fine_tuning_stands_beside_the_probe(place, tmp_path):
    output = tmp_path / "tasks.json"
    command(place, output, "--only", "mrpc")
    record = command(place, output, "--finetune", "--only", "mrpc", "casehold")
    assert list(record["probe"]["tasks"]) == ["mrpc"] and list(record["finetune"]["tasks"]) == ["mrpc", "casehold"]
    tuned = record["finetune"]["tasks"]["mrpc"]
    assert (
        tuned["test"]["accuracy"] > 0.6 and tuned["learning_rate"] in record["finetune"]["settings"]["learning_rates"]
    )


def test_two_methods_may_write_at_a_time(tmp_path):
    path, settings = tmp_path / "tasks.json", {"model": "m"}
    probe, finetune = tool.Record(path, "probe", settings), tool.Record(path, "finetune", settings)
    probe.add("cola", {"n": 1})
    finetune.add("gad", {"n": 2})
    probe.add("gad", {"n": 3})
    found = json.loads(path.read_text(encoding="utf-8"))
    assert found["probe"]["tasks"] == {"cola": {"n": 1}, "gad": {"n": 3}} == probe.tasks
    assert found["finetune"]["tasks"] == {"gad": {"n": 2}}


def test_a_capped_task_draws_the_same_rows_for_every_model(place):
    made = [
        tool.Rows.load(place / "tasks" / "scicite", tool.TASKS["scicite"], (10, 20, 30), seed) for seed in (0, 0, 1)
    ]
    assert [len(indices) for indices in made[0].folds[0]] == [10, 20, 30]
    assert made[0].rows == made[1].rows and made[0].rows[:10] != made[2].rows[:10]
    more = tool.Rows.load(place / "tasks" / "scicite", tool.TASKS["scicite"], (20, 20, 30), 0)
    texts = [each["text"] for each in more.rows[:20]]
    assert all(each["text"] in texts for each in made[0].rows[:10])


def test_a_row_of_two_splits_is_left_out_of_the_earlier_one(tmp_path):
    texts = {"train": "abcdeb", "validation": "cfgh", "test": "dhij"}
    (tmp_path / "sst2").mkdir()
    for split, letters in texts.items():
        with gzip.open(tmp_path / "sst2" / f"{split}.jsonl.gz", "wt") as file:
            file.writelines(json.dumps({"text": letter, "label": 0}) + "\n" for letter in letters)
    told = []
    for without_copies in (True, False):
        rows = tool.Rows.load(tmp_path / "sst2", tool.TASKS["sst2"], (9, 9, 9), 0, without_copies)
        told.append(["".join(sorted(rows.rows[i]["text"] for i in fold)) for fold in rows.folds[0]])
    assert told == [["abbe", "cfg", "dhij"], ["abbcde", "cfgh", "dhij"]]


def test_copies_are_kept_as_they_were_where_that_is_asked_for(place, tmp_path):
    record = command(place, tmp_path / "tasks.json", "--only", "mrpc", "--with_copies")
    assert record["probe"]["settings"]["without_copies"] is False
    with pytest.raises(ValueError, match="'without_copies': False"):
        command(place, tmp_path / "tasks.json", "--only", "cola")


def test_the_corpus_knows_which_tasks_are_tested_on_all_rows():
    assert set(TEN_FOLDS) == {name for name, task in tool.TASKS.items() if task.ten_folds}


def test_folds_share_no_row_and_each_is_the_test_once(place):
    rows = tool.Rows.load(place / "tasks" / "euadr", tool.TASKS["euadr"], (), 0)
    for train, validation, test in rows.folds:
        assert sorted([*train, *validation, *test]) == list(range(40))
    assert sorted(np.concatenate([test for _, _, test in rows.folds])) == list(range(40))


def test_the_majority_is_that_of_train(place):
    rows = tool.Rows.load(place / "tasks" / "cola", tool.TASKS["cola"], (60, 20, 30), 0)
    train, _, test = rows.folds[0]
    most = np.bincount(rows.labels[train]).argmax()
    assert rows.majority() == pytest.approx(np.mean(rows.labels[test] == most))


def test_what_cannot_be_measured_is_refused_by_name(place, tmp_path):
    with pytest.raises(ValueError, match=r"only=\['sst3'\] is not allowed"):
        command(place, tmp_path / "a.json", "--only", "sst3")
    with pytest.raises(ValueError, match="must hold train.jsonl.gz"):
        command(place, tmp_path / "a.json", "--only", "sst2")
    given = tmp_path / "given"
    tiny_model("gpt2", cse_routing="given", vocab_size=300).save_pretrained(given)
    with pytest.raises(ValueError, match="cse_routing='given'"):
        command(place, tmp_path / "a.json", "--only", "mrpc", "--model", str(given))
    assert not (tmp_path / "a.json").exists()


def test_the_folder_may_come_from_the_environment(place, tmp_path, monkeypatch):
    output = tmp_path / "tasks.json"
    paths = ["--model", str(place / "model"), "--tokenizer", str(place / "tokenizer"), "--output", str(output)]
    monkeypatch.delenv("CSE_TASKS", raising=False)
    with pytest.raises(SystemExit):
        tool.main([*paths, "--only", "mrpc"])
    monkeypatch.setenv("CSE_TASKS", str(place / "tasks"))
    tool.main([*paths, "--only", "mrpc"])
    assert list(json.loads(output.read_text())["probe"]["tasks"]) == ["mrpc"]


def test_a_masked_model_is_probed_too(place, tmp_path):
    tokenizer = train_tokenizer([LOW, HIGH] * 20, kind="bert", vocab_size=300)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    vocabulary = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    tiny_model("bert", **vocabulary).save_pretrained(tmp_path / "model")
    arguments = ["--only", "mrpc", "--model", str(tmp_path / "model"), "--tokenizer", str(tmp_path / "tokenizer")]
    record = command(place, tmp_path / "tasks.json", *arguments)
    assert record["probe"]["tasks"]["mrpc"]["test"]["accuracy"] > 0.9


def test_the_report_takes_the_long_tail_together():
    numbers = {"legal": [0.5, 0.7], "medical": [0.9], "general": [0.1]}
    tasks = {
        f"{domain}{i}": {"domain": domain, "test": {"accuracy": value}}
        for domain, values in numbers.items()
        for i, value in enumerate(values)
    }
    expected = {"legal": 0.6, "medical": 0.9, "general": 0.1, "long tail": 0.7}
    assert tool.report(tasks) == pytest.approx(expected)

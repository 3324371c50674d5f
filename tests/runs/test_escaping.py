# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""Names that come from data are shown by reports, cards and pictures, and do nothing else there."""

import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from matplotlib import cbook
from matplotlib.figure import Figure
from tiny import SIZES

from modeling_cse import CSEGPT2Config
from modeling_cse.analysis import plot_run
from modeling_cse.analysis.clusters import ClusterView, plot_reclustering
from modeling_cse.analysis.style import LONGEST_LABEL, plain
from modeling_cse.hub import write_model_card
from modeling_cse.runs import GPT2, pretrain, report


NAMES = {
    "a table cell": "law | 0.01 |\n| --- |",
    "a heading": "law\n# law\n---",
    "a tag": "<script>alert(1)</script><img src=x onerror=alert(1)>",
    "a link": "[law](javascript:alert(1)) ![x](http://a.b/c.png) <http://a.b>",
    "code": "`law` ```law```",
    "a template": "{{ 7 * 191 }} {% raw %}",
    "YAML": '!!python/object/apply:os.system ["x"] # : - & *a "',
    "formulas": r"$x^2$ \$y$ $\frac{1}{2$",
    "a terminal": "\x1b[31mlaw\x07\x00 \u202elaw",
    "half a character": "law \ud800",
    "length": "law" * 2000,
}


@pytest.fixture
def drawn(monkeypatch) -> list[Figure]:
    """The figures that are saved."""
    figures, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **kw: (figures.append(self), save(self, *args, **kw)))
    return figures


@pytest.fixture(params=NAMES.values(), ids=NAMES.keys())
def name(request):
    return request.param


def cells(line: str) -> int:
    """Cells of a row, as GitHub divides it: an escaped bar is no border."""
    return len(re.findall(r"(?<!\\)\|", line)) - 1


def assert_shows_only(text: str, rows: int, columns: int) -> None:
    """A table of so many rows and columns, in which nothing is markup."""
    lines = text.splitlines()
    assert len(lines) == rows and {cells(line) for line in lines} == {columns}
    assert not re.search(r"[<>`\x00-\x09\x0b-\x1f\x7f\u202e\ud800]|(?<!\\)[$\[\]]|https?:", text)
    text.encode("utf-8")


def test_tables_of_a_report_keep_their_shape(name):
    table = report.perplexity_table({"cse": {name: 2.0, "all": 2.0}, name: {name: 3.0, "all": 3.0}})
    assert_shows_only(table, rows=4, columns=3)
    assert "2.00 | 3.00" in table


def test_what_a_report_prints_stays_on_its_line(name, tmp_path, monkeypatch, capsys):
    """The name of a domain, and what the model says."""
    (tmp_path / "cse").mkdir()
    (tmp_path / "cse" / "metrics.jsonl").write_text("")
    model = SimpleNamespace(can_generate=lambda: True, config=CSEGPT2Config(**SIZES["gpt2"]))
    model.config.save_pretrained(tmp_path / "cse")
    monkeypatch.setattr(report, "_experts", lambda *arguments: [])
    monkeypatch.setattr(report, "evaluate_by_domain", lambda *arguments: {name: 2.0})
    monkeypatch.setattr(report, "expert_shares", lambda *arguments: [0.5])
    monkeypatch.setattr(report, "plot_run", lambda *arguments: None)
    monkeypatch.setattr(report, "complete", lambda *arguments: name)
    settings = {"settings": {}, "prompt": "", "base_model": None, "data": {name: name}, "hardware": name}
    report.report_run(tmp_path, {"cse": model}, {name: [1]}, lambda blocks: blocks, **settings)
    printed = capsys.readouterr().out
    assert len(printed.splitlines()) == 8 and not re.search(r"[\x00-\x09\x0b-\x1f\u202e\ud800]", printed)
    assert "50.0%" in printed and json.loads((tmp_path / "report.json").read_text())["sentence"] == name


def test_metadata_of_a_card_is_plain_text(name, tmp_path):
    facts = {"config": CSEGPT2Config(**SIZES["gpt2"]), "recipe": {name: name}, "data": {name: {"dataset": name}}}
    write_model_card(tmp_path, results={"cse": {name: 2.0}}, base_model=name, license=name, **facts)
    block, body = (tmp_path / "README.md").read_text(encoding="utf-8").removeprefix("---\n").split("\n---\n", 1)
    found = yaml.safe_load(block)
    assert found["library_name"] == "transformers" and "!!" not in re.sub(r"'[^']*'|\"[^\"]*\"", "", block)
    assert len(found["model-index"][0]["results"]) == 1 and "1337" not in body
    assert not re.search(r"(?m)^#+ law|^---$", body)
    for table in re.findall(r"(?:^\|.*\n)+", body, re.MULTILINE):
        assert len({cells(line) for line in table.splitlines()}) == 1


def test_pictures_draw_it_as_it_is(name, tmp_path):
    entries = [{"step": step, "loss": 2.0, f"eval_{name}_perplexity": 3.0} for step in (1, 2)]
    plot_run({name: entries}, {name: [0.5]}, tmp_path / "run.png")
    assert (tmp_path / "run.png").stat().st_size > 1000
    shown = plain(name)
    assert len(shown.replace("\\", "")) <= LONGEST_LABEL and shown.isprintable()
    assert not cbook.is_math_text(shown)


def test_a_domain_may_be_called_as_the_picture_calls_its_own_things(tmp_path, drawn):
    entries = [{"step": 1, "eval_a\nb_perplexity": 3.0}]
    plot_run({"cse": entries}, None, tmp_path / "run.png")
    assert [text.get_text() for text in drawn[0].axes[1].get_legend().get_texts()] == ["a b"]
    points = np.arange(12.0).reshape(6, 2) ** 2
    domains = ["common", "centroid", "expert 0"] * 2
    view = ClusterView(points, np.array([0, 1] * 3), points[:2], np.array([-1, 0]), domains, step=1)
    plot_reclustering(view, view, tmp_path / "clusters.png")
    (legend,) = drawn[1].legends
    assert sorted(text.get_text() for text in legend.get_texts()) == sorted([*domains[:3]] * 2)


def test_a_run_over_data_with_such_names_ends_well(tmp_path):
    names = ["general", NAMES["a table cell"] + NAMES["a tag"], NAMES["a link"] + NAMES["a terminal"]]
    words = ["plain words of any kind", "court law judge plea", "dose drug nurse ward"]
    for split, count in (("train", 60), ("validation", 6)):
        rows = [{"text": f"{words[n % 3]} {n} " * 12, "domain": names[n % 3]} for n in range(count)]
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"train_file": tmp_path / "train.jsonl", "validation_file": tmp_path / "validation.jsonl"}
    options |= {"domain_column": "domain", "tokenizer_vocab_size": 300, "block_size": 32, "max_steps": 4, "warmup": 2}
    options |= {"num_clusters": 3, "sample_size": 8, "per_device_train_batch_size": 4, "use_cpu": True}
    options |= {"config_overrides": "n_embd=32,n_layer=2,n_head=4,n_positions=32", "output_dir": tmp_path / "run"}
    options |= {"report_to": "none", "disable_tqdm": True, "eval_strategy": "epoch", "logging_steps": 1}
    found = pretrain(GPT2, [part for flag, value in options.items() for part in (f"--{flag}", str(value))])
    assert set(found["perplexity"]["cse"]) == {*names, "all"}
    assert_shows_only((tmp_path / "run" / "report.md").read_text(encoding="utf-8"), rows=6, columns=2)
    assert (tmp_path / "run" / "figure.png").is_file() and (tmp_path / "run" / "cse" / "README.md").is_file()

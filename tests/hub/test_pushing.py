# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""Promises of pushing: what a Trainer or a model uploads, a stranger without this package loads and uses.

The Hub is a stand-in on this machine (`stand_in.py`) that speaks its HTTP API; each client is a process of its own
with an empty cache, because `huggingface_hub` reads its endpoint when it is imported.
"""

import json
import os
import runpy
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file
from stand_in import USER, StandIn
from tiny import EVIDENCE, tiny_config, tiny_model
from tiny_runs import make_trainer, settings

from modeling_cse import ClusterExpertsCallback


ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent

TRAIN = """
import sys
sys.path[:0] = {paths!r}
from hub_tiny import texts, tokenizer
from tiny import EVIDENCE, tiny_model
from tiny_runs import make_trainer, settings
from modeling_cse import ClusterExpertsCallback, ModelCardCallback

data = [{{"input_ids": row["input_ids"], "labels": row["input_ids"]}} for row in texts(seed=0)]
callback = ClusterExpertsCallback(**settings(algorithm="text", sample_size=48))
trainer = make_trainer("run", callback, model=tiny_model("gpt2", **EVIDENCE), data=data, push_to_hub=True,
                       hub_model_id="{user}/tiny-cse", **{options!r})
trainer.processing_class = tokenizer()
trainer.eval_dataset = {{"law": data[4:6]}}
ModelCardCallback(texts=texts(), license="mit").attach(trainer)
trainer.train()
trainer.evaluate()
trainer.push_to_hub()
"""

RUN_SCRIPT = """
import runpy, sys
sys.path[:0] = [{root!r}, {root!r} + "/examples"]
sys.argv = {words!r}
runpy.run_path(sys.argv[0], run_name="__main__")
"""

# A stranger has torch and transformers; the package is made impossible to import.
STRANGER = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "modeling_cse":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
from transformers import AutoModelForCausalLM, AutoTokenizer

options = {{"trust_remote_code": True, "revision": {revision!r}}}
tokenizer = AutoTokenizer.from_pretrained("{user}/tiny-cse", **options)
model = AutoModelForCausalLM.from_pretrained("{user}/tiny-cse", **options).eval()
modules = model.base_model.routed_modules().values()
inputs = tokenizer("wdi wdj weh", return_tensors="pt")
out = model.generate(**inputs, max_new_tokens=3, do_sample=False, pad_token_id=0)
print(type(model).__name__, [module.router.num_clusters for module in modules], out.shape[1])
"""


@pytest.fixture
def hub():
    with StandIn() as server:
        yield server
        assert server.refused == []


def client(hub: StandIn, folder: Path, code: str) -> str:
    """Runs a program in a process with an empty cache, without the package on its path. What it prints last."""
    folder.mkdir(exist_ok=True)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PYTHON"))}
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=folder,
        env={**kept, **hub.environment(folder / "cache")},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout.strip().splitlines()[-1]


def train(hub: StandIn, folder: Path, **options) -> dict[str, dict[str, bytes]]:
    """A run that is pushed; the repository's branches."""
    paths = [str(ROOT), str(HERE), str(HERE.parent)]
    client(hub, folder, TRAIN.format(paths=paths, user=USER, options=options))
    return hub.repositories[f"{USER}/tiny-cse"]


def load(hub: StandIn, folder: Path, revision: str = "main") -> str:
    return client(hub, folder, STRANGER.format(user=USER, revision=revision))


@pytest.mark.slow
def test_a_stranger_loads_what_a_trainer_pushed_and_reads_its_card(hub, tmp_path):
    files = train(hub, tmp_path / "owner")["main"]
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md", "modeling_cse_gpt2.py"} <= set(files)
    assert load(hub, tmp_path / "stranger") == "CSEGPT2ForCausalLM [3, 3] 6"
    card = ModelCard(files["README.md"].decode())
    assert card.data.license == "mit" and card.data.eval_results[0].dataset_name == "law"
    assert f'source = "{USER}/tiny-cse"' in card.text and "## The experts" in card.text
    assert not [path for path in files if path.startswith("checkpoint-")]


@pytest.mark.slow
def test_checkpoints_are_pushed_with_their_code(hub, tmp_path):
    """`hub_strategy="all_checkpoints"`: each is a folder beside the model, with its code."""
    # otherwise the Trainer leaves a checkpoint out while it still uploads the one before
    saving = {"save_strategy": "steps", "save_steps": 5, "save_only_model": True, "hub_always_push": True}
    files = train(hub, tmp_path / "owner", hub_strategy="all_checkpoints", **saving)["main"]
    for name in ("config.json", "model.safetensors", "modeling_cse_gpt2.py"):
        assert {f"checkpoint-5/{name}", f"checkpoint-10/{name}"} <= set(files)
    assert not [path for path in files if "cluster_state" in path]  # it holds text of the training data
    assert load(hub, tmp_path / "stranger") == "CSEGPT2ForCausalLM [3, 3] 6"


@pytest.mark.slow
def test_the_example_shares_what_lies_in_a_folder(hub, tmp_path):
    train(hub, tmp_path / "owner")
    hub.repositories.clear()
    words = [str(ROOT / "examples" / "share_on_the_hub.py"), "--model", "run", "--repo", f"{USER}/tiny-cse"]
    words += ["--license", "mit", "--language", "la"]
    words += ["--data", str(ROOT / "examples" / "data" / "validation.jsonl.gz")]
    client(hub, tmp_path / "owner", RUN_SCRIPT.format(root=str(ROOT), words=words))
    files = hub.repositories[f"{USER}/tiny-cse"]["main"]
    card = ModelCard(files["README.md"].decode())
    assert (card.data.license, card.data.language) == ("mit", ["la"]) and f'source = "{USER}/tiny-cse"' in card.text
    assert load(hub, tmp_path / "stranger") == "CSEGPT2ForCausalLM [3, 3] 6"


def share(monkeypatch, *words) -> None:
    """The example, in this process."""
    monkeypatch.setattr(sys, "argv", ["share_on_the_hub.py", *map(str, words)])
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    runpy.run_path(str(ROOT / "examples" / "share_on_the_hub.py"), run_name="__main__")


@pytest.fixture
def finished(tmp_path) -> Path:
    """The folder of a run with its twin, as far as a card needs it."""
    report = {"perplexity": {}, "recipe": {}, "data": {}, "base_model": None, "experts": [], "datasets": []}
    (tmp_path / "report.json").write_text(json.dumps(report), encoding="utf-8")
    tiny_config("gpt2", **EVIDENCE).save_pretrained(tmp_path / "cse")
    tiny_config("gpt2", cse_layers=[]).save_pretrained(tmp_path / "dense")
    return tmp_path


def test_the_example_does_not_describe_experts_by_text_that_nobody_named(tmp_path, monkeypatch):
    """A folder of which no run tells anything: its card would quote the sample corpus."""
    tiny_config("gpt2", **EVIDENCE).save_pretrained(tmp_path)
    with pytest.raises(SystemExit, match="--data"):
        share(monkeypatch, "--model", tmp_path)
    assert not (tmp_path / "README.md").exists()


def test_the_example_takes_the_card_of_a_run_for_its_cse_model_alone(finished, monkeypatch, capsys):
    with pytest.raises(SystemExit, match="dense is not allowed: it must have a layer with experts"):
        share(monkeypatch, "--model", finished / "dense")
    assert not list(finished.glob("*/README.md"))
    monkeypatch.chdir(finished / "cse")
    share(monkeypatch, "--model", ".")
    assert (finished / "cse" / "README.md").is_file() and "card: README.md" in capsys.readouterr().out


def test_the_example_refuses_text_that_it_would_not_read_and_folders_that_are_not_there(finished, monkeypatch):
    with pytest.raises(SystemExit, match="--data nothere.txt is not allowed"):
        share(monkeypatch, "--model", finished / "cse", "--data", "nothere.txt")
    with pytest.raises(SystemExit, match="nothere: there is no such folder"):
        share(monkeypatch, "--model", finished / "nothere")
    assert not list(finished.glob("*/README.md"))


class Uploads:
    """Of the Hub's client: what it would upload."""

    found: list[str] = []

    def create_repo(self, *_, **options):
        pass

    def upload_folder(self, *, repo_id, folder_path, ignore_patterns):
        names = [path.relative_to(folder_path).as_posix() for path in folder_path.rglob("*") if path.is_file()]
        type(self).found = sorted(filter_repo_objects(names, ignore_patterns=ignore_patterns))


def test_the_example_shares_a_checkpoint_without_the_text_of_its_training(finished, monkeypatch):
    """The sample for the next fit lies there as token ids."""
    callback = ClusterExpertsCallback(**settings(algorithm="text", sample_size=48))
    saving = {"save_strategy": "steps", "save_steps": 5, "max_steps": 9}  # 5: before the fit at 6
    make_trainer(finished, callback, model=tiny_model("gpt2", **EVIDENCE), **saving).train()
    shutil.rmtree(finished / "cse")
    (finished / "checkpoint-5").rename(finished / "cse")
    kept = load_file(finished / "cse" / "cluster_state_rank0.safetensors")
    assert any(name.endswith(".ids") and tensor.numel() for name, tensor in kept.items())
    monkeypatch.setattr("huggingface_hub.HfApi", Uploads)
    share(monkeypatch, "--model", finished / "cse", "--repo", f"{USER}/tiny-cse")
    uploaded = {name for name in Uploads.found if not name.endswith(".py")}
    assert uploaded == {"README.md", "config.json", "generation_config.json", "model.safetensors"}


@pytest.mark.slow
def test_a_model_is_pushed_as_a_revision(hub, tmp_path):
    train(hub, tmp_path / "owner")
    code = f"""
    import sys
    sys.path.insert(0, {str(ROOT)!r})
    from transformers import AutoModelForCausalLM, AutoTokenizer
    import modeling_cse
    model = AutoModelForCausalLM.from_pretrained("run")
    model.push_to_hub("{USER}/tiny-cse", revision="smaller")
    AutoTokenizer.from_pretrained("run").push_to_hub("{USER}/tiny-cse", revision="smaller")
    print("pushed")
    """
    assert client(hub, tmp_path / "owner", code) == "pushed"
    branches = hub.repositories[f"{USER}/tiny-cse"]
    assert set(branches) == {"main", "smaller"} and "modeling_cse_gpt2.py" in branches["smaller"]
    assert load(hub, tmp_path / "stranger", "smaller") == "CSEGPT2ForCausalLM [3, 3] 6"

# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""Promises of the speed benchmark: fair opponents, honest counting, results that add up. Nothing here is timed."""

import json
import platform

import pytest
import torch
from tiny import activate, routed_modules, tiny_config, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.speed import report
from benchmarks.speed.__main__ import main
from benchmarks.speed.calibration import biases_for, calibrate, entering
from benchmarks.speed.contenders import NAMES, Contender, build, cse_config, dense_weights
from benchmarks.speed.interleaving import Ratio, Stopwatch, interleave
from benchmarks.speed.memory import measure_training, peak_bytes
from benchmarks.speed.opponents import MixtralFFN, NaiveFFN, mixtral_config
from benchmarks.speed.results import KEY, key_of
from benchmarks.speed.shapes import SHAPES, Shape


SMALL = Shape(layers=3, width=32, heads=4, vocab=99)
QUICK = ["--smoke", "--rounds", "2", "--length", "16", "--tokens", "4", "--batch_sizes", "2"]
QUICK += ["--decoding_batch_sizes", "1"]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def base():
    return dense_weights(SMALL)


class Operations(TorchDispatchMode):
    """Names of the operations that ran, with the type of their first argument."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if args and isinstance(args[0], torch.Tensor):
            self.seen.add((func.overloadpacket.__name__, args[0].dtype))
        return func(*args, **(kwargs or {}))


def test_contenders_take_turns_and_warm_up_rounds_do_not_count():
    order = []
    seconds = iter(range(100))

    def sampler(name):
        return lambda: order.append(name) or next(seconds)

    samples = interleave({name: sampler(name) for name in "abc"}, rounds=3, warmup=1)
    assert "".join(order) == "cab" + "abc" + "bca" + "cab"
    assert samples == {"a": [3, 8, 10], "b": [4, 6, 11], "c": [5, 7, 9]}


def test_ratios_are_paired_by_round():
    # medians of each give 3 / 2; round by round it is always 2, but for one round
    ratio = Ratio.paired([2.0, 4.0, 20.0, 3.0, 2.0], [1.0, 2.0, 10.0, 2.0, 1.0])
    assert (ratio.median, ratio.low, ratio.high) == (2.0, 2.0, 2.0)
    assert Ratio.paired([1.0, 2.0, 3.0], [1.0, 1.0, 1.0]) == Ratio(2.0, 1.5, 2.5)
    with pytest.raises(ValueError, match="samples=2"):
        Ratio.paired([1.0, 2.0], [1.0])


def test_a_stopwatch_repeats_short_calls_and_not_long_ones(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("benchmarks.speed.interleaving.timer", lambda: clock[0])
    calls = []

    def call():
        calls.append(1)
        clock[0] += 0.01

    watch = Stopwatch(call, least=0.05)
    assert [round(watch(), 6) for _ in range(3)] == [0.01] * 3
    assert len(calls) == 1 + 1 + 5


@pytest.mark.parametrize("name", ["cse_replace", "cse_add"])
@pytest.mark.parametrize("share", [0.3, 0.6])
def test_routers_send_the_wanted_share_evenly_to_all_experts(base, name, share):
    contender = build(name, SMALL, base, "cpu")
    ids = SMALL.token_ids(4, 64)
    assert calibrate(contender, ids, share) == pytest.approx(share, abs=0.02)
    modules = list(routed_modules(contender.model).values())
    assert len(modules) == 2
    for module in modules:
        experts = module.router(entering(contender, module, ids))[2]
        shares = [(experts == slot).float().mean().item() for slot in range(module.experts.num_experts)]
        assert shares == pytest.approx([share / len(shares)] * len(shares), abs=0.02)


@pytest.mark.parametrize("share", [0.3, 0.6])
def test_evidence_sends_the_wanted_share_to_experts(base, share):
    contender = build("cse_evidence", SMALL, base, "cpu")
    ids = SMALL.token_ids(4, 64)
    for first in (0, 32):
        assert calibrate(contender, ids, share, first) == pytest.approx(share, abs=0.02)
        with torch.no_grad():
            found = contender.model(ids, output_cluster_ids=True).cluster_ids
        for module, clusters in zip(routed_modules(contender.model).values(), found, strict=True):
            routed = module.router.cluster_expert[clusters[:, first:]] >= 0
            assert routed.float().mean().item() == pytest.approx(share, abs=0.02)


def test_a_token_that_is_decoded_goes_where_it_goes_in_the_whole_text(base):
    contender = build("cse_evidence", SMALL, base, "cpu")
    contender.model.eval()
    ids = SMALL.token_ids(2, 24)
    calibrate(contender, ids, 0.5)
    with torch.no_grad():
        whole = contender.model(ids).logits[:, -1]
        cache = contender.model(ids[:, :-1], use_cache=True).past_key_values
        last = contender.model(ids[:, -1:], past_key_values=cache, **contender.told(ids, 1)).logits[:, -1]
    torch.testing.assert_close(last, whole)
    assert build("cse_add", SMALL, base, "cpu").told(ids, 1) == {}


def test_biases_give_each_column_its_share():
    scores = torch.randn(2000, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    shares = torch.tensor([0.05, 0.1, 0.15, 0.3, 0.4])
    reached = torch.bincount((scores + biases_for(scores, shares)).argmax(1), minlength=5) / 2000
    torch.testing.assert_close(reached, shares, atol=2e-3, rtol=0)


def test_before_they_are_routed_contenders_are_their_dense_twin(base):
    ids = SMALL.token_ids(2, 16)
    models = {name: build(name, SMALL, base, "cpu").model.eval() for name in NAMES}
    logits = {name: model(ids).logits for name, model in models.items()}
    for name in ("cse_replace", "cse_add", "cse_evidence"):
        torch.testing.assert_close(logits[name], logits["dense"])
    with torch.no_grad():
        models["naive"].transformer.h[1].mlp.cluster_expert.fill_(-1)
        torch.testing.assert_close(models["naive"](ids).logits, logits["dense"])
    assert (logits["mixtral"] - logits["dense"]).abs().max() > 1e-3
    assert len({model.config._attn_implementation for model in models.values()}) == 1


def test_the_loop_over_samples_computes_what_sequence_routes_do():
    model = activate(tiny_model("gpt2", cse_routing="sequence", cse_radius_scaling=False))
    module = list(routed_modules(model).values())[-1]
    states = torch.randn(6, 10, 32, generator=torch.Generator().manual_seed(1))
    states = states + module.router.centroids[:5].repeat(2, 1)[:6].unsqueeze(1)
    experts = module.experts
    naive = NaiveFFN.of(module_base(model), experts.num_experts, 32, model.config.max_clusters)
    with torch.no_grad():
        for slot, ffn in enumerate(naive.experts):
            ffn.c_fc.weight.copy_(experts.up_proj[slot].T)
            ffn.c_fc.bias.copy_(experts.up_proj_bias[slot])
            ffn.c_proj.weight.copy_(experts.down_proj[slot].T)
            ffn.c_proj.bias.copy_(experts.down_proj_bias[slot])
        naive.centroids.copy_(module.router.centroids)
        naive.centroids[module.router.cluster_sizes == 0] = 1e6
        naive.cluster_expert.copy_(module.router.cluster_expert)
        assert {naive.expert_of(row) for row in states} == {-1, 0, 2, 3}
        torch.testing.assert_close(naive(states), module(states))


def module_base(model):
    """The base FFN of the last layer with experts, as a stock module."""
    block = model.transformer.stock_block(2)
    block.load_state_dict(model.transformer.h[2].state_dict(), strict=False)
    return block.mlp


def test_rows_are_routed_by_the_loop_as_far_as_rows_go(base):
    contender = build("naive", SMALL, base, "cpu")
    assert calibrate(contender, SMALL.token_ids(10, 16), 0.3) == pytest.approx(0.3)
    assert calibrate(contender, SMALL.token_ids(1, 16), 0.3) == 0


@pytest.mark.parametrize("shape", SHAPES)
def test_an_in_tree_expert_has_the_weights_of_one_of_ours(shape):
    config = cse_config(SHAPES[shape], "replace")
    mixtral = mixtral_config(config)
    ours = 2 * config.hidden_size * config.expert_size + config.expert_size + config.hidden_size
    theirs = 3 * mixtral.hidden_size * mixtral.intermediate_size
    # its width is a multiple of 8
    assert abs(ours - theirs) <= 3 * config.hidden_size * 4 + config.hidden_size
    assert (mixtral.num_local_experts, mixtral.num_experts_per_tok) == (config.cse_num_experts, 1)


def test_counted_weights_of_experts_agree():
    config = tiny_config("gpt2")
    theirs = sum(p.numel() for p in MixtralFFN(mixtral_config(config)).block.experts.parameters())
    ours = sum(p.numel() for p in routed_modules(tiny_model("gpt2"))[2, "ffn"].experts.parameters())
    assert theirs == pytest.approx(ours, rel=0.05)


@pytest.mark.parametrize("name", ["cse_replace", "mixtral"])
def test_both_kinds_of_experts_run_one_grouped_product_in_the_type_of_autocast(base, name):
    contender = build(name, SMALL, base, "cpu")
    ids = SMALL.token_ids(2, 16)
    calibrate(contender, ids, 0.3)
    for enabled, dtype in ((False, torch.float32), (True, torch.bfloat16)):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled), Operations() as operations:
            contender.model(ids)
        assert {seen for seen in operations.seen if "grouped_mm" in seen[0]} == {("_grouped_mm", dtype)}


def test_memory_is_exact_where_the_answer_is_known():
    source = torch.zeros(1000, dtype=torch.float32)

    def call():
        first = source * 2
        second = first + 1
        part = second.view(10, 100)[:2]
        del first, second  # the view keeps all of the second
        third = source * 3
        return part, third

    assert peak_bytes(call, CPU, []) == 2 * 4000
    assert peak_bytes(call, CPU, [source, source.view(10, 100)]) == 3 * 4000

    linear = torch.nn.Linear(100, 50, bias=False)
    optimizer = torch.optim.AdamW(linear.parameters(), fused=True)
    batch = torch.ones(3, 100)
    measured = measure_training(linear, optimizer, lambda: linear(batch).sum().backward(), batch)
    weight, scalars = 4 * 100 * 50, 4
    assert measured.gradients == weight
    assert measured.state == 4 * weight + scalars  # AdamW counts steps in a number of its own
    assert measured.peak == 4 * weight + 4 * 3 * 100 + 3 * scalars  # that number, the loss, and its gradient


def test_one_command_writes_every_measure_and_a_second_one_adds_to_it(tmp_path, capsys):
    path, picture = tmp_path / "speed.json", tmp_path / "speed.png"
    ours = ["cse_replace", "cse_evidence"]
    main([*QUICK, "--contenders", *ours, "--output", str(path), "--figure", str(picture)])
    table = capsys.readouterr().out
    first = json.loads(path.read_text())
    kinds = {(record["measure"], record["contender"]) for record in first["records"]}
    timed = {"training", "layer", "memory", "prefill", "decoding"}
    assert kinds == {(name, who) for name in timed for who in ("dense", *ours)} | {
        ("reclustering", who) for who in ours
    }
    wanted = {*KEY, "seconds", "ratio", "quartiles", "rounds", "details", "date", "commit", "run"}
    assert all(set(record) == wanted for record in first["records"])
    assert all(record["ratio"] == 1 for record in first["records"] if record["contender"] == "dense")
    (run,) = first["runs"]
    assert run["versions"]["python"] == platform.python_version() and run["machine"]["processor"]
    (fit,) = (r for r in first["records"] if (r["measure"], r["contender"]) == ("reclustering", "cse_replace"))
    (step,) = (r for r in first["records"] if (r["measure"], r["contender"]) == ("training", "cse_replace"))
    share = fit["seconds"] / (fit["seconds"] + 500 * step["seconds"])
    assert fit["details"]["share_of_training"] == {"2": pytest.approx(share)}
    assert table.count("| tiny |") == 6 and picture.stat().st_size > 10_000

    again = ["--measures", "layer", "--contenders", "mixtral", "naive", "--output", str(path)]
    main([*QUICK, *again])
    second = json.loads(path.read_text())
    old, new = ({key_of(record): record for record in each["records"]} for each in (first, second))
    assert len(second["records"]) == len(new) == len(old) + 2 and len(second["runs"]) == 2
    renewed = {key for key in old if old[key] != new[key]}
    assert {(key[1], key[2]) for key in renewed} == {("layer", "dense")}
    assert report.table(second["records"]).count("\n") == 2 + 6


def test_what_cannot_be_measured_is_refused(capsys):
    for argv in (["--share", "1.5"], ["--compile", "--measures", "memory"], ["--shapes", "7b"]):
        with pytest.raises(SystemExit):
            main(argv)
    assert "--share 1.5 is not allowed" in capsys.readouterr().err


def test_a_contender_that_does_not_exist_is_refused(base):
    with pytest.raises(ValueError, match="name='sparse'"):
        build("sparse", SMALL, base, "cpu")
    assert isinstance(build("dense", SMALL, base, "cpu"), Contender)

"""Statistics against brute force, on a MoE where the routing is known."""

import pytest
import torch
from helpers import FAMILIES, assert_close
from transformers import AutoModelForCausalLM

from qmoe.calibration import stats as statistics
from qmoe.calibration.collect import collecting_experts, collecting_linears
from qmoe.calibration.coverage import average_weight, borrow
from qmoe.calibration.routed_tokens import RoutedTokens
from qmoe.calibration.stats import ExpertStats, LayerStats, LinearStats
from qmoe.errors import CalibrationError
from qmoe.system.spill import Scratch


@pytest.fixture
def experts():
    model = AutoModelForCausalLM.from_config(FAMILIES["qwen3_moe"]()).requires_grad_(False)
    module = model.model.layers[0].mlp.experts
    for parameter in module.parameters():
        parameter.normal_(std=0.1)
    return module


def gather(experts, x, ids, gates, routing_weighted):
    routed = RoutedTokens(experts, routing_weighted, 4, Scratch())
    with collecting_experts({"": experts}, lambda name, *given: routed.saw(*given)):
        batches = zip(x.split(9), ids.split(9), gates.split(9), strict=True)
        out = torch.cat([experts(*batch) for batch in batches])
    routed.finish()
    assert all(received.isfinite().all() for received in routed.received())
    return routed, out


@pytest.mark.parametrize("routing_weighted", [True, False])
def test_counts_gates_and_hessians_equal_brute_force(experts, routing_weighted):
    x, ids, gates = torch.randn(20, 64), torch.randint(0, 5, (20, 2)), torch.rand(20, 2)
    ids[:, 1] = (ids[:, 0] + 1) % 5  # a token never goes twice to an expert; expert 5 stays empty
    ids[3] = 6  # the sentinel
    routed, out = gather(experts, x, ids, gates, routing_weighted)
    stats = routed.part(0, 6)
    for name in ("tokens", "routing_mass", "weight"):
        assert_close(getattr(routed, name), getattr(stats, name))
    for start, end in ((0, 2), (2, 6)):  # experts a few at a time: the same bits
        part = routed.part(start, end)
        assert torch.equal(part.first, stats.first[start:end])
        assert torch.equal(part.second, stats.part(start, end).second)
    for e in range(6):
        mine = [(t, a) for t in range(20) for a in range(2) if ids[t, a] == e]
        assert stats.tokens[e] == len(mine)
        g = torch.tensor([float(gates[t, a]) for t, a in mine])
        w = g.square() if routing_weighted else torch.ones_like(g)
        rows = x[[t for t, _ in mine]]
        gate, up = (rows @ experts.gate_up_proj[e].T).chunk(2, -1)
        mid = experts.act_fn(gate) * up
        assert_close(stats.routing_mass[e], g.sum())
        assert_close(stats.weight[e], w.sum())
        assert_close(stats.first[e], (rows.T * w) @ rows)
        assert_close(stats.second[e], (mid.T * w) @ mid)
    assert torch.equal(stats.sample, x[::4])
    assert (out[3] == 0).all()


def test_collecting_leaves_the_output_and_the_setting_as_they_were(experts):
    x, ids, gates = torch.randn(20, 64), torch.randint(0, 6, (20, 2)), torch.rand(20, 2)
    experts.config._experts_implementation = "eager"
    plain = experts(x, ids, gates)
    assert_close(gather(experts, x, ids, gates, True)[1], plain)
    assert experts.config._experts_implementation == "eager"


def test_linears_with_the_same_input_share_one_hessian():
    a, b, c = (torch.nn.Linear(8, 4) for _ in range(3))
    stats = LayerStats()
    with collecting_linears({"a": a, "b": b, "c": c}, stats):
        for _ in range(3):
            x = torch.randn(5, 8)
            a(x), b(x), c(x.clone())
    assert stats.linears["a"] is stats.linears["b"] is not stats.linears["c"]
    assert stats.linears["a"].tokens == stats.linears["c"].tokens == 15
    assert_close(stats.linears["a"].hessian, stats.linears["c"].hessian)


def some_layer() -> LayerStats:
    experts = ExpertStats.empty(2, 4, 3)
    experts.add(1, torch.randn(6, 4), torch.randn(6, 3), torch.rand(6), torch.rand(6))
    experts.sample = torch.randn(5, 4)
    shared = LinearStats.empty(4)
    shared.add(torch.randn(7, 4))
    return LayerStats({"x.experts": experts}, {"x.q": shared, "x.k": shared})


def test_saved_statistics_come_back(tmp_path):
    stats = some_layer()
    statistics.save(stats, tmp_path / "s.safetensors", {"model": "1"})
    back = statistics.load(tmp_path / "s.safetensors", {"model": "1"})
    for key, value in stats.tensors()[0].items():
        assert torch.equal(back.tensors()[0][key], value)
    assert back.linears["x.q"] is back.linears["x.k"]


def test_merging_is_adding():
    a, b = some_layer(), some_layer()
    expected = a.experts["x.experts"].first + b.experts["x.experts"].first
    merged = statistics.merge([a, b])
    assert_close(merged.experts["x.experts"].first, expected)
    assert merged.experts["x.experts"].tokens.tolist() == [0, 12]
    assert merged.linears["x.q"].tokens == 14
    assert len(merged.experts["x.experts"].sample) == 10


def test_statistics_of_another_model_or_a_damaged_file_are_refused(tmp_path):
    path = tmp_path / "s.safetensors"
    statistics.save(some_layer(), path, {"model": "1"})
    with pytest.raises(CalibrationError, match="gathered with another model: 1, expected 2"):
        statistics.load(path, {"model": "2"})
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(CalibrationError, match="no readable statistics file"):
        statistics.check(path, {"model": "1"})


def test_rare_experts_borrow_until_they_weigh_min_tokens(experts):
    x, ids, gates = torch.randn(64, 64), torch.zeros(64, 1, dtype=torch.long), torch.rand(64, 1)
    ids[:5] = 1
    stats = gather(experts, x, ids, gates, True)[0].part(0, 6)
    first, sample = stats.first.clone(), stats.sample
    before = stats.weight.clone()

    def middle(e, rows):
        gate, up = (rows @ experts.gate_up_proj[e].T).chunk(2, -1)
        return experts.act_fn(gate) * up

    assert borrow(stats, middle, 20, average_weight(stats)) == [1, 2, 3, 4, 5]
    average = before.sum() / 64
    assert torch.equal(stats.first[0], first[0])  # well covered: untouched
    assert_close(stats.weight[1], before[1] + 15 * average)
    assert_close(stats.weight[2], 20 * average)
    pool = sample.T @ sample / len(sample)
    assert_close(stats.first[2], 20 * average * pool)
    mid = middle(2, sample)
    assert_close(stats.second[2], 20 * average * mid.T @ mid / len(mid))
    assert stats.tokens.tolist() == [59, 5, 0, 0, 0, 0]  # borrowed tokens are not routed tokens


def test_min_tokens_zero_borrows_nothing(experts):
    x, ids, gates = torch.randn(8, 64), torch.zeros(8, 1, dtype=torch.long), torch.rand(8, 1)
    stats = gather(experts, x, ids, gates, True)[0].part(0, 6)
    assert borrow(stats, lambda e, rows: rows, 0, average_weight(stats)) == []

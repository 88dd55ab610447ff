"""The workloads are the published models: sizes known from elsewhere, shapes that fit, and a file that keeps them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from datamodules.planning import graph_cache
from datamodules.planning.graph import Graph
from datamodules.planning.graph_cache import kept
from datamodules.planning.recorder import TraceError
from datamodules.planning.trace import trace
from datamodules.planning.workloads import WORKLOADS, arguments_for, build_step, load_graph, load_user_model
from datamodules.planning.workloads_text import buckets

TINY = sorted(name for name in WORKLOADS if "tiny" in name)
# trainable numbers of the published checkpoints, heads tied to embeddings counted once
PUBLISHED = {
    "vgg19": 143_667_240,
    "resnet50": 25_557_032,
    "inception-v3": 27_161_264,
    "bert-12": 109_514_298,
    "gpt2-small": 124_439_808,
    "gpt2-medium": 354_823_168,
    "t5-small": 60_506_624,
    "t5-base": 222_903_552,
}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(graph_cache.sources, "cache_root", lambda: tmp_path)
    return tmp_path / "plan_graphs"


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_those_of_the_published_models(name: str) -> None:
    with torch.device("meta"):
        step = build_step(name, batch=1)
    assert sum(p.numel() for p in step.model.parameters()) == PUBLISHED[name]


@pytest.mark.parametrize("name", TINY)
def test_every_parameter_has_a_gradient_of_its_shape(name: str) -> None:
    graph = load_graph(name)
    for parameter in graph.parameters:
        assert parameter.gradient is not None, parameter
        assert graph.tensors[parameter.tensor].shape == graph.tensors[parameter.gradient].shape
    assert graph.outputs[0] not in graph.inputs
    assert graph.tensors[graph.outputs[0]].shape == ()
    assert [graph.tensors[t].shape[d] for t, d in graph.batch_dims] == [8] * len(graph.inputs)
    assert graph.flops > 0
    assert {op.phase for op in graph.ops} == {"forward", "backward"}


@pytest.mark.parametrize("name", TINY)
def test_the_step_runs_for_real_and_graph_and_step_agree(name: str) -> None:
    torch.manual_seed(0)
    step = build_step(name, batch=2)
    loss = step.loss(step.model, **step.inputs)
    loss.backward()
    assert torch.isfinite(loss)
    graph = load_graph(name, batch=2)
    assert [p.name for p in graph.parameters] == [n for n, _ in step.model.named_parameters()]
    assert [graph.tensors[t].name for t in graph.inputs] == list(step.inputs)


def test_work_grows_with_the_batch_and_parameters_do_not() -> None:
    small, large = load_graph("bert-tiny", batch=8), load_graph("bert-tiny", batch=16)
    assert small.parameter_bytes == large.parameter_bytes
    products = [sum(op.flops for op in g.ops if op.kind in ("mm", "sdpa", "sdpa_backward")) for g in (small, large)]
    assert products[1] == 2 * products[0]
    assert [op.kind for op in small.ops] == [op.kind for op in large.ops]


def test_repeated_layers_are_equal() -> None:
    """What tying repeated blocks needs: two layers of one model are the same operations."""
    graph = load_graph("gpt2-tiny")
    kinds = [[op.kind for op in graph.ops if op.layer.startswith(f"layers.{i}.")] for i in (0, 1)]
    assert kinds[0]
    assert kinds[0] == kinds[1]


@pytest.mark.parametrize("name", ["bert-tiny", "gpt2-tiny", "t5-tiny", "moe-tiny"])
def test_attention_is_one_operation_whose_heads_are_a_dim(name: str) -> None:
    graph = load_graph(name)
    attention = [op for op in graph.ops if op.kind == "sdpa"]
    assert len(attention) == sum(1 for op in graph.ops if op.kind == "sdpa_backward")
    assert {graph.tensors[op.inputs[0]].shape[1] for op in attention} == {8}
    if name == "t5-tiny":
        assert len(attention) == 6  # two each way, and two across
        table = next(p for p in graph.parameters if p.name == "encoder.position.weight")
        assert table.gradient is not None


def test_distances_fall_into_the_buckets_of_t5() -> None:
    """Hand-computed from the definition: exact near, logarithmic up to 128, the last one beyond."""
    both = buckets(300, 300, both_ways=True)
    assert both[0, :8].tolist() == [0, 17, 18, 19, 20, 21, 22, 23]
    assert both[:8, 0].tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
    assert both[0, 299] == 31
    assert both[299, 0] == 15
    one = buckets(300, 300, both_ways=False)
    assert one[20, :21].tolist()[::-1][:16] == list(range(16))
    assert (one.triu(1) == 0).all()
    assert one[299, 0] == 31


def test_experts_with_room_for_all_are_dropless() -> None:
    """With C = S the static form is the sum over each token's chosen experts, weighted by the router."""
    from datamodules.planning.workloads_experts import CapacityExperts
    from lit_modules.ops.experts import expert_mlp
    from lit_modules.ops.routing import route

    torch.manual_seed(0)
    layer = CapacityExperts(8, 12, experts=4, top_k=2, capacity_factor=100.0).double()
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    routing = route(layer.router(x.flatten(0, 1)), 2, "softmax_topk")
    wanted = expert_mlp(x.flatten(0, 1), routing, layer.up, layer.down, None, "squared_relu", backend="loop")
    torch.testing.assert_close(layer(x).flatten(0, 1), wanted)


def test_a_graph_is_traced_once_and_then_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = load_graph("gpt2-tiny", batch=4)
    made = []
    monkeypatch.setattr("datamodules.planning.workloads.trace", lambda *a: made.append(a))
    assert load_graph("gpt2-tiny", batch=4) == first
    assert made == []
    load = [p.name for p in folder.iterdir() if p.suffix == ".gz"]
    assert len(load) == 1
    monkeypatch.undo()


def test_a_damaged_file_is_made_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    graph = trace(lambda: build_step("gpt2-tiny"), "g")
    kept("g", {}, lambda: graph, tmp_path / "c")
    (file,) = (tmp_path / "c").glob("*.gz")
    file.write_bytes(b"broken")
    assert kept("g", {}, lambda: graph, tmp_path / "c") == graph
    assert "making it again" in capsys.readouterr().err
    assert Graph.load(file) == graph


def test_unknown_names_get_the_nearest_known_one() -> None:
    with pytest.raises(ValueError, match="did you mean 'bert-48'"):
        load_graph("bert-46")
    with pytest.raises(ValueError, match=r"no argument 'lenght' \(did you mean 'length'"):
        load_graph("bert-48", lenght=128)
    with pytest.raises(ValueError, match="batch must be above 0, got 0"):
        arguments_for("bert-48", {"batch": 0})
    with pytest.raises(ValueError, match="at least 75 pixels, got 32"):
        load_graph("inception-v3", size=32)
    with pytest.raises(ValueError, match="leave nothing"):
        load_graph("vgg19", size=16)


def test_equal_arguments_have_equal_digests() -> None:
    assert trace(lambda: build_step("t5-tiny"), "x").digest == trace(lambda: build_step("t5-tiny"), "x").digest


def plain_model(width: int = 8) -> tuple[nn.Module, Tensor, object]:
    """A user's factory: model, input, loss."""
    return nn.Linear(width, 3), torch.randn(4, width), lambda out, input0: (out - input0.mean()).square().mean()


def own_loss() -> tuple[nn.Module, dict[str, Tensor]]:
    """A user's factory whose model returns its loss."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 2)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return (self.layer(x) - y).square().mean()

    return Net(), {"x": torch.randn(6, 4), "y": torch.randn(6, 2)}


def paper_1() -> tuple[nn.Module, Tensor, object]:
    """The dropless mixture of experts of paper 1, two layers of it."""
    from lit_modules.nets.moe import Experts
    from lit_modules.nets.transformer import Transformer

    model = Transformer(64, 32, 2, 4, 64, experts=Experts(4, 1, 2))
    ids = torch.zeros(2, 8, dtype=torch.int64)
    return model, ids, lambda out, input0: nn.functional.cross_entropy(out.flatten(0, 1), input0.flatten())


def from_transformers(family: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """A small model of the transformers library."""
    import transformers as t

    ids = torch.zeros(2, 8, dtype=torch.int64)
    inputs = {"input_ids": ids, "labels": ids.clone()}
    if family == "bert":
        sizes = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64}
        return t.BertForMaskedLM(t.BertConfig(**sizes, vocab_size=64, hidden_dropout_prob=0.0)), inputs
    if family == "gpt2":
        return t.GPT2LMHeadModel(t.GPT2Config(n_layer=2, n_embd=32, n_head=4, vocab_size=64)), inputs
    sizes = {"num_layers": 2, "d_model": 32, "num_heads": 4, "d_kv": 8, "d_ff": 64, "vocab_size": 64}
    config = t.T5Config(**sizes, dropout_rate=0.0, decoder_start_token_id=0, pad_token_id=0)
    return t.T5ForConditionalGeneration(config), inputs


def not_a_model() -> int:
    """Something else."""
    return 3


def no_loss() -> tuple[nn.Module, Tensor]:
    """A model without a loss."""
    return nn.Linear(3, 3), torch.randn(2, 3)


def not_tensors() -> tuple[nn.Module, dict[str, str]]:
    """Inputs that are no tensors."""
    return nn.Linear(3, 3), {"x": "words"}


NUMBER = 3


@pytest.fixture
def user(monkeypatch: pytest.MonkeyPatch) -> str:
    """This module, under a name that can be imported."""
    monkeypatch.setitem(sys.modules, "user_models", sys.modules[__name__])
    return "user_models"


def test_user_models(user: str) -> None:
    graph = load_user_model(f"{user}:plain_model", width=16)
    assert [graph.tensors[p.tensor].shape for p in graph.parameters] == [(3, 16), (3,)]
    named = load_user_model(f"{user}:own_loss")
    assert [named.tensors[t].name for t in named.inputs] == ["x", "y"]


def test_the_dropless_experts_of_paper_1(user: str) -> None:
    graph = load_user_model(f"{user}:paper_1")
    assert sum(op.kind == "grouped_mm" for op in graph.ops) >= 4
    assert all(p.gradient is not None for p in graph.parameters)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "attentions"), [("bert", 2), ("gpt2", 2), ("t5", 6)])
def test_models_of_transformers_keep_their_attention_whole(user: str, family: str, attentions: int) -> None:
    pytest.importorskip("transformers")
    graph = load_user_model(f"{user}:from_transformers", family=family)
    for kind in ("sdpa", "sdpa_backward"):
        assert sum(op.kind == kind for op in graph.ops) == attentions
    assert all(p.gradient is not None for p in graph.parameters)


@pytest.mark.parametrize(
    ("spec", "complaint"),
    [
        ("plain_model", "not of the form module:factory"),
        ("no_such_module_here:f", "no module 'no_such_module_here'"),
        ("user_models:plane_model", "did you mean 'plain_model'"),
        ("user_models:NUMBER", "is a int, not something to call"),
        ("user_models:not_a_model", "returned a int"),
        ("user_models:not_tensors", "'x' is a str, not a tensor"),
    ],
)
def test_user_models_that_are_none(user: str, spec: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        load_user_model(spec)


def test_user_models_that_cannot_be_planned(user: str) -> None:
    with pytest.raises(TraceError, match="scalar"):
        load_user_model(f"{user}:no_loss")
    with pytest.raises(ValueError, match="cannot be called"):
        load_user_model(f"{user}:plain_model", depth=3)

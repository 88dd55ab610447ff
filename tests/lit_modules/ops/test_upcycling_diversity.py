"""What makes copies differ: permutation, re-initialisation, noise; what each keeps and what it changes.

Legend: E expansion, G granularity, N = E * G experts, F hidden units, H = F / G, D width.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lit_modules.ops.upcycling import Recipe, Target, UpcycleError, upcycle

E, G, D, F = 4, 4, 40, 160
N, H = E * G, F // G
NAMES = ("up", "gate", "down")
RANDOM = torch.Generator().manual_seed(0)
DENSE = {
    f"blocks.0.mlp.{name}.weight": 0.3 + torch.randn((D, F) if name == "down" else (F, D), generator=RANDOM)
    for name in NAMES
}
SHAPES = {f"blocks.0.mlp.{name}": (N, D, H) if name == "down" else (N, H, D) for name in NAMES}
SHAPES["blocks.0.mlp.router.weight"] = (N, D)


def experts(
    recipe: dict, granularity: int = G, seed: int = 0, fresh: dict[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Return up and gate (N, H, D) and down transposed to the same, so that hidden units are rows in all three."""
    target = Target(N // granularity, granularity, granularity, "softmax_topk", "reglu", (0,))
    width = F // granularity
    shapes = {k: (N, D, width) if k.endswith("down") else (N, width, D) for k in SHAPES if "router" not in k}
    shapes["blocks.0.mlp.router.weight"] = (N, D)
    made = Recipe(**{"scale": "none", "router_std": 1e-3} | recipe)
    state, _ = upcycle(DENSE, shapes, target, made, torch.Generator().manual_seed(seed), fresh)
    assert all(state[key].shape == shape for key, shape in shapes.items())
    return {n: state[f"blocks.0.mlp.{n}"].mT if n == "down" else state[f"blocks.0.mlp.{n}"] for n in NAMES}


PLAIN = experts({})


def parents(made: dict[str, Tensor], replica: int, granularity: int = G) -> dict[str, list[int]]:
    """Which dense unit every row of a replica is, by matrix."""
    found = {}
    for name, weight in made.items():
        dense = DENSE[f"blocks.0.mlp.{name}.weight"]
        dense = dense.T if name == "down" else dense
        rows = weight[replica * granularity : (replica + 1) * granularity].flatten(0, 1)
        found[name] = torch.cdist(rows, dense).argmin(1).tolist()
        torch.testing.assert_close(rows, dense[found[name]])
    return found


def test_permuted_replicas_are_whole_mlps_in_their_own_order() -> None:
    made = experts({"permute": True})
    orders = []
    for replica in range(E):
        found = parents(made, replica)
        assert found["up"] == found["gate"] == found["down"]  # one order for all three matrices
        assert sorted(found["up"]) == list(range(F))
        orders.append(found["up"])
    assert len({tuple(order) for order in orders}) == E
    # the price: shard 0 of two replicas shares about F / G^2 units only, so mixed picks are no longer the dense MLP
    common = len(set(orders[0][:H]) & set(orders[1][:H]))
    assert common < H / 2


def test_mixed_picks_are_whole_only_without_permutation() -> None:
    mixed = [0 * G + 0, 1 * G + 1, 2 * G + 2, 3 * G + 3]  # one of each shard, each of another replica
    x_SD = torch.randn(8, D, generator=torch.Generator().manual_seed(1))

    def output(made: dict[str, Tensor], picks: list[int]) -> Tensor:
        hidden = [(x_SD @ made["gate"][e].T).relu() * (x_SD @ made["up"][e].T) @ made["down"][e] for e in picks]
        return torch.stack(hidden).sum(0)

    dense = output(PLAIN, [0, 1, 2, 3])
    permuted = experts({"permute": True})
    torch.testing.assert_close(output(PLAIN, mixed), dense)
    assert (output(permuted, [4, 5, 6, 7]) - dense).norm() < 1e-6 * dense.norm()
    assert (output(permuted, mixed) - dense).norm() > 0.3 * dense.norm()


def test_without_shards_a_permutation_is_only_an_order() -> None:
    made = experts({"permute": True}, granularity=1)
    for replica in range(N):
        found = parents(made, replica, 1)
        assert found["up"] == found["gate"] == found["down"]
        assert sorted(found["up"]) == list(range(F))


@pytest.mark.parametrize("share", [0.25, 0.5])
def test_qwen2_redraws_that_share_of_the_entries(share: float) -> None:
    made = experts({"reinit": share, "init_std": 0.02})
    for name in NAMES:
        changed = made[name] != PLAIN[name]
        assert changed.float().mean().item() == pytest.approx(share, abs=0.01)
        assert made[name][changed].std().item() == pytest.approx(0.02, rel=0.03)
        assert abs(made[name][changed].mean().item()) < 1e-3
        each = changed.flatten(1).float().mean(1)
        assert (each - share).abs().max() < 0.06
        assert not torch.equal(changed[0], changed[G])  # replicas are redrawn independently
    assert not torch.equal(made["up"] != PLAIN["up"], made["gate"] != PLAIN["gate"])


def test_qwen2_can_redraw_from_the_nets_own_weights() -> None:
    random = torch.Generator().manual_seed(9)
    fresh = {key: torch.randn(shape, generator=random) for key, shape in SHAPES.items()}
    made = experts({"reinit": 0.5}, fresh=fresh)
    new = made["up"] == fresh["blocks.0.mlp.up"]
    assert new.float().mean().item() == pytest.approx(0.5, abs=0.02)
    assert torch.equal(made["up"][~new], PLAIN["up"][~new])
    with pytest.raises(UpcycleError, match="init_std=None redraws from the net's own weights, and none were given"):
        experts({"reinit": 0.5})


@pytest.mark.parametrize("share", [0.25, 0.5, 1.0])
def test_drop_upcycling_redraws_whole_units_with_the_statistics_they_had(share: float) -> None:
    made = experts({"reinit": share, "reinit_rule": "drop_upcycling"})
    units = {}
    for name in NAMES:
        changed = made[name] != PLAIN[name]
        assert torch.equal(changed.any(2), changed.all(2))  # a unit changes as a whole
        units[name] = changed.all(2)
        assert (units[name].sum(1) == round(share * H)).all()
        for e in range(N):
            old, new = PLAIN[name][e][units[name][e]], made[name][e][units[name][e]]
            error = 5 * old.std().item() / old.numel() ** 0.5
            assert abs(new.mean().item() - old.mean().item()) < error
            assert abs(new.std().item() - old.std().item()) < error
    assert torch.equal(units["up"], units["gate"])  # jointly in all three
    assert torch.equal(units["up"], units["down"])
    if share < 1:
        assert len(units["up"].unique(dim=0)) == N  # every expert forgets other units


@pytest.mark.parametrize("level", [0.01, 0.3])
def test_noise_is_relative_and_on_half_of_the_entries(level: float) -> None:
    made = experts({"noise": level})
    for name in NAMES:
        difference = made[name] - PLAIN[name]
        hit = difference != 0
        assert hit.float().mean().item() == pytest.approx(0.5, abs=0.01)
        assert difference[hit].std().item() == pytest.approx(level * PLAIN[name].std().item(), rel=0.03)


def test_scaling_comes_last() -> None:
    for recipe in ({"reinit": 0.5, "init_std": 0.02}, {"reinit": 0.5, "reinit_rule": "drop_upcycling"}, {"noise": 0.1}):
        plain, scaled = experts(recipe), experts(recipe | {"scale": 4.0})
        for name in NAMES:
            assert torch.equal(scaled[name], 4 * plain[name])


def test_half_precision_keeps_its_type() -> None:
    target = Target(E, G, G, "softmax_topk", "reglu", (0,))
    dense = {key: weight.bfloat16() for key, weight in DENSE.items()}
    for rule in ("qwen2", "drop_upcycling"):
        recipe = Recipe(router_std=1e-3, permute=True, reinit=0.5, reinit_rule=rule, init_std=0.02, noise=0.1)
        state, _ = upcycle(dense, SHAPES, target, recipe, torch.Generator())
        assert {state[f"blocks.0.mlp.{name}"].dtype for name in NAMES} == {torch.bfloat16}
        assert state["blocks.0.mlp.up"].isfinite().all()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"init": "virtual"}, "unknown init 'virtual', nearest: 'virtual_group'"),
        ({"scale": "equal"}, "unknown scale mode 'equal'"),
        ({"reinit_rule": "qwen"}, "unknown reinit_rule 'qwen', nearest: 'qwen2'"),
        ({"reinit": 1.5}, "reinit is a share between 0 and 1, got 1.5"),
        ({"noise": -0.1}, "noise is finite and not negative, got -0.1"),
        ({"router_std": float("inf")}, "router_std is finite and not negative, got inf"),
    ],
)
def test_refusals(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Recipe(**fields)

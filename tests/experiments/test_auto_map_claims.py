"""Paper 5 as data: searchers have the agent's budgets, observations have room, claims read what is logged."""

from __future__ import annotations

import pytest

from experiments.cell import resolve
from experiments.claims import load_paper
from experiments.records import CellKey

SPEC = load_paper("auto_map")
METHODS = ("random", "greedy", "beam", "annealing", "mcmc")
RIVALS = [("dqn_untied", f"{m}_untied", "t5-small-paper") for m in METHODS]
RIVALS += [("pipe_c", f"{m}_pipe", "bert-48-profile") for m in METHODS]
RIVALS += [("dqn_count", f"{m}_count", "vgg19") for m in ("random", "greedy")]


@pytest.mark.parametrize("profile", ["smoke", "small", "paper"])
@pytest.mark.parametrize(("agent", "searcher", "data"), RIVALS)
def test_searchers_may_take_as_many_decisions_as_the_agent(agent: str, searcher: str, data: str, profile: str) -> None:
    learnt, searched = (
        resolve(CellKey("auto_map", name, data, 0, profile)).config for name in (agent, searcher)
    )  # fmt: skip
    assert searched["module"]["steps"] == learnt["budget"]["max_epochs"] * learnt["budget"]["train_samples"]
    assert learnt["budget"]["train_samples"] % learnt["datamodule"]["collect"] == 0
    for key in ("topology", "task", "objective", "arguments", "stages", "granularity", "window", "pruning"):
        assert learnt["datamodule"].get(key) == searched["datamodule"].get(key), key


def test_collections_are_dealt_evenly_to_environments() -> None:
    for ablation, data in SPEC.required("small"):
        config = resolve(CellKey("auto_map", ablation, data, 0, "small")).config
        recipe = config["module"].get("recipe")
        if recipe:
            assert config["datamodule"]["collect"] % recipe.get("environments", 8) == 0
            assert config["datamodule"]["collect"] <= config["budget"]["train_samples"]


def test_only_printed_plans_are_reported_and_the_page_says_what_departs() -> None:
    from experiments.claims import PAPERS

    assert {c.id for c in SPEC.claims if c.reported is not None} == {"C8.cut1", "C8.cut2", "C8.cut3"}
    page = (PAPERS / "auto_map" / "README.md").read_text()
    assert page.count("## Deviations") == page.count("## Journal") == 1


def test_every_claim_of_the_dossier_is_there() -> None:
    assert {claim.id.split(".")[0] for claim in SPEC.claims} == {f"C{n}" for n in range(1, 12)}

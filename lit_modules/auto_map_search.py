"""Paper 5's peers: searchers and exact methods on the very problems that the agent learns on. Nothing is trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

from datamodules.planning.anytime import anytime
from datamodules.planning.problem import take
from datamodules.planning.searchers import Budget, Point, search
from lit_modules.auto_map import AutoMap

Method = Literal["random", "greedy", "beam", "annealing", "mcmc", "exhaustive", "programme", "sharding"]


class PlanSearch(AutoMap):
    """Search with a method of `datamodules.planning.searchers`, or ask an exact one, and log as the agent does.

    Args:
        method: a searcher; "programme" for the integer programme in the paper's own space; "sharding" for the one over every
            placement of every tensor with resharding, as Alpa's.
        steps: decisions that a searcher may take; exact methods need no such budget.
        options: of the searcher.
    Logs: `search/*`, `gap_at/*` and `plan/*` as `AutoMap`; `search/evaluations`; `search/proven`, 100 where the method proved
        its plan best.
    """

    def __init__(
        self,
        *args: Any,
        method: Method = "random",
        steps: int = 1024,
        options: Mapping[str, Any] | None = None,
        **more: Any,
    ) -> None:
        super().__init__(*args, **more)
        if steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps!r}")
        self.method, self.steps, self.options = method, steps, dict(options or {})

    def test_step(self, batch: int, batch_idx: int) -> None:
        """Search once."""
        exact: dict[str, Callable[[], dict[str, float]]] = {"programme": self._programme, "sharding": self._sharding}
        for name, value in exact.get(self.method, self._search)().items():
            self.log(name, float(value), batch_size=1)

    def _search(self) -> dict[str, float]:
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        problem = data.source.problem()
        found = search(problem, self.method, Budget(steps=self.steps), int(self.hparams["seed"]), **self.options)
        logged = anytime(problem, found.trace, data.least, found.steps, found.seconds, self.steps)
        if found.decisions and take(problem, found.decisions):
            logged |= data.source.say(problem)
        logged |= {"search/evaluations": found.evaluations, "search/proven": 100.0 * found.proven}
        return logged | data.proof()

    def _programme(self) -> dict[str, float]:
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        problem, best = data.source.problem(), data.source.programme()
        trace = [Point(best.seconds, 1, 1, best.cost)]
        logged = anytime(problem, trace, data.least, 1, best.seconds)
        return logged | {"search/proven": 100.0 * best.proven} | data.proof()

    def _sharding(self) -> dict[str, float]:
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        problem = data.source.problem()
        best, said = data.source.sharding()
        return {
            "search/cost": best.cost,
            "search/reference": problem.reference,
            "search/speedup": problem.reference / best.cost,
            "search/spent_seconds": best.seconds,
            "search/proven": 100.0 * best.proven,
            "search/below_paper_space": 100.0 * (data.optimum.cost / best.cost - 1.0),
            **said,
        }

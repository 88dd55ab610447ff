"""Paper 5's plans run for real: does the order that the cost model predicts hold, and does the best plan beat data parallelism?

Nothing is trained. The cell starts `ranks` processes (gloo; NCCL where each has a GPU), checks that each kind
of plan takes the same step as one process, calibrates the machine, times all plans interleaved, calibrates again, and compares.
It waits until it is the only such cell at work, but cannot stop others: run it alone.

Logs, all under `test/exec_`; a plan's time is the median of its repeats, "predicted" is what `execution.engine.predict` says on
the calibrated topology: the cost model's price with what torch's engines cost beside it, all from micro-benchmarks of other
nets. "bare" is the cost model alone, held against the same measured times; the engines' terms are explained in that module:

plans, workloads             how many were timed
error                        largest relative difference to the single-process step (loss, gradients, new weights), float64
tau, tau_low, tau_high       Kendall's tau of predicted and measured seconds over all plans, 95 % bootstrap over plans
spearman, spearman_low, spearman_high   likewise
tau_within, tau_within_low, tau_within_high   over pairs of plans of one workload only, which is what a search compares
tau_bare, tau_bare_low, tau_bare_high, tau_within_bare, tau_within_bare_low, tau_within_bare_high   likewise of the bare price
tau_within_gain, tau_within_gain_low, tau_within_gain_high   tau_within - tau_within_bare, resampled together
tau_within_repeated          tau_within of every other repeat's median against the rest's: what the measurement itself allows
pairs                        pairs of one workload whose predicted times differ by more than a factor 1.3
pairs_right, pairs_right_low, pairs_right_high   percentage of these that were measured in the predicted order
factor, factor_bare          median of max(predicted / measured, measured / predicted), and of the bare price
gain, gain_<workload>        measured seconds of pure data parallelism / those of the plan that is predicted to be best;
                             without a workload the geometric mean
gain_low                     the smallest of all workloads
regret                       measured seconds of that plan / those of the plan measured to be best, geometric mean
tp_over_dp_<workload>        measured seconds of operator partitioning / of pure data parallelism
fit_all_reduce, fit_send, fit_compute, fit_memory   mean relative error of the calibration's fit, in percent
fit_arithmetic, fit_packing, fit_engine   likewise, of layers' products (both terms are of one fit) and of the engine's terms
latency_us, bandwidth_mb_s, gflops, memory_gb_s, launch_us, packing_gb_s   what was calibrated
styled_us, moved_us, reducer_us, chunk_us   what torch's engines cost, each time
drift                        change of a calibration point from before to after, median over points, in percent
load_before, load_after      processes at work or waiting for a core, of the last minute; afterwards with this cell's own
seconds                      wall-clock seconds of it all

Workload names: `lit_modules.execution.workloads.WORKLOADS`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lightning import LightningModule
from torch import nn

from lit_modules.execution.measure import LIMIT_S, Report, measure
from lit_modules.execution.workloads import workload_of


class PlansForReal(LightningModule):
    """Time executable plans on this machine and compare with what the calibrated cost model says.

    Args:
        net, optimizer, steps_per_epoch, schedule: of the framework; not used, since nothing is trained.
        workloads: names of workloads; each is run with every kind of plan that it has.
        ranks: processes, one thread each.
        repeats: timed steps of each plan, interleaved.
        seed: of weights, data and the order of plans.
        limit_s: seconds after which the processes are stopped and the cell fails.
    Raises:
        ValueError: an unknown workload, fewer than 2 ranks or 1 repeat.
    """

    def __init__(
        self,
        net: nn.Module,
        workloads: Sequence[str],
        optimizer: Any = None,
        steps_per_epoch: int = 1,
        schedule: Any = None,
        ranks: int = 2,
        repeats: int = 7,
        seed: int = 0,
        limit_s: float = LIMIT_S,
    ) -> None:
        super().__init__()
        if ranks < 2 or repeats < 1 or not workloads:
            raise ValueError(
                f"plans need 2 or more ranks, a repeat and a workload; got {ranks}, {repeats}, {workloads}"
            )
        self.net = net
        self.workloads = [workload_of(name) for name in workloads]
        self.ranks, self.repeats, self.seed, self.limit_s = ranks, repeats, seed, limit_s

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """The data are the workloads' own."""

    def on_test_epoch_end(self) -> None:
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
        ):  # Lightning tests without gradients; plans are training steps
            report: Report = measure(self.workloads, self.ranks, self.repeats, self.seed, self.limit_s)
        for name, value in report.metrics().items():
            self.log(f"test/exec_{name}", float(value))

    def configure_optimizers(self) -> Any:
        raise RuntimeError("nothing is trained here; give the ablation a family without epochs")

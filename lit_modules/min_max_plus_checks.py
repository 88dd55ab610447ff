"""Paper 4's exact statements, measured on real data: gradients against the formulas, and what the normal form promises.

Nothing is trained. Legend: N samples, K inputs and M outputs of a layer.
"""

from __future__ import annotations

import copy
from typing import Any, Literal

import torch
from torch import Tensor

from lit_modules.min_max_plus import MinMaxPlus
from lit_modules.normalisation import layer_inputs, normalise_, normalised_weights, tropical_layers, winning_shares
from lit_modules.ops.tropical import tropical_matmul

GRID = 4.0  # weights and inputs on multiples of 1 / GRID tie often, and their sums are exact


def subgradients(
    f_NK: Tensor, w_MK: Tensor, cotangent_NM: Tensor, kind: str, ties: Literal["first", "split"]
) -> tuple[Tensor, Tensor]:
    """Return (dL/df (N, K), dL/dW (M, K)) of a tropical layer by its explicit formula, by broadcasting.

    J(n, i) is the set of j that attain output i of sample n. "first": the first j of J takes the whole of the cotangent;
    "split": each j in J takes 1 / |J| of it. Source: derived from g_i = min_j (W_ij + f_j); the paper's text was not read.
    """
    sums_NMK = f_NK[:, None, :] + w_MK
    best_NM1 = sums_NMK.amin(2, keepdim=True) if kind == "min" else sums_NMK.amax(2, keepdim=True)
    wins_NMK = sums_NMK == best_NM1
    if ties == "first":
        wins_NMK &= wins_NMK.cumsum(2) == 1
    share_NMK = wins_NMK.to(f_NK.dtype) / wins_NMK.sum(2, keepdim=True) * cotangent_NM[:, :, None]
    return share_NMK.sum(1), share_NMK.sum(0)


class BackwardCheck(MinMaxPlus):
    """Compare autograd with the explicit subgradients in every tropical layer, on the layer's real inputs.

    Logs, as the largest absolute difference over all gradients, in float64: `check/gap_first` and `check/gap_split`; and
    `check/ties`, the percentage of outputs with more than one winner once weights and inputs lie on a grid.
    """

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        net = copy.deepcopy(self.net).double()
        generator = torch.Generator().manual_seed(batch_idx)
        gaps: dict[str, list[Tensor]] = {"first": [], "split": []}
        tied: list[Tensor] = []
        for name, f_NK in layer_inputs(net, batch[0].double()).items():
            layer = tropical_layers(net)[name]
            cotangent_NM = torch.randn(len(f_NK), layer.out_features, generator=generator, dtype=torch.float64)
            for coarse in (False, True):
                f, w = ((GRID * t).round() / GRID if coarse else t for t in (f_NK, layer.weight.detach()))
                gaps["first"].append(_gap(f, w, cotangent_NM, layer.kind, "first"))
                gaps["split"].append(_gap(f, w, cotangent_NM, layer.kind, "split"))
            sums_NMK = f[:, None, :] + w
            best = sums_NMK.amin(2, keepdim=True) if layer.kind == "min" else sums_NMK.amax(2, keepdim=True)
            tied.append(((sums_NMK == best).sum(2) > 1).double().mean())
        for rule, found in gaps.items():
            self.log(f"check/gap_{rule}", torch.stack(found).max(), reduce_fx="max")
        self.log("check/ties", 100 * torch.stack(tied).mean())

    def on_test_epoch_end(self) -> None:
        """Nothing was scored."""


def _gap(f_NK: Tensor, w_MK: Tensor, cotangent_NM: Tensor, kind: Any, ties: Literal["first", "split"]) -> Tensor:
    with torch.inference_mode(False), torch.enable_grad():
        f, w = f_NK.clone().requires_grad_(), w_MK.clone().requires_grad_()
        y_NM = tropical_matmul(f, w, kind=kind, ties=ties)
        found = torch.autograd.grad(y_NM, (f, w), cotangent_NM.clone())
    wanted = subgradients(f_NK, w_MK, cotangent_NM, kind, ties)
    return torch.stack([(a - b).abs().max() for a, b in zip(found, wanted, strict=True)]).max()


class NormalFormCheck(MinMaxPlus):
    """Normalise a copy of the net on D, all training images, and measure what the normal form promises.

    Logs `check/output_change`, the largest change of an output on D relative to the largest output; `check/moved`, the
    mean change of a weight; `check/tight`, the percentage of weights within 1e-5 of tight on D, which is also how far
    a second normalisation would leave them; `check/winners_before` and `check/winners_after`, in percent.
    """

    def on_test_epoch_end(self) -> None:
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        samples = [x.to(self.device) for x in data.sample_inputs(None, key=0)]
        with torch.inference_mode(False), torch.no_grad():
            samples = [x.clone() for x in samples]
            net = copy.deepcopy(self.net)
            before = torch.cat([net(x) for x in samples])
            self.log("check/winners_before", _percent(winning_shares(net, samples)))
            self.log("check/moved", normalise_(net, samples))
            after = torch.cat([net(x) for x in samples])
            self.log("check/output_change", (after - before).abs().max() / before.abs().max())
            self.log("check/winners_after", _percent(winning_shares(net, samples)))
            layers = tropical_layers(net)
            again = [(w - layers[name].weight).abs().flatten() for name, w in normalised_weights(net, samples).items()]
            self.log("check/tight", 100 * (torch.cat(again) <= 1e-5).double().mean())

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """The samples come from the training images."""


def _percent(shares: dict[str, float]) -> float:
    return 100 * sum(shares.values()) / len(shares)

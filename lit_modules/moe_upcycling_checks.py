"""Paper 1's exact statements, measured on trained weights and real text before any update: is the MoE still its parent?

Nothing is trained. Legend: B sequences, S tokens, V vocabulary.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional as F
from torchmetrics import MeanMetric

from lit_modules.moe_upcycling import MoEUpcycling
from lit_modules.nets.transformer import Transformer


class StepZero(MoEUpcycling):
    """Compare a net as it comes out of upcycling with the dense net it was made of, on test data.

    Args: as in `MoEUpcycling`.
    Logs, beside what `MoEUpcycling` logs at test: `check/relative_error`, |MoE's logits - dense logits| / |dense logits| as
        norms over a batch, the largest of all batches; `check/loss_gap`, the MoE's test loss less the parent's in nats per
        token; `check/params_gap`, the number of parameters less what the paper's formula gives.
    Source: arXiv 2410.07524, sections 2.2 and 2.3; the checks are ours.
    """

    def __init__(self, net: Transformer, *args: Any, **others: Any) -> None:
        super().__init__(net, *args, **others)
        self.dense = Transformer(**{**net.arguments, "experts": None, "moe_layers": None}).requires_grad_(False)
        self.gap = MeanMetric()
        self.worst = 0.0

    def on_inherit(self, parent_state: dict[str, Tensor]) -> None:
        """Take the parent's weights."""
        self.dense.load_state_dict(parent_state)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        super().test_step(batch, batch_idx)
        x_BS, y_BS = batch
        ours_BSV, dense_BSV = self.net(x_BS), self.dense(x_BS)
        self.worst = max(self.worst, float((ours_BSV - dense_BSV).norm() / dense_BSV.norm()))
        losses = [F.cross_entropy(logits.flatten(0, 1), y_BS.flatten()) for logits in (ours_BSV, dense_BSV)]
        self.gap.update(losses[0] - losses[1], weight=y_BS.numel())

    def on_test_epoch_end(self) -> None:
        super().on_test_epoch_end()
        self.log("check/relative_error", self.worst)
        self.log("check/loss_gap", self.gap.compute())
        self.log("check/params_gap", float(self._params() - self._expected_params()))

    def _params(self) -> int:
        return sum(parameter.numel() for parameter in self.net.parameters())

    def _expected_params(self) -> int:
        """Dense + layers * ((E - 1) * MLP + N * D), the router's rows being the only other addition."""
        total = sum(parameter.numel() for parameter in self.dense.parameters())
        for at, layer in self.net.moe_layers().items():
            mlp = sum(parameter.numel() for parameter in self.dense.blocks[at].mlp.parameters())  # type: ignore
            shape = layer.experts
            total += (shape.expansion - 1) * mlp + shape.expansion * shape.granularity * layer.router.in_features
        return total

    def configure_optimizers(self) -> Any:
        raise RuntimeError("nothing is trained here; give the ablation a family without epochs")

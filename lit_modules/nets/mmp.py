"""Min-Max-Plus nets: linear, min-plus and max-plus layers in any order, written as a string.

    net = MMPNet("L64 m64 M64 L10", in_features=784)

L is linear (with bias), m min-plus, M max-plus; a number is the layer's output width. R is a ReLU, for baselines. S4 turns
inputs x into 16 x and -16 x, which are shifts.
"""

from __future__ import annotations

import difflib
import math
import re
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from lit_modules.nets.layers import TropicalLinear, init_weight_, make_layer
from lit_modules.ops.tropical import Ties

KINDS = {"L": "linear", "m": "min-plus", "M": "max-plus", "R": "ReLU", "S": "shifts"}
MAX_SHIFT = 20
TYPES = ("general", "type1", "type2", "type3", "type4", "type5", "pure")
EXAMPLE = '"L64 m64 M64 L10"'


class SpecError(ValueError):
    """A string that is not a net. The message names the first wrong token and what may stand there."""


class Token(NamedTuple):
    """One layer: its letter and number: the output width of L, m and M, the exponent of S, 0 for R."""

    letter: str
    number: int

    def __str__(self) -> str:
        return self.letter if self.letter == "R" else f"{self.letter}{self.number}"

    def width(self, inputs: int) -> int:
        """Return the layer's outputs for so many inputs."""
        return {"R": inputs, "S": 2 * inputs}.get(self.letter, self.number)


def parse(spec: str) -> tuple[Token, ...]:
    """Read a net such as "L64 m64 M64 L10".

    Raises:
        SpecError: no string, an empty one, or the first token that is not a layer, with what may stand there.
    """
    if not isinstance(spec, str):
        raise SpecError(f"a net is a string of layers such as {EXAMPLE}, got {spec!r}")
    tokens: list[Token] = []
    for place, word in enumerate(spec.split(), start=1):
        fault = _fault(word, tokens)
        if fault:
            raise SpecError(f"token {place}, {word!r}, of {spec!r}: {fault}")
        tokens.append(Token(word[0], int(word[1:] or 0)))
    if not tokens:
        raise SpecError(f"an empty net; write layers such as {EXAMPLE}")
    return tuple(tokens)


def _fault(word: str, before: list[Token]) -> str:
    """Say what is wrong with a token behind those before it; nothing if all is well."""
    letter, digits = word[0], word[1:]
    if letter not in KINDS:
        swapped = letter.swapcase()
        hint = f" (nearest: {swapped + digits!r})" if swapped in KINDS else ""
        known = ", ".join(f"{key} {kind}" for key, kind in KINDS.items())
        return f"no layer starts with {letter!r}{hint}; known: {known}"
    if letter == "R":
        if digits:
            return f"R is a ReLU and has no width; got {digits!r}"
        return "" if before and before[-1].letter != "R" else "a ReLU stands behind a layer that has a width"
    if letter == "S":
        good = re.fullmatch("[0-9]{1,2}", digits) and int(digits) <= MAX_SHIFT
        return "" if good else f"S shifts by 0 to {MAX_SHIFT} bits, such as S4; got {digits!r}"
    if re.fullmatch("[1-9][0-9]*", digits):
        return ""
    return f"{KINDS[letter]} needs a width of at least 1, such as {letter}64, then a space; got {digits!r}"


def type_spec(name: str, outputs: int, width: int = 64, pairs: int = 1) -> str:
    """Return the string of a named net type.

    Args:
        name: "general" (L m M repeated), "type1" (L M repeated), "type2" (L, then m M repeated), "type3" (type2, then L),
            "type4" (L, then M m repeated), "type5" (type4, then L) or "pure" (m M repeated, no linear layer).
        outputs: width of the last layer.
        width: of every other layer.
        pairs: how often the repeated part comes.
    Raises:
        ValueError: an unknown name, with the nearest one, or a number below 1.
    Source: the mapping of a public re-implementation of arXiv 2102.06358; that these are the paper's names is inferred.
        "pure" is the name of a public package, m M alternating is ours.
    """
    repeated = {"general": "LmM", "type1": "LM", "pure": "mM"}
    framed = {"type2": ("mM", ""), "type3": ("mM", "L"), "type4": ("Mm", ""), "type5": ("Mm", "L")}
    for argument, value in (("outputs", outputs), ("width", width), ("pairs", pairs)):
        if value < 1:
            raise ValueError(f"{argument} must be at least 1, got {value}")
    if name in repeated:
        letters = repeated[name] * pairs
    elif name in framed:
        middle, end = framed[name]
        letters = "L" + middle * pairs + end
    else:
        near = difflib.get_close_matches(name, TYPES, n=1, cutoff=0.3)
        raise ValueError(f"unknown type {name!r}{f', nearest: {near[0]!r}' if near else ''}; known: {', '.join(TYPES)}")
    return " ".join([*(f"{letter}{width}" for letter in letters[:-1]), f"{letters[-1]}{outputs}"])


class SignedShifts(nn.Module):
    """x -> (2 ** exponent * x, -2 ** exponent * x): slopes for tropical layers behind it, by shifts instead of multiplications.

    Shape: (B, K) to (B, 2 K). Source: ours; tropical layers alone are monotone and 1-Lipschitz in every input.
    """

    def __init__(self, exponent: int) -> None:
        super().__init__()
        self.exponent = exponent

    def forward(self, x_BK: Tensor) -> Tensor:
        """Map (B, K) to (B, 2 K)."""
        shifted_BK = torch.ldexp(x_BK, torch.tensor(self.exponent, device=x_BK.device))
        return torch.cat([shifted_BK, -shifted_BK], 1)

    def extra_repr(self) -> str:
        return str(self.exponent)


class MMPNet(nn.Sequential):
    """A Min-Max-Plus net built from a string, a drop-in module.

    Args:
        spec: layers as `parse` reads them.
        in_features: values per sample, or the shape of a sample; the input is flattened.
        init: law of the tropical weights, see `lit_modules.nets.layers.init_weight_`.
        linear_init: law of the linear weights; "fan_in" is torch's own for weights and biases, which keep it in any case.
        ties: who gets the gradient where several win, "first" or "split".
    Shape: (B, ...) with in_features values per sample, to (B, width of the last layer).
    Raises:
        SpecError, ValueError: a string that is not a net, impossible sizes, an unknown law or rule (also one that no layer
            of this net would use), or an input of another width.
    Source: arXiv 2102.06358, abstract: linear, min-plus and max-plus layers.
    """

    def __init__(
        self,
        spec: str,
        in_features: int | Sequence[int],
        *,
        init: str = "normal:1.0",
        linear_init: str = "fan_in",
        ties: Ties = "first",
    ) -> None:
        tokens = parse(spec)
        in_features = math.prod(in_features) if isinstance(in_features, Sequence) else in_features
        _check_options(in_features, init, linear_init, ties)
        layers: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
        width = in_features
        for place, token in enumerate(tokens, start=1):
            layers[f"{place}_{KINDS[token.letter].replace('-', '_')}"] = _layer(token, width, init, linear_init, ties)
            width = token.width(width)
        super().__init__(layers)
        self.spec, self.in_features, self.out_features = " ".join(map(str, tokens)), in_features, width

    def __getitem__(self, index: Any) -> Any:
        """Return one layer, or a slice of them as an nn.Sequential."""
        if isinstance(index, slice):
            return nn.Sequential(OrderedDict(list(self.named_children())[index]))
        return super().__getitem__(index)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, ...) to (B, out_features)."""
        if x.ndim < 2 or math.prod(x.shape[1:]) != self.in_features:
            raise ValueError(f"this net takes (B, ...) of {self.in_features} values per sample, got {tuple(x.shape)}")
        return super().forward(x)

    def extra_repr(self) -> str:
        return f"{self.spec!r}"


def _check_options(in_features: int, init: str, linear_init: str, ties: str) -> None:
    if not isinstance(in_features, int) or in_features < 1:
        raise ValueError(f"in_features must be an int of at least 1, got {in_features!r}")
    if ties not in ("first", "split"):
        raise ValueError(f"ties must be 'first' or 'split', got {ties!r}")
    with torch.random.fork_rng(devices=[]):  # a law that no layer uses must not pass unread, nor draw a number
        for law in (init, linear_init):
            init_weight_(torch.empty(1, 1), law)


def _layer(token: Token, inputs: int, init: str, linear_init: str, ties: Ties) -> nn.Module:
    if token.letter == "R":
        return nn.ReLU()
    if token.letter == "S":
        return SignedShifts(token.number)
    if token.letter == "L":
        linear = nn.Linear(inputs, token.number)
        if linear_init != "fan_in":
            init_weight_(linear.weight.data, linear_init)
        return linear
    return TropicalLinear(inputs, token.number, kind="min" if token.letter == "m" else "max", init=init, ties=ties)


class ConvMMPNet(nn.Module):
    """Convolutions, ordinary or tropical, and an MMP head: the convolutional Min-Max-Plus stack.

    Args:
        layers: kinds of the convolutions, as in `lit_modules.nets.layers.make_layer`, such as ["Conv2d", "MinP-Min",
            "MaxP-Max"]; a convolution over the semiring itself is MinP-Min or MaxP-Max. "R" is a ReLU behind one.
        head: the layers behind, as in `MMPNet`.
        in_channels, image_size: of the images.
        width: filters of each convolution.
        kernel_size, stride: of each convolution, or one stride for each; padding is kernel_size // 2.
        init, ties, padding_value: as `TropicalConv2d`.
        linear_init: of the head's linear layers, as in `MMPNet`.
    Shape: (B, in_channels, image_size, image_size) to (B, width of the head's last layer).
    Raises:
        SpecError, ValueError: as `MMPNet` and `make_layer`, naming the value.
    Source: the layers of arXiv 2103.02096 in the order of arXiv 2102.06358; the combination is ours.
    """

    def __init__(
        self,
        layers: Sequence[str],
        head: str,
        in_channels: int,
        image_size: int,
        *,
        width: int = 8,
        kernel_size: int = 3,
        stride: int | Sequence[int] = 2,
        init: str = "normal:1.0",
        linear_init: str = "fan_in",
        ties: Ties = "first",
        padding_value: float | Literal["neutral", "replicate"] = "neutral",
    ) -> None:
        super().__init__()
        if not layers or isinstance(layers, str):
            raise ValueError(f"layers must be a list of at least one convolution (MMPNet is without), got {layers!r}")
        count = sum(kind != "R" for kind in layers)
        strides = [stride] * count if isinstance(stride, int) else list(stride)
        if not count or layers[0] == "R" or len(strides) != count:
            raise ValueError(
                f"layers start with a convolution, with a stride for each of them; got {layers} and {strides}"
            )
        sizes = {"in_channels": in_channels, "image_size": image_size, "width": width, "kernel_size": kernel_size}
        for name, value in (sizes | {f"stride {place}": step for place, step in enumerate(strides, start=1)}).items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        tropical: dict[str, Any] = {"init": init, "ties": ties, "padding_value": padding_value}
        built: OrderedDict[str, nn.Module] = OrderedDict()
        channels, side, padding = in_channels, image_size, kernel_size // 2
        steps = iter(strides)
        for place, kind in enumerate(layers, start=1):
            if kind == "R":
                built[f"{place}_ReLU"] = nn.ReLU()
                continue
            step = next(steps)
            options: dict[str, Any] = {"stride": step, "padding": padding, **tropical}
            built[f"{place}_{kind}"] = make_layer(kind, channels, width, kernel_size, **options)
            channels, side = width, (side + 2 * padding - kernel_size) // step + 1
        self.body = nn.Sequential(built)
        self.head = MMPNet(head, channels * side * side, init=init, linear_init=linear_init, ties=ties)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Map images (B, C, H, W) to (B, K)."""
        return self.head(self.body(x_BCHW))

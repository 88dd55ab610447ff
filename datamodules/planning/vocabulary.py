"""The kinds of operations in a graph and what their attributes say. Front ends map their own names onto these.

A kind outside this list keeps its own name (torch's without namespace and overload, StableHLO's without prefix) and its dims
in `attributes`; rules that do not know it can only replicate it.

`VIEWS` move no data: the layout alone changes. Attributes:

=====================  ========================================================================================================
mm, bmm                (m, k) (k, n); with a leading batch in all three for bmm
dot_general            "contract": [[dims of lhs], [dims of rhs]], "batch": likewise; out is batch, lhs free, rhs free
grouped_mm             (R, k), (N, k, n), ends (N,): rows of each of N groups have a matrix of their own
view                   any reshape, squeeze and unsqueeze too; shapes say which
permute                "dims": out dim i is input dim dims[i]; transposes too
expand                 "dims": out dim that each input dim becomes (broadcast_in_dim); a dim of size 1 may grow
slice, select, narrow  "dim", "start", "end", "step"; select drops the dim, "index"
slice_backward, ...    the gradient of these: the input's dims in a larger field of zeros; same attributes
cat                    "dim"
split                  "dim"; outputs in order
pad                    "low", "high": per dim, counts of elements added
pointwise kinds        in POINTWISE: inputs broadcast to the output as numpy does; "scalars" where operands are numbers
linear pointwise       in LINEAR: f(a + b) = f(a) + f(b) in all tensor inputs jointly; these pass partial sums on
reductions             in REDUCTIONS: "dims", "keepdim"; sum and mean are linear
softmax, log_softmax   "dim"; with _backward (grad, output)
layer_norm             (x, weight, bias) -> out, mean, rstd; "normalized": number of trailing dims, "affine": which of weight
                       and bias are there; layer_norm_backward (grad, x, mean, rstd, weight, bias) -> "wanted" of [dx, dweight,
                       dbias]
rms_norm               (x, weight) -> out, rstd; rms_norm_backward (grad, x, rstd, weight) -> "wanted" out of [dx, dweight]
batch_norm             (x, weight, bias) -> out, mean, invstd; training statistics over all but dim 1; "affine";
                       batch_norm_backward (grad, x, weight, mean, invstd) -> "wanted"
embedding              (table, ids); embedding_backward (grad, ids) -> gradient of the table
convolution            (x, weight[, bias]); "stride", "padding", "dilation", "groups", "transposed";
                       convolution_backward (grad, x, weight) -> "wanted" out of [dx, dweight, dbias]
max_pool, avg_pool     over all dims from 2 on; max_pool has a second output, indices; with _backward
sdpa                   (q, k, v[, mask]) -> out, lse; (B, H, S, k); "causal", "mask": whether there is one, "scale";
                       sdpa_backward (grad, q, k, v, out, lse[, mask]) -> dq, dk, dv[, dmask]
nll_loss               (logprob, target) -> loss, total_weight; "reduction"; nll_loss_backward (grad, logprob, target, total)
gather, scatter_add    "dim"; index_select (x, index) "dim"; index_add (x, index, source) "dim"
topk, sort, cumsum     "dim"
iota, full, constant   no inputs: made in place, the same on every device; full has a "value" if it is known
=====================  ========================================================================================================

The layout of `wanted`: the outputs are only those that are true, in order.
"""

from __future__ import annotations

VIEWS = frozenset({"view", "permute", "expand", "slice", "select", "split", "alias"})
CONSTANTS = frozenset({"iota", "full", "constant", "eye", "random"})
LINEAR = frozenset({"add", "sub", "neg", "clone", "cast", "sum_to"})  # in all tensor inputs jointly
SCALED = frozenset({"mul", "div"})  # linear in the first input where the second is a number or is replicated
UNARY_TEXT = """abs cos erf exp expm1 floor ceil round gelu silu relu sigmoid tanh sin sqrt rsqrt log log1p log2 reciprocal sign
logical_not bitwise_not isnan isinf isfinite pow square cbrt clamp elu hardswish hardsigmoid hardtanh leaky_relu mish softplus
bitcast dropout"""
BINARY_TEXT = """maximum minimum eq ne lt le gt ge logical_and logical_or logical_xor bitwise_and bitwise_or bitwise_xor
bitwise_left_shift bitwise_right_shift atan2 remainder fmod gelu_backward silu_backward threshold_backward tanh_backward
sigmoid_backward dropout_backward floor_divide power elu_backward hardswish_backward hardsigmoid_backward hardtanh_backward
leaky_relu_backward mish_backward softplus_backward"""
UNARY, BINARY = frozenset(UNARY_TEXT.split()), frozenset(BINARY_TEXT.split())
TERNARY = frozenset({"where", "masked_fill", "addcmul", "addcdiv", "lerp", "clamp_tensor"})
POINTWISE = LINEAR | SCALED | UNARY | BINARY | TERNARY
REDUCTIONS = frozenset({"sum", "mean", "amax", "amin", "prod", "any", "all", "argmax", "argmin", "var", "logsumexp"})

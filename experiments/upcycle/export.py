"""Between our transformer and Hugging Face: a run's checkpoint out, a dense Llama-like checkpoint in.

Out: dense nets become Llama, mixtures Mixtral (topk_softmax in all layers) or Qwen2-MoE. Only gated activations have a host:
Hugging Face has no architecture with softmax routing and squared-ReLU experts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from experiments.errors import UserError
from experiments.upcycle.hosts import ACTIVATIONS, choose_host, completed, extra_shapes, host_config
from experiments.upcycle.names import host_tensors, to_llama_names
from experiments.upcycle.receipt import shape_of
from experiments.upcycle.source import Source
from experiments.upcycle.writer import Shards, whole_or_nothing, write_json
from lit_modules.nets.moe import Experts
from lit_modules.nets.pricing import Shape
from lit_modules.nets.transformer import Transformer


def load_dense(source: Source, shape: Shape | None = None) -> Transformer:
    """Return our transformer with a dense checkpoint's weights, float32.

    Args:
        shape: the size it must have, or None to take that of the checkpoint.
    Raises:
        UserError: what our transformer has not (biases, norms on queries and keys, scaled positions, sliding windows), or a
            checkpoint of another shape.
    """
    config = source.config
    extra = [key for key in source if key.endswith(("_bias", "query_norm.weight", "key_norm.weight"))]
    if extra:
        raise UserError(
            f"our transformer has no {extra[0].split('.')[-2]}.{extra[0].split('.')[-1]} ({config['model_type']})"
        )
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if rope.get("rope_type", rope.get("type", "default")) != "default":
        raise UserError(f"our transformer has no scaled rotary positions ({rope})")
    if config.get("sliding_window") is not None:
        raise UserError("our transformer has no sliding windows; set sliding_window to null if it is not used")
    net = Transformer(**vars(shape or shape_of(config)))
    own = net.state_dict()
    wrong = [
        key for key in {**own, **source.shapes} if source.shapes.get(key) != tuple(own[key].shape if key in own else ())
    ]
    if wrong:
        raise UserError(f"{source.name} is of another shape: {', '.join(wrong[:10])}")
    with torch.no_grad():
        for key, tensor in own.items():
            tensor.copy_(source[key])
    return net


def load_run(checkpoint: Path) -> tuple[Transformer, int]:
    """Return the net of a run of paper 1 with a checkpoint's weights, and the context that it was trained with.

    Raises:
        UserError: no such file, no config.yaml of a run beside it, another paper's net, or weights that do not fit.
    """
    from hydra.utils import instantiate

    file = checkpoint.with_name("config.yaml")
    for needed in (checkpoint, file):
        if not needed.is_file():
            raise UserError(
                f"there is no {needed}; give a checkpoint in its run's folder, such as runs/SIGNATURE/best.ckpt"
            )
    config: dict[str, Any] = yaml.safe_load(file.read_text())
    if not str(config.get("net", {}).get("_target_", "")).endswith(".Transformer"):
        raise UserError(f"{file} is not of a language model of paper 1")
    net: Transformer = instantiate(config["net"])
    if inherit := (config.get("parent") or {}).get("inherit"):
        step = instantiate(inherit)
        if hasattr(step, "settle"):
            step.settle(net)
    state = torch.load(checkpoint, map_location="cpu", weights_only=False)["state_dict"]
    try:
        net.load_state_dict({key.removeprefix("net."): w for key, w in state.items() if key.startswith("net.")})
    except RuntimeError as error:
        raise UserError(f"{checkpoint} does not fit {file}: {error}") from error
    return net, int(config["datamodule"]["context"])


def export(net: Transformer, folder: Path, context: int, balance: float = 1e-2, force: bool = False) -> dict[str, Any]:
    """Write a net as a Hugging Face directory that loads without remote code; return its config.json.

    Args:
        context: the longest sequence that the net has seen.
        balance: our coefficient of the load-balancing loss.
    Raises:
        UserError: a net that no architecture can hold, with the reason; a target that exists.
    """
    names = {ours: theirs for theirs, ours in ACTIVATIONS.items()}
    activation = net.arguments["activation"]
    if activation not in names:
        raise UserError(
            f"no Hugging Face architecture has softmax routing and {activation} MLPs without a gate: only nets with "
            f"{', '.join(names)} can be exported. This one stays usable as a checkpoint of this library"
        )
    config = _llama_config(net, names[activation], context)
    mixtures = net.moe_layers()
    host = None
    if mixtures:
        config, host = _moe_config(net, config, balance)
    state = net.state_dict()
    with whole_or_nothing(folder, force) as partial:
        shards = Shards(partial, len(net.blocks) + 2)
        rest = [key for key in state if not key.startswith(("blocks.", "embedding."))]
        for keys in [
            ["embedding.weight"],
            *([k for k in state if k.startswith(f"blocks.{i}.")] for i in range(len(net.blocks))),
            rest,
        ]:
            shards.write(_named(net, host, {key: state[key] for key in keys}))
        shards.finish()
        write_json(partial / "config.json", config)
    return config


def _named(net: Transformer, host: str | None, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return one shard's tensors under the host's names, output factors taken into down."""
    if host is None:
        return {name: state[key] for key, name in to_llama_names(state).items()}
    made: dict[str, Tensor] = {}
    for key, tensor in state.items():
        if key.endswith(".output_scale"):
            continue
        hit = key.split(".")
        if hit[0] == "blocks" and hit[2:] == ["mlp", "down"]:
            spec = net.moe_layers()[int(hit[1])].experts
            if spec.output == "constant":
                tensor = tensor * spec.output_value
            elif spec.output == "learnable":
                tensor = tensor * state[f"blocks.{hit[1]}.mlp.output_scale"]
            like = net.arguments["width"]
            made |= {name: tensor.new_zeros(shape) for name, shape in extra_shapes(host, int(hit[1]), like).items()}
        made |= dict(host_tensors(host, key, tensor))
    return made


def _llama_config(net: Transformer, hidden_act: str, context: int) -> dict[str, Any]:
    shape = Shape(**net.arguments)
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": shape.vocab,
        "hidden_size": shape.width,
        "intermediate_size": shape.hidden,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads or shape.heads,
        "head_dim": net.head_width,
        "hidden_act": hidden_act,
        "rms_norm_eps": shape.norm_eps,
        "rope_theta": shape.rope_base,
        "tie_word_embeddings": shape.tied,
        "initializer_range": shape.init_std,
        "max_position_embeddings": context,
        "bos_token_id": None,
        "eos_token_id": None,
        "dtype": str(net.embedding.weight.dtype).removeprefix("torch."),
    }


def _moe_config(net: Transformer, config: dict[str, Any], balance: float) -> tuple[dict[str, Any], str]:
    """Return config.json of a mixture and its architecture.

    Raises:
        UserError: shared experts or a norm after the experts, or what `choose_host` refuses.
    """
    mixtures = net.moe_layers()
    spec: Experts = next(iter(mixtures.values())).experts
    if spec.shared or spec.output == "layernorm":
        what = "shared experts without a gate" if spec.shared else "a norm after the experts"
        raise UserError(f"no Hugging Face architecture here has {what}")
    dense = [i for i in range(len(net.blocks)) if i not in mixtures]
    full = completed(config)
    host = choose_host(full, spec.order, bool(dense))
    width = spec.width(full["intermediate_size"])
    return host_config(full, host, spec.count, width, spec.top_k, spec.order, dense, balance), host

"""What the library needs to know of a base model: its decoder, its layers, its LM head, what LoRA may target, and a
fingerprint that tells one base from another."""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Iterator
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fastqadapter.config import KVMode
from fastqadapter.loss import LMHead

logger = logging.getLogger(__name__)

# Layers whose output is keys or values and nothing else. A fused qkv is not among them: its K/V rows are not read in
# `shared` mode, so the adapter on them is dead weight but does no harm.
KV_MODULES = frozenset({"k_proj", "v_proj", "kv_proj", "kv_a_proj_with_mqa", "kv_b_proj", "key", "value", "wk", "wv"})
# Layers that expand the compressed K/V of the cache: where the prompt's are the base's, they must stay the base's too.
KV_EXPANSIONS = frozenset({"kv_b_proj"})
FORBIDDEN_TARGETS: dict[str, frozenset[str]] = {
    "separate": frozenset(),
    "prompt": KV_EXPANSIONS,
    "shared": KV_MODULES,
}
# A router decides which expert sees a token; PEFT leaves it alone in "all-linear" too.
ROUTERS = frozenset({"gate", "router", "shared_expert_gate"})
# Attention that packed segments can express; recurrent or convolutional layers would mix neighbouring sequences.
PACKABLE_LAYER_TYPES = frozenset({"full_attention", "sliding_attention"})


def decoder_of(model: PreTrainedModel) -> PreTrainedModel:
    """The module that maps tokens to last hidden states after the final norm."""
    decoder: PreTrainedModel = model.get_decoder()
    if decoder is model:
        raise ValueError(f"{type(model).__name__} has no decoder below its LM head; give a causal LM of transformers")
    return decoder


def decoder_layers(decoder: PreTrainedModel) -> nn.ModuleList:
    """The list of decoder layers.

    Raises:
        ValueError: no module list of `num_hidden_layers` entries.
    """
    depth = decoder.config.get_text_config(decoder=True).num_hidden_layers
    for child in decoder.children():
        if isinstance(child, nn.ModuleList) and len(child) == depth:
            return child
    raise ValueError(f"{type(decoder).__name__} holds no list of {depth} decoder layers")


def lm_head_of(model: PreTrainedModel) -> LMHead:
    """The LM head with the logit scale and the soft-cap of the model's config.

    Raises:
        ValueError: the head is no plain linear layer.
    """
    head = model.get_output_embeddings()
    if isinstance(head, BaseTunerLayer) or not isinstance(getattr(head, "weight", None), Tensor):
        raise ValueError(f"the LM head is a {type(head).__name__}; expected a plain linear layer without adapter")
    config = model.config.get_text_config(decoder=True)
    scale = float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)
    return LMHead(
        weight=head.weight.detach(),
        bias=None if getattr(head, "bias", None) is None else head.bias.detach(),
        logit_scale=scale,
        softcap=getattr(config, "final_logit_softcapping", None),
    )


@torch.no_grad()
def check_lm_head(model: PreTrainedModel, decoder: PreTrainedModel, head: LMHead) -> None:
    """Compare the head as we understand it with the model's own logits on a few tokens.

    Architectures rescale or cap their logits in ways of their own; one that we do not know must not pass unnoticed.

    Raises:
        ValueError: they differ by more than rounding.
    """
    if head.weight.is_meta:
        raise ValueError(f"the weights of {type(model).__name__} are on the meta device: load them first")
    if head.weight.numel() == 0:
        raise ValueError(
            f"the weights of {type(model).__name__} are partitioned by DeepSpeed ZeRO-3: load the model before the "
            "training arguments are made, or give QAdapterTrainer its name"
        )
    # Several: the embedding of a padding token may be all zeros, and its logits too.
    tokens = torch.arange(min(8, head.weight.shape[0]), device=head.weight.device)[None]
    outputs: list[Any] = []
    handle = decoder.register_forward_hook(lambda module, args, output: outputs.append(output))
    try:
        expected = model(input_ids=tokens, use_cache=False).logits[0].float()
    finally:
        handle.remove()
    hidden = outputs[-1].last_hidden_state[0]
    products = torch.nn.functional.linear(hidden.to(head.weight.dtype), head.weight).float()
    ours = head.scale_and_cap(products, None if head.bias is None else head.bias.float())
    tolerance = 1e-4 if head.weight.dtype in (torch.float32, torch.float64) else 3e-2
    if not torch.allclose(ours, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max())):
        raise ValueError(
            f"{type(model).__name__} computes its logits in a way that fastqadapter does not know (largest difference "
            f"{(ours - expected).abs().max().item():.3g}); please report the architecture"
        )


def check_packable(model: PreTrainedModel, decoder: PreTrainedModel) -> None:
    """Raise a ValueError with the reason if packed training cannot serve this architecture."""
    if not type(model)._can_set_attn_implementation():
        raise ValueError(
            f"{type(model).__name__} does not use transformers' attention interface, which packed training needs"
        )
    config = decoder.config.get_text_config(decoder=True)
    others = sorted(set(getattr(config, "layer_types", None) or ()) - PACKABLE_LAYER_TYPES)
    if others:
        raise ValueError(f"{type(model).__name__} has layers of type {others}; packed training knows full and sliding")


def heed_attention_softcap(model: PreTrainedModel) -> None:
    """Take a base off SDPA whose attention scores have a soft-cap (Gemma-2): SDPA drops it, and transformers 5.16 takes
    SDPA for it all the same."""
    config = decoder_of(model).config.get_text_config(decoder=True)
    if getattr(config, "attn_logit_softcapping", None) and config._attn_implementation == "sdpa":
        logger.info("%s: attention 'eager', because SDPA drops its soft-cap", type(model).__name__)
        model.set_attn_implementation("eager")


def check_bare(model: nn.Module) -> None:
    """Raise a ValueError if the model carries adapters already: then it is no frozen base."""
    if isinstance(model, PeftModel) or any(True for _ in tuner_layers(model)):
        raise ValueError(
            f"the base model ({type(model).__name__}) has adapters on it already; give the plain causal LM (further "
            "Q-Adapters go on a QAdapterModel by load_adapter or add_adapter)"
        )


def frozen_modules(model: PreTrainedModel) -> list[nn.Module]:
    """The modules that stay in evaluation mode while the adapters train: with dropout, the base is the base no more.

    All but the adapters' own, and but the decoder and its layers, since transformers checkpoints gradients in training
    mode alone; see `silence_own_dropout`.
    """
    decoder = decoder_of(model)
    follow = {id(decoder), *map(id, decoder_layers(decoder))}
    for _, layer in tuner_layers(model):
        follow |= {id(module) for module in layer.modules()}
        follow -= {id(module) for module in layer.get_base_layer().modules()}
    return [module for module in model.modules() if id(module) not in follow]


def silence_own_dropout(decoder: PreTrainedModel) -> None:
    """Set the dropout probabilities to 0 that the decoder and its layers hold as numbers of their own (OPT)."""
    for module in (decoder, *decoder_layers(decoder)):
        for name, value in vars(module).items():
            if isinstance(value, float) and "drop" in name:
                setattr(module, name, 0.0)


def default_targets(model: PreTrainedModel, kv_mode: KVMode) -> set[str] | str:
    """LoRA targets where the user names none: all linear layers of the decoder layers that the mode allows.

    The last parts of their names; a regular expression where other modules, as of a vision tower, have the same names.
    """
    forbidden = ROUTERS | FORBIDDEN_TARGETS[kv_mode]
    layers = decoder_layers(decoder_of(model))
    inside = {id(module) for module in layers.modules()}
    wrappers = {name for name, _ in tuner_layers(layers)}  # of adapters that are there already
    names = {
        name.rpartition(".")[2]
        for name, module in layers.named_modules()
        if (isinstance(module, nn.Linear | Conv1D) and not any(name.startswith(f"{wrapper}.") for wrapper in wrappers))
        or name in wrappers
    } - forbidden
    if any(name.rpartition(".")[2] in names and id(module) not in inside for name, module in model.named_modules()):
        [prefix] = [name for name, module in model.named_modules() if module is layers]
        return rf"{re.escape(prefix)}\..*\.({'|'.join(sorted(names))})"
    return names


def tuner_layers(model: nn.Module) -> Iterator[tuple[str, BaseTunerLayer]]:
    """The modules that PEFT put an adapter on, with their names."""
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            yield name, module


def check_targets(model: PreTrainedModel, kv_mode: KVMode) -> None:
    """Refuse adapters where the method cannot have them.

    Raises:
        ValueError: an adapter (or any trainable weight) on the LM head, the embeddings or outside the decoder layers,
            a trained weight of the base itself, or K/V targets in `shared` mode; names the module.
    """
    inside = {id(module) for module in decoder_layers(decoder_of(model)).modules()}
    adapted: set[int] = set()
    for name, module in tuner_layers(model):
        if id(module) not in inside:
            raise ValueError(
                f"adapter on {name!r}: the LM head and the embeddings are frozen and shared by both streams; "
                "target linear layers of the decoder only"
            )
        if name.rpartition(".")[2] in FORBIDDEN_TARGETS[kv_mode]:
            others = "'separate' or 'prompt'" if kv_mode == "shared" else "'separate'"
            raise ValueError(
                f"adapter on {name!r}: with kv_mode={kv_mode!r} the Q stream reads keys and values of the base model, "
                f"so an adapter here is ignored or wrong; target q, o and MLP layers, or use kv_mode={others}"
            )
        for attribute in module.adapter_layer_names:
            adapted |= {id(parameter) for parameter in getattr(module, attribute).parameters()}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) not in adapted:
            raise ValueError(
                f"{name!r} of the base model would be trained; the base is frozen here: target linear layers alone"
            )


def unwrap_bare_layers(model: nn.Module) -> None:
    """Put the base's own module back where PEFT's wrapper holds no adapter any more."""
    for name, module in list(tuner_layers(model)):
        if not any(len(getattr(module, attribute)) for attribute in module.adapter_layer_names):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, module.get_base_layer())


def first_adapted_layer(layers: nn.ModuleList) -> int:
    """Index of the lowest decoder layer with an adapter: below it both streams are one, the trunk. Their number where
    there is none."""
    for index, layer in enumerate(layers):
        if any(isinstance(module, BaseTunerLayer) for module in layer.modules()):
            return index
    return len(layers)


@torch.no_grad()
def fingerprint(model: PreTrainedModel) -> dict[str, Any]:
    """What identifies a base model: architecture, shape, and hashes of samples of its weights.

    `head` is of embeddings, LM head and norms, `body` of the matrices; `body` is None where these are packed (in a
    quantised base) or offloaded. Each is two hashes, see `_WeightHash`.
    """
    config = model.config.get_text_config(decoder=True)
    head, body = _WeightHash(), _WeightHash()
    packed, matrices = False, 0
    for embeddings in (model.get_input_embeddings().weight, model.get_output_embeddings().weight):
        head.update(embeddings[: min(256, embeddings.shape[0])])
    for name, parameter in decoder_layers(decoder_of(model)).named_parameters():
        if any(part.startswith("lora_") for part in name.split(".")):
            continue
        if parameter.is_meta or not parameter.is_floating_point() or parameter.itemsize == 1:
            packed = True  # quantised, or offloaded to the disk
        elif parameter.dim() < 2:
            head.update(parameter)
        else:
            body.update(parameter[:2])
            matrices += 1
    return {
        "architecture": type(model).__name__,
        "name_or_path": str(model.config.name_or_path),
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "head": head.digests(),
        "body": None if packed or not matrices else body.digests(),
    }


class _WeightHash:
    """Hashes of samples of weights, that know the same weights again after they were loaded in another dtype.

    One is of the values rounded to bf16; the other of those rounded to fp16 on the way, which is what a base loaded in
    fp16 shows. The same weights in fp32, bf16 or fp16 have at least one of the two in common.
    """

    def __init__(self) -> None:
        self._direct, self._by_fp16 = hashlib.sha256(), hashlib.sha256()

    def update(self, tensor: Tensor) -> None:
        flat = tensor.reshape(-1)
        sample = flat[:: max(1, flat.numel() // 1024)].cpu()
        for digest, values in ((self._direct, sample), (self._by_fp16, sample.to(torch.float16))):
            digest.update(values.to(torch.bfloat16).view(torch.int16).numpy().tobytes())

    def digests(self) -> list[str]:
        return [digest.hexdigest()[:16] for digest in (self._direct, self._by_fp16)]


def check_same_base(trained_on: dict[str, Any], found: dict[str, Any], adapter: str) -> None:
    """Raise a ValueError that names the difference if an adapter was trained on another base."""
    for key in ("architecture", "hidden_size", "num_hidden_layers", "head", "body"):
        expected, actual = trained_on.get(key), found[key]
        if expected is None or actual is None:
            continue
        hashed = key in ("head", "body")
        if not (set(expected) & set(actual) if hashed else expected == actual):
            raise ValueError(
                f"adapter {adapter!r} was trained on another base model ({trained_on.get('name_or_path')!r}): its "
                f"{'weights' if hashed else key} differ ({expected!r}, here {actual!r}); load that base, or pass "
                "force=True"
            )

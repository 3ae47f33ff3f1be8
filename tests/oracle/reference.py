"""Encoders that transformers does not have, in plain torch, from their published descriptions.

Weights are a dict, named as in the published checkpoints, so that llama.cpp's converter knows them.
Each function takes them and the token ids of one text, and returns its last hidden states.
"""

from collections.abc import Mapping, Sequence

import torch
from torch.nn import functional as F

Weights = Mapping[str, torch.Tensor]

HEADS = 4
EPSILON = 1e-12  # of layer norms
RMS_EPSILON = 1e-6
EXPERTS, EXPERTS_USED = 4, 2


def jina_bert_v2(weights: Weights, ids: Sequence[int]) -> torch.Tensor:
    """JinaBERT v2 (Günther et al. 2023): BERT with symmetric ALiBi and GEGLU, no positions."""
    x = embed(weights, ids, "embeddings.LayerNorm")
    places = torch.arange(len(ids), dtype=torch.float32)
    distances = (places[:, None] - places).abs()
    slopes = 2.0 ** (-8.0 * torch.arange(1, HEADS + 1) / HEADS)
    bias = -slopes[:, None, None] * distances
    for layer in layers(weights, "encoder.layer."):
        part = layer + "attention."
        q, k, v = (linear(weights, f"{part}self.{name}", x) for name in ("query", "key", "value"))
        mixed = linear(weights, part + "output.dense", attend(split(q), split(k), split(v), bias))
        x = norm(weights, part + "output.LayerNorm", x + mixed)
        gate, up = linear(weights, layer + "mlp.gated_layers", x).chunk(2, -1)
        fed = linear(weights, layer + "mlp.wo", F.gelu(gate) * up)
        x = norm(weights, layer + "mlp.layernorm", x + fed)
    return x


def nomic_bert_moe(weights: Weights, ids: Sequence[int]) -> torch.Tensor:
    """Nomic Embed v2 (Nussbaum and Duderstadt 2025): rotary BERT, every second layer of experts.

    Each token goes to the best experts, weighted by the softmax over all of them. The bias that
    the checkpoint has beside its experts is left out: llama.cpp's converter drops it.
    """
    x = embed(weights, ids, "emb_ln")
    for i, layer in enumerate(layers(weights, "encoder.layers.")):
        q, k, v = map(split, linear(weights, layer + "attn.Wqkv", x).chunk(3, -1))
        mixed = attend(rotate_halves(q), rotate_halves(k), v)
        x = norm(weights, layer + "norm1", x + linear(weights, layer + "attn.out_proj", mixed))
        if i % 2:
            fed = experts(weights, layer + "mlp.", x)
        else:
            fed = linear(weights, layer + "mlp.fc2", F.gelu(linear(weights, layer + "mlp.fc1", x)))
        x = norm(weights, layer + "norm2", x + fed)
    return x


def neo_bert(weights: Weights, ids: Sequence[int]) -> torch.Tensor:
    """NeoBERT (Le Breton et al. 2025): norms first, rotary neighbours, SwiGLU."""
    x = weights["encoder.weight"][torch.tensor(ids)]
    for layer in layers(weights, "transformer_encoder."):
        normed = rms_norm(weights, layer + "attention_norm", x)
        # A head's q, k and v stand side by side.
        per_head = linear(weights, layer + "qkv", normed).unflatten(-1, (HEADS, -1)).transpose(0, 1)
        q, k, v = per_head.chunk(3, -1)
        mixed = attend(rotate_neighbours(q), rotate_neighbours(k), v)
        x = x + linear(weights, layer + "wo", mixed)
        gate, up = linear(
            weights, layer + "ffn.w12", rms_norm(weights, layer + "ffn_norm", x)
        ).chunk(2, -1)
        x = x + linear(weights, layer + "ffn.w3", F.silu(gate) * up)
    return rms_norm(weights, "layer_norm", x)


def layers(weights: Weights, prefix: str) -> list[str]:
    """Return what the names of each layer's weights start with."""
    count = 1 + max(int(name[len(prefix) :].split(".")[0]) for name in weights if prefix in name)
    return [f"{prefix}{i}." for i in range(count)]


def embed(weights: Weights, ids: Sequence[int], norm_name: str) -> torch.Tensor:
    """Return the normed embeddings of tokens, all of the first segment."""
    words = weights["embeddings.word_embeddings.weight"][torch.tensor(ids)]
    return norm(weights, norm_name, words + weights["embeddings.token_type_embeddings.weight"][0])


def experts(weights: Weights, part: str, x: torch.Tensor) -> torch.Tensor:
    """Send each token to its best experts."""
    w1, w2 = (weights[f"{part}experts.mlp.{w}"].unflatten(0, (EXPERTS, -1)) for w in ("w1", "w2"))
    outputs = F.gelu(x @ w1.transpose(1, 2)) @ w2  # expert, token, value
    chances = linear(weights, part + "router.layer", x).softmax(-1)
    best = chances.topk(EXPERTS_USED, -1).indices
    kept = torch.zeros_like(chances).scatter(-1, best, chances.gather(-1, best))
    return torch.einsum("te,etd->td", kept, outputs)


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Let every token look at every token; heads come first, and are joined again."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(0, 1).flatten(1)


def split(x: torch.Tensor) -> torch.Tensor:
    """Cut rows into heads: token, value -> head, token, value."""
    return x.unflatten(-1, (HEADS, -1)).transpose(0, 1)


def angles(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cosines and sines for rotary positions, one for each pair of values."""
    width = x.shape[-1]
    speeds = 10000.0 ** (-torch.arange(0, width, 2) / width)
    turned = torch.outer(torch.arange(x.shape[-2], dtype=torch.float32), speeds)
    return turned.cos(), turned.sin()


def rotate_halves(x: torch.Tensor) -> torch.Tensor:
    """Rotate by position; a pair is a value and the one half a head further on."""
    cos, sin = angles(x)
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def rotate_neighbours(x: torch.Tensor) -> torch.Tensor:
    """Rotate by position; a pair is two values side by side."""
    cos, sin = angles(x)
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)


def linear(weights: Weights, name: str, x: torch.Tensor) -> torch.Tensor:
    """Apply a matrix, and its bias if there is one."""
    return F.linear(x, weights[name + ".weight"], weights.get(name + ".bias"))


def norm(weights: Weights, name: str, x: torch.Tensor) -> torch.Tensor:
    """Apply a layer norm."""
    weight, bias = weights[name + ".weight"], weights[name + ".bias"]
    return F.layer_norm(x, weight.shape, weight, bias, EPSILON)


def rms_norm(weights: Weights, name: str, x: torch.Tensor) -> torch.Tensor:
    """Apply an RMS norm."""
    weight = weights[name + ".weight"]
    return F.rms_norm(x, weight.shape, weight, RMS_EPSILON)

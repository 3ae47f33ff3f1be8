"""Make the tiny models of more families, as GGUF files, and their golden outputs.

As in make_tiny.py, whose rules hold here too. Where transformers lacks an architecture, the outputs
come from reference.py. Run once, by hand; names of families after the folder make only those.
"""

import argparse
import functools
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace

import gguf
import reference
import safetensors.torch
import sentencepiece
import tokenizers as tk
import torch
import transformers as tf
from make_tiny import (
    HIDDEN,
    MAX_TOKENS,
    Maker,
    amend,
    bert_vocabulary,
    llama_tokenizer,
    qwen_tokenizer,
    randomize,
    train_pieces,
    write_bert_tokenizer,
    write_json,
    write_pooling,
)

LAYERS = 2
WIDE = 64  # of a feed-forward layer
WINDOW = 24  # tokens of local attention, less than most texts have
PLACES = 512  # positions, where there is no table of them
SIZES = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": reference.HEADS,
    "intermediate_size": WIDE,
    "max_position_embeddings": PLACES,
}
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


# ------------------------------------------------------------------------------ vocabularies


def byte_level(
    texts: Sequence[str],
    specials: Mapping[str, str],
    *,
    single: str,
    pair: str,
    pattern: str | None = None,
    normalizer: tk.normalizers.Normalizer | None = None,
    size: int = 450,
) -> tf.PreTrainedTokenizerFast:
    """Train a byte-level vocabulary, which splits as GPT-2 does unless a pattern is given.

    The special tokens, by their roles, come first.
    """
    tokenizer = tk.Tokenizer(tk.models.BPE(ignore_merges=pattern is not None))
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    steps = [tk.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)]
    if pattern is not None:
        steps.insert(0, tk.pre_tokenizers.Split(tk.Regex(pattern), "isolated"))
    tokenizer.pre_tokenizer = tk.pre_tokenizers.Sequence(steps) if pattern else steps[0]
    tokenizer.decoder = tk.decoders.ByteLevel()
    known = list(dict.fromkeys(specials.values()))
    trainer = tk.trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=known,
        initial_alphabet=sorted(tk.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    around = [(token, tokenizer.token_to_id(token)) for token in known if token in single + pair]
    tokenizer.post_processor = tk.processors.TemplateProcessing(
        single=single, pair=pair, special_tokens=around
    )
    return tf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **specials)


def modern_bert_tokenizer(texts: Sequence[str]) -> tf.PreTrainedTokenizerFast:
    """Train a vocabulary with BERT's special tokens, and runs of spaces that are tokens."""
    tokenizer = byte_level(
        texts,
        {f"{name}_token": f"[{name.upper()}]" for name in ("unk", "cls", "sep", "pad", "mask")},
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        normalizer=tk.normalizers.NFC(),
    )
    runs = [tk.AddedToken(" " * n, normalized=True, special=False) for n in (4, 3, 2)]
    tokenizer.add_tokens(runs)
    return tokenizer


class Pieces:
    """A sentencepiece vocabulary, between a first and a last token."""

    def __init__(self, path: Path, first: int, last: int) -> None:
        """Read what `train_pieces` wrote."""
        self._processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
        self._first, self._last = first, last

    def __len__(self) -> int:
        """Count the pieces."""
        return self._processor.vocab_size()

    def __call__(self, text: str) -> list[int]:
        """Return the ids of a text."""
        return [self._first, *self._inside(text), self._last]

    def _inside(self, text: str) -> list[int]:
        return self._processor.encode(text)


class XlmrPieces(Pieces):
    """One whose ids are XLM-R's: a token more at the start, and another order of the first ones."""

    def __init__(self, path: Path) -> None:
        """Read what `train_pieces` wrote."""
        super().__init__(path, first=0, last=2)

    def __len__(self) -> int:
        """Count the tokens."""
        return super().__len__() + 1

    def _inside(self, text: str) -> list[int]:
        unknown = self._processor.unk_id()
        return [3 if piece == unknown else piece + 1 for piece in super()._inside(text)]


def gemma_pieces(folder: Path, texts: Sequence[str], *, size: int) -> Pieces:
    """Train pieces as Gemma's, with its special tokens, into a new folder."""
    folder.mkdir()
    path = folder / "tokenizer.model"
    train_pieces(
        path,
        [text for text in texts if text.isascii()],  # bytes spell the rest
        vocab_size=size,
        model_type="bpe",
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
    )
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "GemmaTokenizer",
            "add_bos_token": True,
            "add_eos_token": True,
            "bos_token": "<s>",
            "eos_token": "</s>",
            "unk_token": "<unk>",
            "pad_token": "<pad>",
        },
    )
    return Pieces(path, first=2, last=1)


def ids_by(tokenizer: tf.PreTrainedTokenizerBase) -> Callable[..., list[int]]:
    """Return what gives the ids of a text, or of a pair."""
    return lambda *texts: tokenizer(*texts)["input_ids"]


# ------------------------------------------------------------------------------ weights


def random_weights(shapes: Mapping[str, Sequence[int]], seed: int) -> dict[str, torch.Tensor]:
    """Draw weights for a reference, by the rule of `randomize`."""
    holder = torch.nn.ParameterDict(
        # A dot in the name of a parameter is not allowed.
        {name.replace(".", "/"): torch.empty(*shape) for name, shape in shapes.items()}
    )
    randomize(holder, seed, gain=2)
    return {name.replace("/", "."): weight.detach() for name, weight in holder.items()}


def by_reference(run: Callable, weights: Mapping[str, torch.Tensor]) -> Callable:
    """Let a reference be called as a model of transformers."""

    def call(input_ids: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(last_hidden_state=run(weights, input_ids[0].tolist())[None])

    return call


def both_ways(model: torch.nn.Module) -> Callable:
    """Let every token of a decoder see every other one."""

    def call(input_ids: torch.Tensor) -> object:
        n = input_ids.shape[1]
        return model(input_ids=input_ids, attention_mask=torch.zeros(1, 1, n, n))

    return call


def with_norm(name: str) -> dict[str, Sequence[int]]:
    """Return the shapes of a layer norm."""
    return {f"{name}.weight": (HIDDEN,), f"{name}.bias": (HIDDEN,)}


def with_linear(name: str, rows: int, columns: int) -> dict[str, Sequence[int]]:
    """Return the shapes of a matrix with a bias."""
    return {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}


def save_weights(folder: Path, weights: Mapping[str, torch.Tensor], config: Mapping) -> None:
    """Write a folder as those on the Hub are."""
    folder.mkdir(exist_ok=True)
    write_json(folder / "config.json", config)
    kept = {name: weight.contiguous() for name, weight in weights.items()}
    safetensors.torch.save_file(kept, folder / "model.safetensors", {"format": "pt"})


# ------------------------------------------------------------------------------ families


def make_roberta(maker: Maker, name: str) -> None:
    """RoBERTa: BERT with a byte-level vocabulary, positions that start at 2."""
    tokenizer = byte_level(
        maker.texts,
        {
            "bos_token": "<s>",
            "pad_token": "<pad>",
            "eos_token": "</s>",
            "unk_token": "<unk>",
            "cls_token": "<s>",
            "sep_token": "</s>",
            "mask_token": "<mask>",
        },
        single="<s> $A </s>",
        pair="<s> $A </s> </s> $B </s>",
    )
    sizes = {
        **SIZES,
        "vocab_size": len(tokenizer),
        "type_vocab_size": 1,
        "max_position_embeddings": MAX_TOKENS + 2,
        "layer_norm_eps": 1e-5,
    }
    model = randomize(tf.RobertaModel(tf.RobertaConfig(**sizes)), seed=11, gain=2)
    folder = maker.work / name
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_pooling(folder, "mean_tokens")
    maker.convert(folder, name, "roberta-bpe")
    maker.save_vectors(name, model, ids_by(tokenizer), pooling="mean")


def make_nomic(maker: Maker, name: str) -> None:
    """nomic-embed-text v1 and v1.5."""
    vocabulary = bert_vocabulary(maker.texts)
    sizes = {**SIZES, "max_position_embeddings": 8192, "vocab_size": len(vocabulary)}
    config = tf.NomicBertConfig(
        **sizes, rope_parameters={"rope_type": "default", "rope_theta": 1e3}
    )
    model = randomize(tf.NomicBertModel(config), seed=12, gain=2)
    weights = dict(model.named_parameters())
    renamed = {key: weight for key, weight in weights.items() if "_embeddings." in key}
    parts = {
        "self_attn.o_proj": "attn.out_proj",
        "post_attention_layernorm": "norm1",
        "post_mlp_layernorm": "norm2",
        "mlp.up_proj": "mlp.fc11",
        "mlp.gate_proj": "mlp.fc12",
        "mlp.down_proj": "mlp.fc2",
    }
    for kind in ("weight", "bias"):
        renamed[f"emb_ln.{kind}"] = weights[f"embeddings.LayerNorm.{kind}"]
    for i in range(LAYERS):
        old, new = f"layers.{i}.", f"encoder.layers.{i}."
        renamed[new + "attn.Wqkv.weight"] = torch.cat(
            [weights[f"{old}self_attn.{part}_proj.weight"] for part in "qkv"]
        )
        for key, weight in weights.items():
            for theirs, ours in parts.items():
                if key.startswith(old + theirs):
                    renamed[key.replace(old + theirs, new + ours)] = weight
    folder = maker.work / name
    save_weights(folder, renamed, nomic_config(len(vocabulary), n_positions=8192, rope_base=1e3))
    write_bert_tokenizer(folder, vocabulary)
    write_pooling(folder, "mean_tokens")
    maker.convert(folder, name)
    maker.save_vectors(name, model, ids_by(bert_tokenizer(folder)), pooling="mean")


def make_nomic_moe(maker: Maker, name: str) -> None:
    """nomic-embed-text v2: of several feed-forward layers, each token uses the best."""
    vocabulary = bert_vocabulary(maker.texts)
    shapes = {
        "embeddings.word_embeddings.weight": (len(vocabulary), HIDDEN),
        "embeddings.token_type_embeddings.weight": (1, HIDDEN),
        **with_norm("emb_ln"),
    }
    for i in range(LAYERS):
        layer = f"encoder.layers.{i}."
        shapes |= with_linear(layer + "attn.Wqkv", 3 * HIDDEN, HIDDEN)
        shapes |= with_linear(layer + "attn.out_proj", HIDDEN, HIDDEN)
        shapes |= with_norm(layer + "norm1") | with_norm(layer + "norm2")
        if i % 2:
            shapes[layer + "mlp.router.layer.weight"] = (reference.EXPERTS, HIDDEN)
            shapes[layer + "mlp.experts.mlp.w1"] = (reference.EXPERTS * WIDE, HIDDEN)
            shapes[layer + "mlp.experts.mlp.w2"] = (reference.EXPERTS * WIDE, HIDDEN)
        else:
            shapes |= with_linear(layer + "mlp.fc1", WIDE, HIDDEN)
            shapes |= with_linear(layer + "mlp.fc2", HIDDEN, WIDE)
    weights = random_weights(shapes, seed=13)
    config = {
        **nomic_config(len(vocabulary), n_positions=2048, rope_base=1e4),
        "activation_function": "gelu",
        "qkv_proj_bias": True,
        "mlp_fc1_bias": True,
        "mlp_fc2_bias": True,
        "type_vocab_size": 1,
        "moe_every_n_layers": 2,
        "moe_top_k": reference.EXPERTS_USED,
        "num_experts": reference.EXPERTS,
    }
    folder = maker.work / name
    save_weights(folder, weights, config)
    write_bert_tokenizer(folder, vocabulary)
    write_pooling(folder, "mean_tokens")
    maker.convert(folder, name)
    model = by_reference(reference.nomic_bert_moe, weights)
    maker.save_vectors(name, model, ids_by(bert_tokenizer(folder)), pooling="mean")


def nomic_config(n_vocab: int, n_positions: int, rope_base: float) -> dict[str, object]:
    """Return the configuration as Nomic's own code knows it."""
    return {
        "architectures": ["NomicBertModel"],
        "model_type": "nomic_bert",
        "vocab_size": n_vocab,
        "n_embd": HIDDEN,
        "n_head": reference.HEADS,
        "n_inner": WIDE,
        "n_layer": LAYERS,
        "n_positions": n_positions,
        "max_trained_positions": 2048,
        "layer_norm_epsilon": reference.EPSILON,
        # transformers knows these names only.
        **SIZES,
        "rope_parameters": {"rope_type": "default", "rope_theta": rope_base},
        "activation_function": "swiglu",
        "causal": False,
        "prenorm": False,
        "qkv_proj_bias": False,
        "mlp_fc1_bias": False,
        "mlp_fc2_bias": False,
        "rotary_emb_base": rope_base,
        "rotary_emb_fraction": 1.0,
        "rotary_emb_interleaved": False,
        "rotary_emb_scale_base": None,
        "type_vocab_size": 2,
    }


def bert_tokenizer(folder: Path) -> tf.BertTokenizer:
    """Load what `write_bert_tokenizer` wrote."""
    return tf.BertTokenizer.from_pretrained(folder)


def make_jina_v2(maker: Maker, name: str) -> None:
    """jina-embeddings v2: attention that weakens with distance, no positions."""
    vocabulary = bert_vocabulary(maker.texts)
    shapes = {
        "embeddings.word_embeddings.weight": (len(vocabulary), HIDDEN),
        "embeddings.token_type_embeddings.weight": (2, HIDDEN),
        **with_norm("embeddings.LayerNorm"),
    }
    for i in range(LAYERS):
        layer = f"encoder.layer.{i}."
        for part in ("self.query", "self.key", "self.value", "output.dense"):
            shapes |= with_linear(f"{layer}attention.{part}", HIDDEN, HIDDEN)
        shapes |= with_norm(layer + "attention.output.LayerNorm")
        shapes[layer + "mlp.gated_layers.weight"] = (2 * WIDE, HIDDEN)
        shapes |= with_linear(layer + "mlp.wo", HIDDEN, WIDE) | with_norm(layer + "mlp.layernorm")
    weights = random_weights(shapes, seed=14)
    config = {
        **SIZES,
        "architectures": ["JinaBertModel"],
        "model_type": "bert",
        "vocab_size": len(vocabulary),
        "type_vocab_size": 2,
        "layer_norm_eps": reference.EPSILON,
        "position_embedding_type": "alibi",
        "feed_forward_type": "geglu",
    }
    folder = maker.work / name
    save_weights(folder, weights, config)
    write_bert_tokenizer(folder, vocabulary)
    write_pooling(folder, "mean_tokens")
    maker.convert(folder, name)
    model = by_reference(reference.jina_bert_v2, weights)
    maker.save_vectors(name, model, ids_by(bert_tokenizer(folder)), pooling="mean")


def make_jina_v3(maker: Maker, name: str) -> None:
    """jina-embeddings v3, without its adapters: XLM-R with rotary positions."""
    folder = maker.work / name
    folder.mkdir()
    pieces = folder / "sentencepiece.bpe.model"
    train_pieces(
        pieces,
        maker.texts,
        vocab_size=600,
        model_type="unigram",
        normalization_rule_name="identity",
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
    )
    encode = XlmrPieces(pieces)
    n_vocab = len(encode)
    config = tf.JinaEmbeddingsV3Config(
        **SIZES,
        vocab_size=n_vocab,
        type_vocab_size=1,
        layer_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 20000.0},
    )
    model = randomize(tf.JinaEmbeddingsV3Model(config, add_pooling_layer=False), seed=15, gain=2)
    weights = dict(model.named_parameters())
    parts = {
        "self_attn.o_proj": "mixer.out_proj",
        "post_attention_layernorm": "norm1",
        "post_mlp_layernorm": "norm2",
        "mlp.fc1": "mlp.fc1",
        "mlp.fc2": "mlp.fc2",
    }
    renamed = {}
    for kind in ("word_embeddings", "token_type_embeddings"):
        renamed[f"roberta.embeddings.{kind}.weight"] = weights[f"embeddings.{kind}.weight"]
    for kind in ("weight", "bias"):
        renamed[f"roberta.emb_ln.{kind}"] = weights[f"embeddings.LayerNorm.{kind}"]
        for i in range(LAYERS):
            old, new = f"layers.{i}.", f"roberta.encoder.layers.{i}."
            renamed[f"{new}mixer.Wqkv.{kind}"] = torch.cat(
                [weights[f"{old}self_attn.{part}_proj.{kind}"] for part in "qkv"]
            )
            for theirs, ours in parts.items():
                renamed[f"{new}{ours}.{kind}"] = weights[f"{old}{theirs}.{kind}"]
    save_weights(
        folder,
        renamed,
        {
            **SIZES,
            "architectures": ["XLMRobertaModel"],
            "model_type": "xlm-roberta",
            "vocab_size": n_vocab,
            "type_vocab_size": 1,
            "layer_norm_eps": 1e-5,
            "rotary_emb_base": 20000.0,
            "lora_adaptations": ["none"],
            "max_position_embeddings": PLACES + 2,
            "bos_token_id": 0,
            "pad_token_id": 1,
            "eos_token_id": 2,
        },
    )
    write_pooling(folder, "mean_tokens")
    path = maker.convert(folder, name)
    # What the converter takes from a tokenizer.json, which this folder has not.
    specials = {"add_bos_token": True, "add_eos_token": True, "add_sep_token": True}
    specials |= {"seperator_token_id": 2, "unknown_token_id": 3}
    amend(path, {f"tokenizer.ggml.{key}": value for key, value in specials.items()}, {})
    for adapter in path.parent.glob(f"lora-*{name}*"):
        adapter.unlink()
    maker.save_vectors(name, model, encode, pooling="mean")


def make_modernbert(maker: Maker, name: str) -> None:
    """ModernBERT: every third layer sees all tokens, the others a window."""
    tokenizer = modern_bert_tokenizer(maker.texts)
    model = randomize(tf.ModernBertModel(modern_bert_config(tokenizer)), seed=16, gain=2)
    folder = maker.work / name
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_pooling(folder, "cls_token")
    maker.convert(folder, name, "modern-bert")
    maker.save_vectors(name, model, ids_by(tokenizer), pooling="cls", composed_only=True)


def make_modernbert_rank(maker: Maker, name: str, *, pooling: str, seed: int) -> None:
    """Rerankers on ModernBERT: their head reads the first token, or the mean."""
    tokenizer = modern_bert_tokenizer(maker.texts)
    config = modern_bert_config(tokenizer, classifier_pooling=pooling, num_labels=1)
    ranker = randomize(tf.ModernBertForSequenceClassification(config), seed)
    folder = maker.work / name
    ranker.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    path = maker.convert(folder, name, "modern-bert")
    amend(path, {"modern-bert.pooling_type": int(gguf.PoolingType.RANK)}, {})
    maker.save_scores(
        name, lambda row: ranker(input_ids=torch.tensor([row])).logits[0], ids_by(tokenizer)
    )


def modern_bert_config(
    tokenizer: tf.PreTrainedTokenizerFast, **options: object
) -> tf.ModernBertConfig:
    """Return a configuration with both kinds of layers."""
    return tf.ModernBertConfig(
        **{**SIZES, "num_hidden_layers": 4, "intermediate_size": 48},
        vocab_size=len(tokenizer),
        layer_norm_eps=1e-5,  # as norm_eps, which the converter does not know
        local_attention=WINDOW,
        global_attn_every_n_layers=3,
        pad_token_id=tokenizer.pad_token_id,
        cls_token_id=tokenizer.cls_token_id,
        bos_token_id=tokenizer.cls_token_id,
        sep_token_id=tokenizer.sep_token_id,
        eos_token_id=tokenizer.sep_token_id,
        **options,
    )


def make_eurobert(maker: Maker, name: str) -> None:
    """EuroBERT: a Llama that looks both ways."""
    tokenizer = byte_level(
        maker.texts,
        {
            "bos_token": "<|begin_of_text|>",
            "eos_token": "<|end_of_text|>",
            "mask_token": "<|mask|>",
        },
        single="<|begin_of_text|> $A <|end_of_text|>",
        pair="<|begin_of_text|> $A <|end_of_text|> $B <|end_of_text|>",
        pattern=LLAMA3,
    )
    config = tf.EuroBertConfig(
        **SIZES,
        num_key_value_heads=2,
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
        mask_token_id=tokenizer.mask_token_id,
        classifier_pooling="mean",  # the converter does not know all kinds
    )
    model = randomize(tf.EuroBertModel(config), seed=19, gain=2)
    folder = maker.work / name
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_pooling(folder, "mean_tokens")
    maker.convert(folder, name, "llama-bpe")
    maker.save_vectors(name, model, ids_by(tokenizer), pooling="mean")


def make_neobert(maker: Maker, name: str, *, as_converted: bool = False) -> None:
    """NeoBERT, whose attention weights llama.cpp's converter leaves in an order it cannot use.

    It does not undo that q, k and v stand side by side for each head; they are sorted here.
    """
    vocabulary = bert_vocabulary(maker.texts)
    shapes = {"encoder.weight": (len(vocabulary), HIDDEN), "layer_norm.weight": (HIDDEN,)}
    for i in range(LAYERS):
        layer = f"transformer_encoder.{i}."
        shapes[layer + "attention_norm.weight"] = (HIDDEN,)
        shapes[layer + "qkv.weight"] = (3 * HIDDEN, HIDDEN)
        shapes[layer + "wo.weight"] = (HIDDEN, HIDDEN)
        shapes[layer + "ffn_norm.weight"] = (HIDDEN,)
        shapes[layer + "ffn.w12.weight"] = (2 * WIDE, HIDDEN)
        shapes[layer + "ffn.w3.weight"] = (HIDDEN, WIDE)
    weights = random_weights(shapes, seed=20)
    written = dict(weights)
    if not as_converted:
        for key, weight in weights.items():
            if key.endswith("qkv.weight"):
                heads = weight.unflatten(0, (reference.HEADS, 3, -1))
                written[key] = heads.transpose(0, 1).flatten(0, 2)
    config = {
        "architectures": ["NeoBERT"],
        "model_type": "bert",
        "vocab_size": len(vocabulary),
        "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": reference.HEADS,
        "intermediate_size": WIDE * 3 // 2,  # of which NeoBERT uses two thirds
        "max_length": PLACES,
        "norm_eps": reference.RMS_EPSILON,
    }
    folder = maker.work / name
    save_weights(folder, written, config)
    write_bert_tokenizer(folder, vocabulary)
    maker.convert(folder, name)
    model = by_reference(reference.neo_bert, weights)
    maker.save_vectors(name, model, ids_by(bert_tokenizer(folder)), pooling="cls")


def around_zero(model: torch.nn.Module) -> torch.nn.Module:
    """Lower the weights of norms, to which Gemma adds one."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight -= 1
    return model


def make_gemma_embedding(maker: Maker, name: str) -> None:
    """EmbeddingGemma: windows, every sixth layer sees all tokens; two matrices after pooling."""
    folder = maker.work / name
    encode = gemma_pieces(folder, maker.texts, size=500)
    config = tf.Gemma3TextConfig(
        **{**SIZES, "num_hidden_layers": 6, "num_attention_heads": 2, "intermediate_size": 32},
        num_key_value_heads=1,
        head_dim=16,
        query_pre_attn_scalar=16,
        vocab_size=len(encode),
        sliding_window=WINDOW,
        use_bidirectional_attention=True,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
    )
    model = around_zero(randomize(tf.Gemma3TextModel(config), seed=21))
    model.save_pretrained(folder)
    write_pooling(folder, "mean_tokens")
    modules = json.loads((folder / "modules.json").read_text(encoding="utf-8"))
    dense = []
    for i, (rows, columns) in ((2, (WIDE, HIDDEN)), (3, (HIDDEN, WIDE))):
        weight = random_weights({"linear.weight": (rows, columns)}, seed=21 + i)
        dense.append(weight["linear.weight"].numpy())
        module = folder / f"{i}_Dense"
        save_weights(module, weight, {"in_features": columns, "out_features": rows})
        kind = "sentence_transformers.models.Dense"
        modules.append({"idx": i, "name": str(i), "path": module.name, "type": kind})
    write_json(folder / "modules.json", modules)
    maker.convert(folder, name, "default", "--sentence-transformers-dense-modules")
    maker.save_vectors(
        name, model, encode, pooling="mean", head=lambda rows: rows @ dense[0].T @ dense[1].T
    )


def make_gemma2(maker: Maker, name: str) -> None:
    """Gemma 2 (bge-multilingual-gemma2): causal, capped scores, every other layer has a window."""
    folder = maker.work / name
    encode = gemma_pieces(folder, maker.texts, size=500)
    config = tf.Gemma2Config(
        **{**SIZES, "num_attention_heads": 2},
        num_key_value_heads=1,
        head_dim=16,
        query_pre_attn_scalar=16,
        vocab_size=len(encode),
        sliding_window=WINDOW,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
    )
    model = around_zero(randomize(tf.Gemma2ForCausalLM(config), seed=25))
    model.config._attn_implementation = "eager"  # the other ones do not cap
    model.save_pretrained(folder)
    path = maker.convert(folder, name)
    amend(path, {"gemma2.pooling_type": int(gguf.PoolingType.LAST)}, {})
    maker.save_vectors(name, model.model, encode, pooling="last")


def make_llama_embed(maker: Maker, name: str) -> None:
    """A Llama that looks both ways (llama-embed-nemotron)."""
    folder = maker.work / name
    tokenizer = llama_tokenizer(folder, maker.texts)
    config = tf.LlamaConfig(**SIZES, num_key_value_heads=2, vocab_size=len(tokenizer))
    model = randomize(tf.LlamaModel(config), seed=26)
    model.save_pretrained(folder)
    set_architecture(folder, "LlamaBidirectionalModel")
    path = maker.convert(folder, name)
    amend(path, {"llama-embed.pooling_type": int(gguf.PoolingType.MEAN)}, {})
    maker.save_vectors(name, both_ways(model), ids_by(tokenizer), pooling="mean")


def make_qwen2(maker: Maker, name: str) -> None:
    """A Qwen2 that looks both ways (gte-Qwen2), which its file has to say."""
    tokenizer = qwen_tokenizer(maker.texts)
    config = tf.Qwen2Config(
        **SIZES, num_key_value_heads=2, vocab_size=len(tokenizer), tie_word_embeddings=True
    )
    model = randomize(tf.Qwen2Model(config), seed=27)
    folder = maker.work / name
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_pooling(folder, "lasttoken")
    path = maker.convert(folder, name, "qwen2")
    amend(path, {"qwen2.attention.causal": False}, {})
    maker.save_vectors(
        name, both_ways(model), ids_by(tokenizer), pooling="last", composed_only=True
    )


def set_architecture(folder: Path, architecture: str) -> None:
    """Name the class that a configuration is for."""
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    write_json(path, {**config, "architectures": [architecture]})


FAMILIES = {
    "roberta": make_roberta,
    "nomic": make_nomic,
    "nomic-moe": make_nomic_moe,
    "jina-v2": make_jina_v2,
    "jina-v3": make_jina_v3,
    "modernbert": make_modernbert,
    "modernbert-rank": functools.partial(make_modernbert_rank, pooling="mean", seed=17),
    "modernbert-rank-cls": functools.partial(make_modernbert_rank, pooling="cls", seed=18),
    "eurobert": make_eurobert,
    "neobert": make_neobert,
    "gemma-embedding": make_gemma_embedding,
    "gemma2": make_gemma2,
    "llama-embed": make_llama_embed,
    "qwen2": make_qwen2,
}


def main() -> None:
    """Make the models."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("llama_cpp", type=Path, help="folder of llama.cpp's sources")
    parser.add_argument("names", nargs="*", help="families; by default all")
    args = parser.parse_args()
    torch.set_num_threads(2)
    with tempfile.TemporaryDirectory() as work:
        maker = Maker(args.llama_cpp, Path(work))
        for name in args.names or FAMILIES:
            FAMILIES[name](maker, f"tiny-{name}")


if __name__ == "__main__":
    main()

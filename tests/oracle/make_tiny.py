"""Make the tiny random-weight models, as GGUF files, and their golden outputs.

The weights come from fixed seeds, the vocabularies from the corpus, and the outputs from
transformers. llama.cpp's own converter writes the GGUF files, so that their metadata is what
real files have; the few things that it leaves out are added afterwards. Run once, by hand.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import gguf
import numpy as np
import sentencepiece
import torch
import transformers as tf
from common import DATA, normalize, offsets, ragged, read_texts
from sentence_transformers import CrossEncoder
from sentencepiece import sentencepiece_model_pb2
from tokenizers import ByteLevelBPETokenizer, processors

HIDDEN = 32
MAX_TOKENS = 128
TEXTS_PER_MODEL = 40

RERANK_TEMPLATE = (
    "<|im_start|>system\nDoes the document answer the query? Say yes or no.<|im_end|>\n"
    "<|im_start|>user\n<Query>: {query}\n<Document>: {document}<|im_end|>\n"
    "<|im_start|>assistant\n"
)

# The converter knows a tokenizer by a hash of what it does to one sample text, and refuses
# the others. Ours are new, so the name is given instead: argv holds it, then the real arguments.
CONVERT = """
import runpy, sys
root, pre, *sys.argv[1:] = sys.argv[1:]
sys.path.insert(0, root)
from conversion.base import TextModel
TextModel.get_vocab_base_pre = lambda self, tokenizer: pre
runpy.run_path(root + "/convert_hf_to_gguf.py", run_name="__main__")
"""


class Maker:
    """What all models need: the converter, a place to work, and the texts."""

    def __init__(self, llama_cpp: Path, work: Path) -> None:
        """Read the texts, and the pairs as every query with every document."""
        self.llama_cpp = llama_cpp
        self.work = work
        self.texts = read_texts()
        pairs = json.loads((DATA / "pairs.json").read_text(encoding="utf-8"))
        self.pairs = [
            (query, document) for query in pairs["queries"] for document in pairs["documents"]
        ]
        self.pair_ids = [
            (q, d) for q in range(len(pairs["queries"])) for d in range(len(pairs["documents"]))
        ]

    def convert(self, folder: Path, name: str, pre: str = "default", *options: str) -> Path:
        """Turn a Hugging Face folder into DATA/name.gguf."""
        path = DATA / f"{name}.gguf"
        subprocess.run(
            [
                sys.executable,
                "-c",
                CONVERT,
                str(self.llama_cpp),
                pre,
                str(folder),
                "--outfile",
                str(path),
                "--outtype",
                "f32",
                "--model-name",
                name,
                *options,
            ],
            check=True,
            env={**os.environ, "PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION": "python"},
        )
        return path

    def save_vectors(
        self,
        name: str,
        model: Callable[..., object],
        encode: Callable[[str], Sequence[int]],
        pooling: str,
        keep_tokens: int = 0,
        composed_only: bool = False,
        head: Callable[[np.ndarray], np.ndarray] = np.asarray,
    ) -> None:
        """Embed a spread of short and long texts that fit, with every kind of pooling.

        A `head` is what comes after the pooling.
        """
        rows = {
            i: list(encode(text))
            for i, text in enumerate(self.texts)
            if unicodedata.is_normalized("NFC", text) or not composed_only
        }
        fitting = sorted(
            (i for i in rows if len(rows[i]) <= MAX_TOKENS), key=lambda i: (len(rows[i]), i)
        )
        picks = np.linspace(0, len(fitting) - 1, TEXTS_PER_MODEL).round().astype(int)
        text_ids = sorted(fitting[pick] for pick in picks)
        ids = [rows[i] for i in text_ids]
        states = [hidden(model, row) for row in ids]
        pooled = {
            "mean": normalize(head(np.stack([state.mean(0) for state in states]))),
            "cls": normalize(head(np.stack([state[0] for state in states]))),
            "last": normalize(head(np.stack([state[-1] for state in states]))),
        }
        arrays = {
            "text_ids": np.asarray(text_ids, np.int32),
            **ragged(ids),
            "vectors": pooled[pooling],
            **pooled,
        }
        if keep_tokens:
            chosen = [len(ids) * k // keep_tokens for k in range(keep_tokens)]
            arrays["token_text_ids"] = arrays["text_ids"][chosen]
            arrays["token_vectors"] = np.concatenate([states[i] for i in chosen])
            arrays["token_offsets"] = offsets(len(ids[i]) for i in chosen)
        np.savez_compressed(DATA / f"{name}.npz", **arrays)

    def save_scores(
        self,
        name: str,
        score: Callable[[Sequence[int]], torch.Tensor],
        encode: Callable[[str, str], Sequence[int]],
    ) -> None:
        """Score every query with every document."""
        ids = [list(encode(query, document)) for query, document in self.pairs]
        with torch.no_grad():
            scores = torch.stack([score(row) for row in ids]).numpy()
        np.savez_compressed(
            DATA / f"{name}.npz",
            pairs=np.asarray(self.pair_ids, np.int32),
            scores=scores,
            **ragged(ids),
        )


def hidden(model: Callable[..., object], ids: Sequence[int]) -> np.ndarray:
    """Run one sequence, without padding, and return its last hidden states."""
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).last_hidden_state[0].numpy()


def randomize(model: torch.nn.Module, seed: int, gain: float = 1.0) -> torch.nn.Module:
    """Fill all weights, also those that start as zeros or ones, so that none is unused.

    Encoders need a gain, as otherwise the vectors of all texts are nearly alike.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if weight.ndim > 1:
                weight.copy_(gain * noise / weight.shape[-1] ** 0.5)
            else:
                weight.copy_(0.1 * noise + ("norm" in name.lower() and name.endswith("weight")))
    return model.eval()


def write_json(path: Path, content: object) -> None:
    """Write a configuration file."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def write_pooling(folder: Path, mode: str) -> None:
    """Say how to pool, in the way of sentence-transformers."""
    kind = "sentence_transformers.models."
    write_json(
        folder / "modules.json",
        [
            {"idx": 0, "name": "0", "path": "", "type": kind + "Transformer"},
            {"idx": 1, "name": "1", "path": "1_Pooling", "type": kind + "Pooling"},
        ],
    )
    modes = {
        f"pooling_mode_{known}": known == mode
        for known in ("cls_token", "mean_tokens", "max_tokens", "lasttoken")
    }
    write_json(folder / "1_Pooling" / "config.json", {"word_embedding_dimension": HIDDEN, **modes})


def amend(
    path: Path, fields: Mapping[str, str | bool | int], tensors: Mapping[str, torch.Tensor]
) -> None:
    """Set metadata in a GGUF file and add tensors, keeping all the rest as it is."""
    reader = gguf.GGUFReader(path)
    architecture = reader.fields["general.architecture"].contents()
    draft = path.with_suffix(".draft")
    writer = gguf.GGUFWriter(draft, architecture)
    for field in reader.fields.values():
        if field.name in fields or field.name.startswith(("GGUF.", "general.architecture")):
            continue
        element = field.types[-1] if len(field.types) > 1 else None
        writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=element)
    kinds = {
        str: gguf.GGUFValueType.STRING,
        bool: gguf.GGUFValueType.BOOL,
        int: gguf.GGUFValueType.UINT32,
    }
    for key, value in fields.items():
        writer.add_key_value(key, value, kinds[type(value)])
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    for name, weight in tensors.items():
        writer.add_tensor(name, weight.detach().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    draft.replace(path)


def train_pieces(path: Path, texts: Sequence[str], **options: object) -> None:
    """Train a sentencepiece model on the lines of the texts."""
    lines = [line for text in texts for line in text.splitlines() if line.strip()]
    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=file,
            num_threads=1,
            minloglevel=1,
            **{"vocab_size": 800, "character_coverage": 0.995, **options},
        )


def bert_vocabulary(texts: Sequence[str]) -> dict[str, int]:
    """Count a small vocabulary: the trainer of tokenizers gives another one at each run."""
    splitter = tf.BertTokenizer(vocab={"[UNK]": 0}).backend_tokenizer
    letters, words, endings = Counter(), Counter(), Counter()
    for text in texts:
        normal = splitter.normalizer.normalize_str(text)
        for word, _ in splitter.pre_tokenizer.pre_tokenize_str(normal):
            letters.update(word)
            words[word] += len(word) > 1
            endings.update(word[start:] for start in range(1, len(word) - 1))
    kept = most_frequent(letters, 130)
    tokens = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *kept,
        *most_frequent(words, 200),
        *("##" + end for end in [*kept, *most_frequent(endings, 140)]),
    ]
    return {token: place for place, token in enumerate(tokens)}


def most_frequent(counts: Counter, number: int) -> list[str]:
    """Order by frequency, and alphabetically where that is equal."""
    return sorted(counts, key=lambda key: (-counts[key], key))[:number]


def make_bert(maker: Maker) -> None:
    """Make the embedder, whose source folder is kept too, and the reranker."""
    folder = DATA / "tiny-bert-hf"
    shutil.rmtree(folder, ignore_errors=True)
    vocabulary = bert_vocabulary(maker.texts)
    sizes = {
        "vocab_size": len(vocabulary),
        "hidden_size": HIDDEN,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "max_position_embeddings": MAX_TOKENS,
    }
    model = randomize(tf.BertModel(tf.BertConfig(**sizes)), seed=1, gain=2)
    model.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)
    write_bert_tokenizer(folder, vocabulary)
    write_json(
        folder / "sentence_bert_config.json", {"max_seq_length": MAX_TOKENS, "do_lower_case": False}
    )
    write_pooling(folder, "mean_tokens")
    tokenizer = tf.AutoTokenizer.from_pretrained(folder)
    maker.convert(folder, "tiny-bert")
    maker.save_vectors(
        "tiny-bert", model, lambda text: tokenizer(text)["input_ids"], pooling="mean", keep_tokens=3
    )

    # One segment only, as llama.cpp takes all tokens to be in the first.
    config = tf.BertConfig(**sizes, type_vocab_size=1, num_labels=1)
    ranker = randomize(tf.BertForSequenceClassification(config), seed=2, gain=2)
    folder = maker.work / "bert-rank"
    ranker.save_pretrained(folder)
    write_bert_tokenizer(folder, vocabulary)
    path = maker.convert(folder, "tiny-bert-rank")
    pooler = ranker.bert.pooler.dense  # which the converter leaves out
    amend(
        path,
        {"bert.pooling_type": int(gguf.PoolingType.RANK)},
        {"cls.weight": pooler.weight, "cls.bias": pooler.bias},
    )
    maker.save_scores(
        "tiny-bert-rank",
        lambda row: ranker(input_ids=torch.tensor([row])).logits[0],
        lambda query, document: tokenizer(query, document)["input_ids"],
    )


def make_bert_cross(maker: Maker) -> None:
    """Make the folder of a cross-encoder whose pooler and segments count, with two heads.

    llamacrab.convert makes the GGUF when it is tested. The folder holds the head with one output;
    the other one, with three classes, lies beside the scores.
    """
    folder = DATA / "tiny-bert-cross-hf"
    shutil.rmtree(folder, ignore_errors=True)
    vocabulary = bert_vocabulary(maker.texts)
    config = tf.BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=MAX_TOKENS,
        num_labels=1,
    )
    model = randomize(tf.BertForSequenceClassification(config), seed=9, gain=2)
    model.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)
    write_bert_tokenizer(folder, vocabulary)
    classes = randomize(torch.nn.Linear(HIDDEN, 3), seed=10, gain=2)

    tokenizer = tf.AutoTokenizer.from_pretrained(folder)
    rows = [tokenizer(query, document, return_tensors="pt") for query, document in maker.pairs]
    scores, class_scores = cross_scores(model, classes, rows)
    encoder = CrossEncoder(str(folder), device="cpu")
    raw = encoder.predict(maker.pairs, activation_fn=torch.nn.Identity())
    np.testing.assert_allclose(raw, scores[:, 0], atol=1e-5)
    for layer in model.bert.encoder.layer:
        layer.intermediate.intermediate_act_fn = TableGelu()
    table_scores, class_table_scores = cross_scores(model, classes, rows)
    np.savez_compressed(
        DATA / "tiny-bert-cross.npz",
        pairs=np.asarray(maker.pair_ids, np.int32),
        scores=scores,
        table_scores=table_scores,
        probabilities=encoder.predict(maker.pairs),
        class_weight=classes.weight.detach().numpy(),
        class_bias=classes.bias.detach().numpy(),
        class_scores=class_scores,
        class_table_scores=class_table_scores,
        n_tokens=len(vocabulary),
        types=np.concatenate([row["token_type_ids"][0].numpy() for row in rows]).astype(np.int32),
        **ragged([row["input_ids"][0].tolist() for row in rows]),
    )


class TableGelu(torch.nn.Module):
    """GELU as llama.cpp computes it: the tanh approximation, from a table in half precision."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Look the values up; beyond 10 the table is not used."""
        looked_up = torch.nn.functional.gelu(x.half().float(), approximate="tanh").half().float()
        return torch.where(x <= -10, 0.0, torch.where(x >= 10, x, looked_up))


def cross_scores(
    model: torch.nn.Module, classes: torch.nn.Module, rows: Sequence[Mapping[str, torch.Tensor]]
) -> tuple[np.ndarray, np.ndarray]:
    """Return the scores of the model's own head, and those of another one on its pooler."""
    with torch.no_grad():
        scores = [model(**row).logits[0].numpy() for row in rows]
        others = [classes(model.bert(**row).pooler_output[0]).numpy() for row in rows]
    return np.stack(scores), np.stack(others)


def write_bert_tokenizer(folder: Path, vocabulary: Mapping[str, int]) -> None:
    """Write the files that models of this kind have; transformers now writes fewer."""
    tf.BertTokenizer(vocab=dict(vocabulary), do_lower_case=True).save_pretrained(folder)
    names = ("unk", "sep", "pad", "cls", "mask")
    specials = {f"{name}_token": f"[{name.upper()}]" for name in names}
    write_json(folder / "special_tokens_map.json", specials)
    write_json(
        folder / "tokenizer_config.json",
        {
            **specials,
            "do_lower_case": True,
            "strip_accents": None,
            "tokenize_chinese_chars": True,
            "model_max_length": MAX_TOKENS,
            "tokenizer_class": "BertTokenizer",
        },
    )
    words = sorted(vocabulary, key=vocabulary.__getitem__)
    (folder / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")


def make_xlmr(maker: Maker) -> None:
    """Make an embedder and a reranker with a unigram vocabulary."""
    pieces = maker.work / "sentencepiece.bpe.model"
    train_pieces(
        pieces,
        maker.texts,
        model_type="unigram",
        normalization_rule_name="nmt_nfkc",
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
    )
    tokenizer = xlmr_tokenizer(pieces)
    sizes = {
        "vocab_size": len(tokenizer),
        "hidden_size": HIDDEN,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "type_vocab_size": 1,
        "max_position_embeddings": MAX_TOKENS + 2,
        "layer_norm_eps": 1e-5,
    }

    model = randomize(tf.XLMRobertaModel(tf.XLMRobertaConfig(**sizes)), seed=3, gain=2)
    folder = maker.work / "xlmr"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    shutil.copy(pieces, folder)
    write_pooling(folder, "cls_token")
    maker.convert(folder, "tiny-xlmr")
    # Here transformers is the odd one: it composes only short sequences, sentencepiece all.
    maker.save_vectors(
        "tiny-xlmr",
        model,
        lambda text: tokenizer(text)["input_ids"],
        pooling="cls",
        composed_only=True,
    )

    config = tf.XLMRobertaConfig(**sizes, num_labels=1)
    ranker = randomize(tf.XLMRobertaForSequenceClassification(config), seed=4, gain=2)
    folder = maker.work / "xlmr-rank"
    ranker.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    shutil.copy(pieces, folder)
    path = maker.convert(folder, "tiny-xlmr-rank")
    amend(path, {"bert.pooling_type": int(gguf.PoolingType.RANK)}, {})
    maker.save_scores(
        "tiny-xlmr-rank",
        lambda row: ranker(input_ids=torch.tensor([row])).logits[0],
        lambda query, document: tokenizer(query, document)["input_ids"],
    )


def xlmr_tokenizer(path: Path) -> tf.XLMRobertaTokenizer:
    """Order the pieces as xlm-roberta does: its own four specials first, and last the mask."""
    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(path.read_bytes())
    specials = [(token, 0.0) for token in ("<s>", "<pad>", "</s>", "<unk>")]
    normal = [(piece.piece, piece.score) for piece in proto.pieces[3:]]
    return tf.XLMRobertaTokenizer(
        vocab=[*specials, *normal, ("<mask>", 0.0)],
        _spm_precompiled_charsmap=proto.normalizer_spec.precompiled_charsmap,
    )


def make_qwen3(maker: Maker) -> None:
    """Make a causal embedder, and a reranker that compares the words yes and no."""
    tokenizer = qwen_tokenizer(maker.texts)
    config = tf.Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=HIDDEN,
        num_hidden_layers=2,
        intermediate_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        tie_word_embeddings=True,
        max_position_embeddings=512,
        eos_token_id=tokenizer.eos_token_id,
    )

    # llama.cpp does not bring text into composed form, as this tokenizer does.
    model = randomize(tf.Qwen3ForCausalLM(config), seed=5)
    folder = maker.work / "qwen3"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_pooling(folder, "lasttoken")
    maker.convert(folder, "tiny-qwen3", pre="qwen2")
    maker.save_vectors(
        "tiny-qwen3",
        model.model,
        lambda text: tokenizer(text)["input_ids"],
        pooling="last",
        composed_only=True,
    )

    ranker = randomize(tf.Qwen3ForCausalLM(config), seed=6)
    folder = maker.work / "qwen3-reranker"  # by this name the converter knows what it is
    ranker.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    path = maker.convert(folder, "tiny-qwen3-rank", pre="qwen2")
    amend(path, {"tokenizer.chat_template.rerank": RERANK_TEMPLATE}, {})
    answers = tokenizer.convert_tokens_to_ids(["yes", "no"])
    maker.save_scores(
        "tiny-qwen3-rank",
        lambda row: ranker(input_ids=torch.tensor([row])).logits[0, -1, answers].softmax(-1),
        lambda query, document: tokenizer(
            RERANK_TEMPLATE.format(query=query, document=document), add_special_tokens=False
        )["input_ids"],
    )


def qwen_tokenizer(texts: Sequence[str]) -> tf.Qwen2Tokenizer:
    """Train a byte-level vocabulary; its end token is appended, as in Qwen3-Embedding."""
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    blank = tf.Qwen2Tokenizer(vocab={}, merges=[]).backend_tokenizer
    trainer = ByteLevelBPETokenizer()
    trainer.normalizer, trainer.pre_tokenizer = blank.normalizer, blank.pre_tokenizer
    trainer.train_from_iterator([*texts, *["yes", "no"] * 100], vocab_size=900, show_progress=False)
    trained = json.loads(trainer.to_str())["model"]
    tokenizer = tf.Qwen2Tokenizer(
        vocab=trained["vocab"], merges=[tuple(pair) for pair in trained["merges"]]
    )
    tokenizer.add_special_tokens({"additional_special_tokens": specials[1:]})
    end = specials[0]
    tokenizer.backend_tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single=f"$A {end}",
                pair=f"$A {end} $B:1 {end}:1",
                special_tokens=[(end, tokenizer.convert_tokens_to_ids(end))],
            ),
        ]
    )
    return tokenizer


def make_llama(maker: Maker) -> None:
    """Make a causal model whose file does not say how to pool."""
    folder = maker.work / "llama"
    tokenizer = llama_tokenizer(folder, maker.texts)
    model = randomize(
        tf.LlamaForCausalLM(
            tf.LlamaConfig(
                vocab_size=len(tokenizer),
                hidden_size=HIDDEN,
                num_hidden_layers=2,
                intermediate_size=64,
                num_attention_heads=4,
                num_key_value_heads=2,
                tie_word_embeddings=True,
                max_position_embeddings=512,
            )
        ),
        seed=7,
    )
    model.save_pretrained(folder)
    maker.convert(folder, "tiny-llama")
    maker.save_vectors(
        "tiny-llama", model.model, lambda text: tokenizer(text)["input_ids"], pooling="mean"
    )


def llama_tokenizer(folder: Path, texts: Sequence[str]) -> tf.LlamaTokenizer:
    """Train pieces that fall back on bytes, and leave them in a new folder."""
    folder.mkdir()
    train_pieces(
        folder / "tokenizer.model",
        texts,
        model_type="bpe",
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
    )
    tokenizer = tf.LlamaTokenizer.from_pretrained(folder, add_bos_token=True)
    tokenizer.update_post_processor()
    return tokenizer


def make_t5(maker: Maker) -> None:
    """Make an encoder-decoder, which llamacrab must refuse: there is nothing to compare."""
    folder = maker.work / "t5"
    folder.mkdir()
    train_pieces(
        folder / "spiece.model",
        maker.texts,
        model_type="unigram",
        normalization_rule_name="identity",
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
    )
    model = randomize(
        tf.T5ForConditionalGeneration(
            tf.T5Config(
                vocab_size=800,
                d_model=HIDDEN,
                d_kv=8,
                d_ff=64,
                num_layers=1,
                num_decoder_layers=1,
                num_heads=4,
                decoder_start_token_id=0,
            )
        ),
        seed=8,
    )
    model.save_pretrained(folder)
    maker.convert(folder, "tiny-t5")


def main() -> None:
    """Make all models."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("llama_cpp", type=Path, help="folder of llama.cpp's sources")
    args = parser.parse_args()
    torch.set_num_threads(2)
    with tempfile.TemporaryDirectory() as work:
        maker = Maker(args.llama_cpp, Path(work))
        for make in (make_bert, make_bert_cross, make_xlmr, make_qwen3, make_llama, make_t5):
            make(maker)


if __name__ == "__main__":
    main()

"""Convert a BERT embedder or cross-encoder into a GGUF, without torch.

The keys and tensor names are those of llama.cpp's own converter, so that either file gives the same
vectors. Only the packages `gguf` and `safetensors` are needed (extra ``minilm``).

A cross-encoder needs two things that llama.cpp's converter does not give it. Its pooler, a dense
layer before the classifier, is written as ``cls``, after which llama.cpp's graph takes tanh as BERT
does. And since that graph takes every token for one of segment A, the vocabulary is written twice:
the second time with (type B - type A) added, for the ids of the document.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llamacrab._core import SEGMENT_B_OFFSET, Model
from llamacrab._support.extras import require
from llamacrab.errors import ConvertError, LlamaError
from llamacrab.requests.prompts import KEY as PROMPT_KEY

if TYPE_CHECKING:
    from collections.abc import Iterator

OUTTYPES = ("f32", "f16", "bf16", "q8_0")

# The converter calls a token special by its role; these are the roles that BERT has.
SPECIAL_ROLES = ("pad", "unk", "cls", "sep", "mask")

# Where a cross-encoder's head goes. It stays float32: it is small, and every score passes through.
HEAD = {
    "pooler.dense.weight": "cls.weight",
    "pooler.dense.bias": "cls.bias",
    "classifier.weight": "cls.output.weight",
    "classifier.bias": "cls.output.bias",
}
WORDS = "embeddings.word_embeddings.weight"
TYPES = "embeddings.token_type_embeddings.weight"


def convert(
    folder: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    outtype: str = "bf16",
) -> Path:
    """Convert a folder that holds a BERT embedder or cross-encoder into one GGUF file.

    Parameters
    ----------
    folder : path
        A Hugging Face or sentence-transformers folder: ``config.json``, ``model.safetensors``,
        ``vocab.txt`` or ``tokenizer.json``, and, if it says how to pool, ``modules.json``. A
        ``BertForSequenceClassification`` becomes a reranker.
    destination : path
        The GGUF to write. It appears whole or not at all.
    outtype : {"bf16", "f16", "f32", "q8_0"}
        Type of the matrices; vectors, positions and token types stay float32, as in llama.cpp's
        converter. Least cosine to sentence-transformers on the 200 texts of
        the tests, all-MiniLM-L6-v2: 0.99995 for bf16, 0.999995 for f32, 0.9975 for q8_0.

    Returns
    -------
    Path
        `destination`.

    Raises
    ------
    ConvertError
        The folder lacks a file, or holds a model that this converter does not know.
    MissingExtraError
        `gguf` or `safetensors` is not installed.
    """
    if outtype not in OUTTYPES:
        raise ConvertError(f"outtype must be one of {', '.join(OUTTYPES)}, not {outtype!r}")
    folder, destination = Path(folder), Path(destination)
    gguf = require("gguf", extra="minilm")
    config = _read_json(folder / "config.json")
    _refuse_unknown(config)
    tensors = {
        name.removeprefix("bert."): tensor
        for name, tensor in _tensors(folder / "model.safetensors")
    }
    is_reranker = _is_reranker(config)
    if is_reranker:
        _check_head(folder, config, tensors)

    destination.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=destination.parent, prefix=f".{destination.name}.")
    os.close(handle)
    try:
        writer = gguf.GGUFWriter(name, "bert")
        _write_header(writer, gguf, folder, config, outtype)
        for prompt_name, prompt in _prompts(folder).items():
            writer.add_string(f"{PROMPT_KEY}{prompt_name}", prompt)
        if is_reranker:
            writer.add_pooling_type(gguf.PoolingType.RANK)
            writer.add_array("bert.classifier.output_labels", _labels(config, tensors))
        elif (pooling := _pooling(folder)) is not None:
            writer.add_pooling_type(gguf.PoolingType[pooling])
        twice = is_reranker and _has_segments(folder, tensors)
        _write_vocabulary(writer, gguf, folder, config, twice=twice)
        if twice:
            words, types = tensors[WORDS], tensors[TYPES]
            tensors[WORDS] = np.concatenate([words, words + (types[1] - types[0])])
        _write_tensors(writer, gguf, folder, config, tensors, outtype)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        _check(name, folder)
        # mkstemp makes private files; the result gets what `open` would have given it.
        umask = os.umask(0)
        os.umask(umask)
        Path(name).chmod(0o666 & ~umask)
        Path(name).replace(destination)
    finally:
        Path(name).unlink(missing_ok=True)
    return destination


def _check(name: str, folder: Path) -> None:
    """Refuse what llama.cpp cannot load: tensors of other sizes, tensors missing, NaN."""
    try:
        Model(name, check_tensors=True).close()
    except LlamaError as error:
        raise ConvertError(f"{folder} does not make a model: {error}") from None


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConvertError(f"{path.parent} lacks {path.name}") from None
    except (OSError, ValueError) as error:
        raise ConvertError(f"cannot read {path}: {error}") from None


def _parse(path: Path) -> Any:
    text = _read_text(path)
    try:
        return json.loads(text)
    except ValueError as error:
        raise ConvertError(f"cannot read {path}: {error}") from None


def _read_json(path: Path) -> dict[str, Any]:
    read = _parse(path)
    if not isinstance(read, dict):
        raise ConvertError(f"{path} holds no JSON object")
    return read


def _size(config: dict[str, Any], key: str) -> int:
    """Return a size that the model's config must give."""
    size = config.get(key)
    if not isinstance(size, int) or size < 1:
        raise ConvertError(f"config.json must give {key}, a positive integer, not {size!r}")
    return size


def _refuse_unknown(config: dict[str, Any]) -> None:
    """Refuse what llama.cpp's graph for BERT would compute differently, or not at all."""
    kind = config.get("model_type")
    if kind != "bert":
        raise ConvertError(f"model_type is {kind!r}; this converter knows 'bert' only")
    heads = [name for name in config.get("architectures") or [] if "Classification" in name]
    if heads and not _is_reranker(config):
        raise ConvertError(f"{heads[0]} has a head that gives no score to a text as a whole")
    activation = config.get("hidden_act", "gelu")
    if not str(activation).startswith("gelu"):
        raise ConvertError(f"hidden_act is {activation!r}; llama.cpp computes GELU for BERT")
    if config.get("is_decoder"):
        raise ConvertError("is_decoder is true; llama.cpp lets the tokens of BERT see each other")
    epsilon = config.setdefault("layer_norm_eps", 1e-12)  # as transformers has it
    if not isinstance(epsilon, float) or epsilon < 0:
        raise ConvertError(f"config.json must give layer_norm_eps, a number, not {epsilon!r}")
    positions = config.get("position_embedding_type", "absolute")
    if positions != "absolute":
        raise ConvertError(f"position_embedding_type is {positions!r}, not 'absolute'")


def _is_reranker(config: dict[str, Any]) -> bool:
    return config.get("architectures") == ["BertForSequenceClassification"]


def _check_head(
    folder: Path, config: dict[str, Any], tensors: dict[str, np.ndarray[Any, Any]]
) -> None:
    """Refuse a reranker without the tensors that we read before llama.cpp does."""
    for name in (WORDS, TYPES, *HEAD):
        if name not in tensors:
            raise ConvertError(f"{folder} lacks the tensor {name}")
        width = tensors[name].shape[1:]
        if name.endswith(".weight") and width != (_size(config, "hidden_size"),):
            raise ConvertError(f"{folder}: the rows of {name} have shape {width}")


def _labels(config: dict[str, Any], tensors: dict[str, np.ndarray[Any, Any]]) -> list[str]:
    """Return the names of the classes; where the config does not say, those of transformers."""
    said = config.get("id2label")
    said = said if isinstance(said, dict) else {}
    return [str(said.get(str(i), f"LABEL_{i}")) for i in range(len(tensors["classifier.weight"]))]


def _has_segments(folder: Path, tensors: dict[str, np.ndarray[Any, Any]]) -> bool:
    """Return whether the model tells the document from the query by the type of its tokens."""
    inputs = _tokenizer_settings(folder).get("model_input_names") or ["token_type_ids"]
    return len(tensors[TYPES]) > 1 and "token_type_ids" in inputs


def _write_header(
    writer: Any, gguf: Any, folder: Path, config: dict[str, Any], outtype: str
) -> None:
    name = Path(config.get("_name_or_path") or "").name or folder.resolve().name
    writer.add_type("model")
    writer.add_name(name)
    writer.add_block_count(_size(config, "num_hidden_layers"))
    writer.add_context_length(_size(config, "max_position_embeddings"))
    writer.add_embedding_length(_size(config, "hidden_size"))
    writer.add_feed_forward_length(_size(config, "intermediate_size"))
    writer.add_head_count(_size(config, "num_attention_heads"))
    writer.add_layer_norm_eps(config["layer_norm_eps"])
    ftype = "ALL_F32" if outtype == "f32" else f"MOSTLY_{outtype.upper()}"
    writer.add_file_type(gguf.LlamaFileType[ftype])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_causal_attention(False)


def _prompts(folder: Path) -> dict[str, str]:
    """Return the prompts that sentence-transformers keeps beside a model, by name."""
    path = folder / "config_sentence_transformers.json"
    prompts = _read_json(path).get("prompts") if path.is_file() else None
    if not isinstance(prompts, dict):
        return {}
    return {str(name): str(prompt) for name, prompt in prompts.items()}


def _pooling(folder: Path) -> str | None:
    """Return the pooling that sentence-transformers would do: "MEAN", "CLS", "LAST" or None."""
    if not (folder / "modules.json").is_file():
        return None
    try:
        modules = {m["type"].rpartition(".")[2]: m["path"] for m in _parse(folder / "modules.json")}
    except (KeyError, TypeError, AttributeError):
        raise ConvertError(f"{folder / 'modules.json'} holds no list of modules") from None
    if others := set(modules) - {"Transformer", "Pooling", "Normalize"}:
        raise ConvertError(f"{folder} has a module that a GGUF cannot hold: {min(others)}")
    if "Pooling" not in modules:
        return None
    place = folder / modules["Pooling"]
    said = _read_json(place / "config.json")
    known = {"mean_tokens": "MEAN", "cls_token": "CLS", "lasttoken": "LAST"}
    chosen = [
        key.removeprefix("pooling_mode_")
        for key, value in said.items()
        if key.startswith("pooling_mode_") and value is True
    ]
    if not chosen and isinstance(said.get("pooling_mode"), str):
        modes = {"mean": "mean_tokens", "cls": "cls_token", "lasttoken": "lasttoken"}
        chosen = [modes.get(said["pooling_mode"], said["pooling_mode"])]
    if len(chosen) != 1 or chosen[0] not in known:
        raise ConvertError(
            f"{place}: mean, cls and last-token pooling are supported, not {' + '.join(chosen)!r}"
        )
    return known[chosen[0]]


def _tokenizer_settings(folder: Path) -> dict[str, Any]:
    path = folder / "tokenizer_config.json"
    return _read_json(path) if path.is_file() else {}


def _write_vocabulary(
    writer: Any, gguf: Any, folder: Path, config: dict[str, Any], *, twice: bool
) -> None:
    tokens = _tokens(folder)
    settings = _tokenizer_settings(folder)
    ids = {token: i for i, token in enumerate(tokens)}
    special = {role: ids.get(_special_token(settings, role)) for role in SPECIAL_ROLES}
    if special["cls"] is None or special["sep"] is None:
        raise ConvertError(f"the vocabulary of {folder} lacks [CLS] or [SEP]")
    kinds = [gguf.TokenType.NORMAL] * len(tokens)
    for i in special.values():
        if i is not None:
            kinds[i] = gguf.TokenType.CONTROL
    for i in range(len(tokens), _size(config, "vocab_size")):
        tokens.append(f"[PAD{i}]")
        kinds.append(gguf.TokenType.UNUSED)
    if len(tokens) > _size(config, "vocab_size"):
        raise ConvertError(
            f"{folder} has {len(tokens)} tokens, its config says {config['vocab_size']}"
        )

    writer.add_token_type_count(_size(config, "type_vocab_size"))
    writer.add_tokenizer_model("bert")
    writer.add_tokenizer_pre("jina-v2-en")  # llama.cpp's name for BERT's own splitting
    spelled = [
        token if kind == gguf.TokenType.CONTROL else _phantom(token)
        for token, kind in zip(tokens, kinds, strict=True)
    ]
    if twice:
        writer.add_uint32(SEGMENT_B_OFFSET, len(tokens))
        # A word never holds a space, so that no text can be split into these. Neither are they
        # control tokens, for each of which llama.cpp searches every text.
        spelled += [f" {i}" for i in range(len(tokens))]
        kinds += [gguf.TokenType.UNUSED] * len(tokens)
    writer.add_token_list(spelled)
    writer.add_token_types(kinds)
    writer.add_bos_token_id(special["cls"])
    writer.add_eos_token_id(special["sep"])
    writer.add_sep_token_id(special["sep"])
    for role in ("unk", "pad", "mask"):
        if special[role] is not None:
            getattr(writer, f"add_{role}_token_id")(special[role])
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(True)
    writer.add_add_sep_token(False)
    lowercase, strip_accents = _normalizer(folder, settings)
    writer.add_bool("tokenizer.ggml.normalizer.lowercase", lowercase)
    if strip_accents is not None:
        writer.add_bool("tokenizer.ggml.normalizer.strip_accents", strip_accents)


def _tokens(folder: Path) -> list[str]:
    if (folder / "vocab.txt").is_file():
        return _read_text(folder / "vocab.txt").rstrip("\n").split("\n")
    model = _read_json(folder / "tokenizer.json").get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if not isinstance(vocabulary, dict):
        raise ConvertError(f"{folder} has neither vocab.txt nor a WordPiece tokenizer.json")
    return sorted(vocabulary, key=vocabulary.__getitem__)


def _special_token(settings: dict[str, Any], role: str) -> str:
    said = settings.get(f"{role}_token") or f"[{role.upper()}]"
    return said["content"] if isinstance(said, dict) else said


def _normalizer(folder: Path, settings: dict[str, Any]) -> tuple[bool, bool | None]:
    """Return (lowercase, strip_accents); the second is None where it follows the first."""
    if (folder / "tokenizer.json").is_file():
        said = _read_json(folder / "tokenizer.json").get("normalizer") or {}
        if said.get("type") == "BertNormalizer":
            return bool(said.get("lowercase", True)), said.get("strip_accents")
    return bool(settings.get("do_lower_case", True)), settings.get("strip_accents")


def _phantom(token: str) -> str:
    """Spell a WordPiece as llama.cpp does: U+2581 before what starts a word, nothing else."""
    return token[2:] if token.startswith("##") else "\u2581" + token


def _write_tensors(
    writer: Any,
    gguf: Any,
    folder: Path,
    config: dict[str, Any],
    tensors: dict[str, np.ndarray[Any, Any]],
    outtype: str,
) -> None:
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.BERT, _size(config, "num_hidden_layers"))
    quantized = gguf.GGMLQuantizationType[outtype.upper()]
    kept_f32 = ("position_embd.weight", "token_types.weight")
    for source, tensor in tensors.items():
        if source in HEAD and _is_reranker(config):
            writer.add_tensor(HEAD[source], tensor)
            continue
        if source.startswith(("pooler.", "cls.")) or source.endswith("position_ids"):
            continue  # of no use to an embedding
        name = names.get_name(source, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise ConvertError(f"{folder} holds a tensor that BERT does not have: {source}")
        if tensor.ndim < 2 or name in kept_f32 or outtype == "f32":
            writer.add_tensor(name, tensor)
        else:
            data = gguf.quants.quantize(tensor, quantized)
            writer.add_tensor(name, data, raw_dtype=quantized)


def _tensors(path: Path) -> Iterator[tuple[str, np.ndarray[Any, Any]]]:
    """Yield the tensors of a safetensors file as float32, whatever float they are stored in."""
    safetensors = require("safetensors", extra="minilm")
    try:
        stored = safetensors.deserialize(path.read_bytes())
    except FileNotFoundError:
        raise ConvertError(f"{path.parent} lacks {path.name}") from None
    except (OSError, safetensors.SafetensorError) as error:
        raise ConvertError(f"cannot read {path}: {error}") from None
    # Sorted, as safetensors gives them in another order each time. The file must come out the same:
    # one process may put it in place while another, which did the same work, is loading it, and
    # llama.cpp opens it anew for its header and for its weights.
    for name, info in sorted(stored, key=lambda item: item[0]):
        if info["dtype"] == "BF16":  # numpy has no bfloat16: it is the upper half of a float32
            data = (np.frombuffer(info["data"], "<u2").astype("<u4") << 16).view("<f4")
        elif info["dtype"] in ("F16", "F32", "F64"):
            data = np.frombuffer(info["data"], f"<f{int(info['dtype'][1:]) // 8}")
        else:
            continue  # integer buffers such as position_ids
        yield name, np.ascontiguousarray(data.reshape(info["shape"]), dtype=np.float32)

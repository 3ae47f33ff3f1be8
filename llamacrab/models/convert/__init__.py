"""Convert a BERT embedder or cross-encoder into a GGUF, without torch.

The keys and tensor names are those of llama.cpp's own converter, so that both files give the same
embeddings. Only the packages `gguf` and `safetensors` are needed (extra ``minilm``).

For a cross-encoder this converter writes two things that llama.cpp's does not. The first is its
pooler, a dense layer before the classifier: it is written as ``cls``, and llama.cpp's graph applies
tanh after it, as in BERT. The second is segment B: llama.cpp's graph treats every token as one of
segment A, so the token embeddings are written twice, the second time with (type B - type A) added,
for the ids of the document.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llamacrab._core import Model
from llamacrab._support.extras import require
from llamacrab.errors import ConvertError, LlamaError
from llamacrab.models.convert.folder import ELSEWHERE, read_json, size
from llamacrab.models.convert.pooling import choose
from llamacrab.models.convert.vocabulary import Tokenizer, write_vocabulary
from llamacrab.requests.prompts import KEY as PROMPT_KEY

if TYPE_CHECKING:
    from collections.abc import Iterator

    from llamacrab._core import PoolingType

OUTTYPES = ("f32", "f16", "bf16", "q8_0")

# Names of a cross-encoder's head in the GGUF. It is small and sets the scores: it stays float32.
HEAD = {
    "pooler.dense.weight": "cls.weight",
    "pooler.dense.bias": "cls.bias",
    "classifier.weight": "cls.output.weight",
    "classifier.bias": "cls.output.bias",
}
# Files of weights that only llama.cpp's converter reads.
OTHER_WEIGHTS = ("model.safetensors.index.json", "pytorch_model.bin")
WORDS = "embeddings.word_embeddings.weight"
TYPES = "embeddings.token_type_embeddings.weight"


def convert(
    folder: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    outtype: str = "bf16",
    pooling: PoolingType | str | None = None,
) -> Path:
    """Convert a folder that holds a BERT embedder or cross-encoder into one GGUF file.

    Parameters
    ----------
    folder : path
        A Hugging Face or sentence-transformers folder: ``config.json``, ``model.safetensors``,
        ``vocab.txt`` or ``tokenizer.json``, and optionally ``modules.json``, which names the
        pooling. A ``BertForSequenceClassification`` becomes a reranker. The tokenizer is WordPiece,
        or Unigram as in multilingual-e5-small.
    destination : path
        The GGUF to write. It is written atomically.
    outtype : {"bf16", "f16", "f32", "q8_0"}
        Type of the matrices; vectors, positions and token types stay float32, as in llama.cpp's
        converter. Smallest cosine to sentence-transformers on the 200 texts of
        the tests, all-MiniLM-L6-v2: 0.99995 for bf16, 0.999995 for f32, 0.9975 for q8_0.
    pooling : {"mean", "cls", "last"} or PoolingType, optional
        The pooling of an embedder. By default the one that the folder names, else that of the
        model's family, which is found by its name: bge, snowflake-arctic-embed, gte, e5,
        mxbai-embed-large, all-MiniLM and paraphrase-MiniLM. For other models the GGUF names no
        pooling, and a warning says so.

    Returns
    -------
    Path
        `destination`.

    Raises
    ------
    ConvertError
        The folder lacks a file, or holds a model that this converter does not support.
    MissingExtraError
        `gguf` or `safetensors` is not installed.

    Warns
    -----
    UserWarning
        The pooling is not known, so llamacrab will use the mean over all tokens; or `pooling`
        contradicts the folder.
    """
    if outtype not in OUTTYPES:
        raise ConvertError(f"outtype must be one of {', '.join(OUTTYPES)}, not {outtype!r}")
    folder, destination = Path(folder), Path(destination)
    gguf = require("gguf", extra="minilm")
    config = read_json(folder / "config.json")
    _refuse_unknown(config)
    tensors = {
        _current_name(name): tensor for name, tensor in _tensors(folder / "model.safetensors")
    }
    tokenizer = Tokenizer(folder)
    is_reranker = _is_reranker(config)
    pooling_name: str | None = "RANK"
    if is_reranker:
        if pooling is not None:
            raise ConvertError(f"{folder} holds a cross-encoder, which has no pooling to choose")
        _check_head(folder, config, tensors)
    else:
        pooling_name = choose(folder, config, pooling)

    destination.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=destination.parent, prefix=f".{destination.name}.")
    os.close(handle)
    try:
        writer = gguf.GGUFWriter(name, "bert")
        _write_header(writer, gguf, folder, config, outtype)
        for prompt_name, prompt in _prompts(folder).items():
            writer.add_string(f"{PROMPT_KEY}{prompt_name}", prompt)
        if pooling_name is not None:
            writer.add_pooling_type(gguf.PoolingType[pooling_name])
        if is_reranker:
            writer.add_array("bert.classifier.output_labels", _labels(config, tensors))
        twice = is_reranker and tokenizer.has_segments and len(tensors[TYPES]) > 1
        write_vocabulary(writer, gguf, tokenizer, config, twice=twice)
        if twice:
            words, types = tensors[WORDS], tensors[TYPES]
            tensors[WORDS] = np.concatenate([words, words + (types[1] - types[0])])
        _write_tensors(writer, gguf, folder, config, tensors, outtype)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        _check(name, folder)
        # mkstemp makes private files: give the result the permissions of a new file.
        umask = os.umask(0)
        os.umask(umask)
        Path(name).chmod(0o666 & ~umask)
        Path(name).replace(destination)
    finally:
        Path(name).unlink(missing_ok=True)
    return destination


def _check(name: str, folder: Path) -> None:
    """Raise if llama.cpp cannot load the file: wrong sizes, missing tensors, NaN."""
    try:
        Model(name, check_tensors=True).close()
    except LlamaError as error:
        raise ConvertError(f"{folder} does not make a model: {error}") from None


def _refuse_unknown(config: dict[str, Any]) -> None:
    """Raise for a model that llama.cpp's graph for BERT cannot compute, or computes differently."""
    kind = config.get("model_type")
    if kind != "bert":
        raise ConvertError(f"model_type is {kind!r}; only 'bert' is supported. {ELSEWHERE}")
    heads = [name for name in config.get("architectures") or [] if "Classification" in name]
    if heads and not _is_reranker(config):
        raise ConvertError(f"{heads[0]} has a head that gives no score to a text as a whole")
    activation = config.get("hidden_act", "gelu")
    if not str(activation).startswith("gelu"):
        raise ConvertError(f"hidden_act is {activation!r}; llama.cpp computes GELU for BERT")
    if config.get("is_decoder"):
        raise ConvertError("is_decoder is true; llama.cpp lets the tokens of BERT see each other")
    epsilon = config.setdefault("layer_norm_eps", 1e-12)  # the default of transformers
    if not isinstance(epsilon, float) or epsilon < 0:
        raise ConvertError(f"config.json must give layer_norm_eps, a number, not {epsilon!r}")
    positions = config.get("position_embedding_type", "absolute")
    if positions != "absolute":
        raise ConvertError(f"position_embedding_type is {positions!r}, not 'absolute'")


def _current_name(name: str) -> str:
    """Return a tensor's name in current transformers; old files, from TensorFlow, have others."""
    stem, dot, last = name.removeprefix("bert.").rpartition(".")
    return stem + dot + {"gamma": "weight", "beta": "bias"}.get(last, last)


def _is_reranker(config: dict[str, Any]) -> bool:
    return config.get("architectures") == ["BertForSequenceClassification"]


def _check_head(
    folder: Path, config: dict[str, Any], tensors: dict[str, np.ndarray[Any, Any]]
) -> None:
    """Raise for a reranker without the tensors that are read here, before llama.cpp checks them."""
    for name in (WORDS, TYPES, *HEAD):
        if name not in tensors:
            raise ConvertError(f"{folder} lacks the tensor {name}")
        width = tensors[name].shape[1:]
        if name.endswith(".weight") and width != (size(config, "hidden_size"),):
            raise ConvertError(f"{folder}: the rows of {name} have shape {width}")


def _labels(config: dict[str, Any], tensors: dict[str, np.ndarray[Any, Any]]) -> list[str]:
    """Return the names of the classes, by default those of transformers."""
    names = config.get("id2label")
    names = names if isinstance(names, dict) else {}
    return [str(names.get(str(i), f"LABEL_{i}")) for i in range(len(tensors["classifier.weight"]))]


def _write_header(
    writer: Any, gguf: Any, folder: Path, config: dict[str, Any], outtype: str
) -> None:
    name = Path(config.get("_name_or_path") or "").name or folder.resolve().name
    writer.add_type("model")
    writer.add_name(name)
    writer.add_block_count(size(config, "num_hidden_layers"))
    writer.add_context_length(size(config, "max_position_embeddings"))
    writer.add_embedding_length(size(config, "hidden_size"))
    writer.add_feed_forward_length(size(config, "intermediate_size"))
    writer.add_head_count(size(config, "num_attention_heads"))
    writer.add_layer_norm_eps(config["layer_norm_eps"])
    ftype = "ALL_F32" if outtype == "f32" else f"MOSTLY_{outtype.upper()}"
    writer.add_file_type(gguf.LlamaFileType[ftype])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_causal_attention(False)


def _prompts(folder: Path) -> dict[str, str]:
    """Return the prompts in the folder's sentence-transformers config, by name."""
    settings = read_json(folder / "config_sentence_transformers.json", optional=True)
    prompts = settings.get("prompts")
    if not isinstance(prompts, dict):
        return {}
    return {str(name): str(prompt) for name, prompt in prompts.items()}


def _write_tensors(
    writer: Any,
    gguf: Any,
    folder: Path,
    config: dict[str, Any],
    tensors: dict[str, np.ndarray[Any, Any]],
    outtype: str,
) -> None:
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.BERT, size(config, "num_hidden_layers"))
    quantized = gguf.GGMLQuantizationType[outtype.upper()]
    kept_f32 = ("position_embd.weight", "token_types.weight")
    for source, tensor in tensors.items():
        if source in HEAD and _is_reranker(config):
            writer.add_tensor(HEAD[source], tensor)
            continue
        if source.startswith(("pooler.", "cls.")) or source.endswith("position_ids"):
            continue  # not used for embeddings
        name = names.get_name(source, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise ConvertError(f"{folder} holds a tensor that BERT does not have: {source}")
        if tensor.ndim < 2 or name in kept_f32 or outtype == "f32":
            writer.add_tensor(name, tensor)
        else:
            data = gguf.quants.quantize(tensor, quantized)
            writer.add_tensor(name, data, raw_dtype=quantized)


def _tensors(path: Path) -> Iterator[tuple[str, np.ndarray[Any, Any]]]:
    """Yield the tensors of a safetensors file as float32, from any float type."""
    safetensors = require("safetensors", extra="minilm")
    try:
        stored = safetensors.deserialize(path.read_bytes())
    except FileNotFoundError:
        others = [name for name in OTHER_WEIGHTS if (path.parent / name).is_file()]
        other = f" and has {others[0]}. {ELSEWHERE}" if others else ""
        raise ConvertError(f"{path.parent} lacks {path.name}{other}") from None
    except (OSError, safetensors.SafetensorError) as error:
        raise ConvertError(f"cannot read {path}: {error}") from None
    # Sorted, as the order of safetensors differs between calls, and the file must be the same each
    # time: one process may replace it while another process is loading it, and llama.cpp opens it
    # twice, for its header and for its weights.
    for name, info in sorted(stored, key=lambda item: item[0]):
        if info["dtype"] == "BF16":  # numpy has no bfloat16: it is the upper half of a float32
            data = (np.frombuffer(info["data"], "<u2").astype("<u4") << 16).view("<f4")
        elif info["dtype"] in ("F16", "F32", "F64"):
            data = np.frombuffer(info["data"], f"<f{int(info['dtype'][1:]) // 8}")
        else:
            continue  # integer buffers such as position_ids
        yield name, np.ascontiguousarray(data.reshape(info["shape"]), dtype=np.float32)

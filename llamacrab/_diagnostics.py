"""Warn once, in the log, about suspicious model metadata or settings, with advice."""

from __future__ import annotations

import functools
import logging
import os
from typing import TYPE_CHECKING

from llamacrab._core import PoolingType, VocabType, kernels, kernels_have_int8
from llamacrab._support.hardware import has_gpu
from llamacrab._support.versions import GPU_BACKENDS, compiled_in

if TYPE_CHECKING:
    from collections.abc import Iterator

    from llamacrab._core import Model

_logger = logging.getLogger("llamacrab")
# Warnings about models and settings have a logger of their own: the command line shows its records.
_diagnostics_logger = logging.getLogger("llamacrab.diagnostics")

# Only these contradict each other: NONE does not pool, and RANK uses the head.
_POOLED = (PoolingType.MEAN, PoolingType.CLS, PoolingType.LAST)


@functools.cache
def log_missing_gpu() -> None:
    """Log once that a build for GPUs finds no GPU."""
    if (backends := compiled_in(*GPU_BACKENDS)) and not has_gpu():
        _logger.warning(
            "this build is for %s, but llama.cpp finds no such GPU here: the model runs on the CPU",
            " and ".join(backends),
        )


@functools.cache
def log_other_kernels() -> None:
    """Log once that ``LLAMACRAB_KERNELS`` names kernels that are not in use."""
    wanted, used = os.environ.get("LLAMACRAB_KERNELS"), kernels()
    former_names = {"plain": "generic"}
    if wanted and used and former_names.get(wanted, wanted) != used:
        _diagnostics_logger.warning(
            "LLAMACRAB_KERNELS=%s names no kernels that this CPU runs: %s is in use", wanted, used
        )


def log_context_warnings(model: Model, pooling_type: PoolingType, n_ctx: int) -> None:
    """Log a warning for each setting or key of a model that makes good embeddings unlikely."""
    for warning in _context_warnings(model, pooling_type, n_ctx):
        _diagnostics_logger.warning("%s: %s", model.path, warning)


def _context_warnings(model: Model, pooling_type: PoolingType, n_ctx: int) -> Iterator[str]:
    if n_ctx > model.n_ctx_train:
        yield f"n_ctx={n_ctx} is more than the {model.n_ctx_train} tokens of the model's training"
    own = model.pooling_type
    if own in _POOLED and pooling_type in _POOLED and own != pooling_type:
        yield (
            f"pooling {pooling_type.name} contradicts the GGUF, which says {own.name}: leave "
            "pooling_type out unless you are sure"
        )
    if (warning := _missing_int8(model)) is not None:
        yield warning
    vocab = model.vocab
    # A BERT vocabulary always ends a text with SEP, whatever the flags say.
    if vocab.vocab_type in (VocabType.NONE, VocabType.WPM) or vocab.eos is None or vocab.suffix_ids:
        return
    if pooling_type == PoolingType.LAST and "tokenizer.ggml.add_eos_token" not in model.metadata:
        yield (
            "the model pools by the last token, but its file does not say whether a text ends with "
            "EOS (tokenizer.ggml.add_eos_token), as in old conversions: if it was trained with "
            f"EOS, convert it again or pass end_token={vocab.eos}"
        )


def _missing_int8(model: Model) -> str | None:
    """Return why products are not computed in 8 bits although cpu_backend="int8"."""
    n_matrices = sum(model.ffn_types.values())
    if not model.wants_int8 or model.n_int8_matrices >= max(1, n_matrices):
        return None
    if not kernels_have_int8():
        return (
            f'cpu_backend="int8" has no effect on this CPU: its kernels ({kernels()}) multiply no '
            'matrices in 8 bits, so the model is computed as with "llamacrab"'
        )
    types = ", ".join(f"{n} {kind}" for kind, n in sorted(model.ffn_types.items()))
    return (
        f'cpu_backend="int8" takes {model.n_int8_matrices} of {n_matrices} feed-forward matrices '
        f"({types}): it takes those of 64 to 8192 columns, in a multiple of 4"
    )

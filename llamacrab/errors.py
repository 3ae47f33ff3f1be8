"""The exceptions of llamacrab. Each also derives from the builtin that a reader would expect."""

from __future__ import annotations

import concurrent.futures
from typing import Any


class LlamaError(Exception):
    """Base of the exceptions that llamacrab raises.

    Attributes
    ----------
    rows : ndarray of float32, list of them, or None
        If a call with several texts failed before its end: what it would have returned.
    done : ndarray of bool, or None
        Which of `rows` had been computed by then.
    index : int or None
        Number of the text that the error is about, if it is about one text.
    """

    rows: Any = None
    done: Any = None
    index: int | None = None

    def renumber(self, index: int, note: str = "") -> None:
        """Change the number of the text that the error is about, also in the message.

        Parameters
        ----------
        index : int
            The new number.
        note : str
            Added to the message.
        """
        # Every such message names its text as "text N".
        message = str(self).replace(f"text {self.index}", f"text {index}", 1)
        self.args = (f"{message} ({note})" if note else message,)
        self.index = index


class ModelError(LlamaError):
    """A model cannot be used."""


class ModelNotFoundError(ModelError, FileNotFoundError):
    """There is no model file at the path given."""


class ModelFormatError(ModelError, ValueError):
    """The file is not a GGUF."""


class ModelCorruptError(ModelFormatError):
    """The file is a GGUF that is damaged or cut short."""


class UnsupportedModelError(ModelError, ValueError):
    """The model is valid, but of a kind that cannot embed or rerank here."""


class FetchError(ModelError, OSError):
    """The default model cannot be fetched."""


class ConvertError(ModelError, ValueError):
    """A model folder cannot be converted into a GGUF."""


class DeviceError(LlamaError, ValueError):
    """There is no such device."""


class ContextError(LlamaError, ValueError):
    """A context cannot be made with these sizes, or is too small for the request."""


class AllocationError(LlamaError, MemoryError):
    """llama.cpp could not get the memory that it needs."""


class InputError(LlamaError, ValueError):
    """The model cannot take this input, or an argument is wrong."""


class EmptyInputError(InputError):
    """A text has no tokens at all."""


class TextTooLongError(InputError):
    """A text has more tokens than fit.

    Attributes
    ----------
    n_tokens : int
        Tokens of the text, special tokens counted.
    limit : int
        Tokens that fit.
    index : int
        Number of the text in the call.
    """

    def __init__(self, n_tokens: int, limit: int, index: int, advice: str) -> None:
        super().__init__(
            f"text {index} has {n_tokens} tokens (special tokens counted), {limit} fit: {advice}"
        )
        self.n_tokens = n_tokens
        self.limit = limit
        self.index = index


class PoolingError(LlamaError, ValueError):
    """The call needs another pooling than that of this model."""


class ClosedError(LlamaError, ValueError):
    """The object has been closed."""


class DecodeError(LlamaError, RuntimeError):
    """``llama_decode`` failed.

    Attributes
    ----------
    code : int
        What ``llama_decode`` returned.
    """

    def __init__(self, code: int, message: str) -> None:
        super().__init__(f"llama_decode returned {code}: {message}")
        self.code = code


class NumericalError(LlamaError, ArithmeticError):
    """An embedding or score is NaN or infinite, or all zeros.

    Attributes
    ----------
    index : int
        Number of the text in the call.
    """

    def __init__(self, index: int, what: str = "NaN or infinite") -> None:
        super().__init__(
            f"the row of text {index} is {what}: the GGUF is damaged, or its type is too narrow "
            "for this model (try one converted to f32 or bf16)"
        )
        self.index = index


class CorpusError(LlamaError, ValueError):
    """A job cannot continue: its folder holds another job, or a row of its source is wrong.

    Attributes
    ----------
    row : int or None
        The row of the source that is wrong, counted from 0.
    """

    def __init__(self, message: str, *, row: int | None = None) -> None:
        super().__init__(message)
        self.row = row


class BenchError(LlamaError, RuntimeError):
    """A worker of a benchmark failed, or results cannot be compared."""


class QueueFull(LlamaError, RuntimeError):
    """The queue is full, and the call does not wait."""


class LlamaTimeoutError(LlamaError, TimeoutError):
    """The timeout of a call has passed; its remaining texts were dropped."""


class CancelledError(LlamaError, concurrent.futures.CancelledError):
    """The job was cancelled."""


class ForkError(LlamaError, RuntimeError):
    """A `Llama` is used in a forked process, where its threads do not exist."""


class MissingExtraError(LlamaError, ImportError):
    """A feature needs a package that is not installed."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f"this needs the package {package!r}: pip install 'llamacrab[{extra}]'")
        self.package = package
        self.extra = extra

"""The extension: every call into llama.cpp is made here.

One module, made of a file a stage, so that llama.cpp can be linked into it statically and hidden:
no other library in the process, another llama.cpp among them, can be mistaken for ours. Read the
files in this order.
"""
cimport cython
from libc.math cimport isfinite
from libc.stdint cimport INT32_MIN, int32_t
from libc.string cimport memcpy
from libcpp cimport bool as cbool
from libcpp.string cimport string
from libcpp.vector cimport vector

from llamacrab cimport llama as c

import atexit
import enum
import logging
import os
import unicodedata

import numpy as np

from llamacrab.errors import (
    AllocationError,
    ClosedError,
    ContextError,
    DecodeError,
    InputError,
    ModelCorruptError,
    ModelError,
    ModelFormatError,
    ModelNotFoundError,
    PoolingError,
    UnsupportedModelError,
)

include "log.pyx"
include "vocab.pyx"
include "model.pyx"
include "batch.pyx"
include "context.pyx"
include "system.pyx"

c.log_install(_log_sink)
c.llama_backend_init()
atexit.register(_close_log)

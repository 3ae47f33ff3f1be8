"""The extension: all calls into llama.cpp.

It is one module made of several files, because llama.cpp is linked into it statically with hidden
symbols. So no other library in the process, such as another llama.cpp, can be mistaken for ours.
Read the files in the order in which they are included.
"""
cimport cython
from cpython.exc cimport PyErr_CheckSignals
from cpython.ref cimport Py_DECREF, Py_INCREF
from libc.math cimport isfinite
from libc.stdint cimport int32_t, int64_t, uint8_t
from libc.string cimport memcpy
from libcpp cimport bool as cbool
from libcpp.map cimport map as cppmap
from libcpp.memory cimport unique_ptr
from libcpp.string cimport string
from libcpp.utility cimport move
from libcpp.vector cimport vector

cimport libllama as c
cimport native

import _thread
import atexit
import concurrent.futures
import enum
import functools
import logging
import os
import threading
import time
import weakref

import numpy as np

from llamacrab.errors import (
    AllocationError,
    CancelledError,
    ClosedError,
    ContextError,
    DecodeError,
    DeviceError,
    EmptyInputError,
    ForkError,
    InputError,
    LlamaError,
    LlamaTimeoutError,
    ModelCorruptError,
    ModelError,
    ModelFormatError,
    ModelNotFoundError,
    NumericalError,
    PoolingError,
    QueueFull,
    TextTooLongError,
    UnsupportedModelError,
)

cdef extern from "Python.h":
    bint PyUnicode_IS_ASCII(object text)
    const char *PyUnicode_AsUTF8AndSize(object text, Py_ssize_t *size) except NULL

include "process.pyx"
include "hardware.pyx"
include "log.pyx"
include "vocab.pyx"
include "tokenization.pyx"
include "gguf.pyx"
include "model.pyx"
include "batch.pyx"
include "context.pyx"
include "scheduler.pyx"
include "job.pyx"
include "devices.pyx"
include "build_info.pyx"
include "testing.pyx"

native.log_install(_log_sink)
native.asserts_install()
native.install_kernels()
if c.LLAMACRAB_LLAMA_PLUGINS:
    # Only from the folder of this file: by default, ggml searches the current folder too.
    c.ggml_backend_load_all_from_path(os.fsencode(os.path.dirname(__file__)))
c.llama_backend_init()

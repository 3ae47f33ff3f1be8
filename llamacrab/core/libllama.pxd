# All declarations of llama.h, ggml.h, ggml-backend.h and gguf.h, with the names of these headers.
# Functions that may throw through the C interface, such as std::bad_alloc, have `except +`.
from libc.stdint cimport int32_t, int64_t, uint16_t, uint32_t, uint64_t
from libcpp cimport bool as cbool


cdef extern from "llamacrab_llama_build.h" nogil:
    const char *LLAMACRAB_LLAMA_SOURCE
    const char *LLAMACRAB_LLAMA_VERSION
    const char *LLAMACRAB_LLAMA_COMMIT
    const char *LLAMACRAB_LLAMA_OPTIONS
    int LLAMACRAB_LLAMA_PLUGINS


cdef extern from "ggml-backend.h" nogil:
    ctypedef struct ggml_backend_device
    ctypedef ggml_backend_device *ggml_backend_dev_t

    enum ggml_backend_dev_type:
        GGML_BACKEND_DEVICE_TYPE_CPU
        GGML_BACKEND_DEVICE_TYPE_GPU
        GGML_BACKEND_DEVICE_TYPE_IGPU
        GGML_BACKEND_DEVICE_TYPE_ACCEL

    void ggml_backend_load_all_from_path(const char *dir_path)
    size_t ggml_backend_dev_count()
    ggml_backend_dev_t ggml_backend_dev_get(size_t index)
    const char *ggml_backend_dev_name(ggml_backend_dev_t device)
    const char *ggml_backend_dev_description(ggml_backend_dev_t device)
    void ggml_backend_dev_memory(ggml_backend_dev_t device, size_t *free, size_t *total)
    ggml_backend_dev_type ggml_backend_dev_get_type "ggml_backend_dev_type"(
        ggml_backend_dev_t device)


cdef extern from "llama.h" nogil:
    ctypedef int32_t llama_token

    ctypedef struct llama_vocab
    ctypedef struct llama_model
    ctypedef struct llama_context
    ctypedef struct llama_memory_i
    ctypedef llama_memory_i *llama_memory_t

    enum: LLAMA_TOKEN_NULL

    enum llama_vocab_type:
        LLAMA_VOCAB_TYPE_NONE
        LLAMA_VOCAB_TYPE_SPM
        LLAMA_VOCAB_TYPE_BPE
        LLAMA_VOCAB_TYPE_WPM
        LLAMA_VOCAB_TYPE_UGM

    enum llama_pooling_type:
        LLAMA_POOLING_TYPE_UNSPECIFIED
        LLAMA_POOLING_TYPE_NONE
        LLAMA_POOLING_TYPE_MEAN
        LLAMA_POOLING_TYPE_CLS
        LLAMA_POOLING_TYPE_LAST
        LLAMA_POOLING_TYPE_RANK

    enum llama_attention_type:
        LLAMA_ATTENTION_TYPE_NON_CAUSAL

    enum llama_flash_attn_type:
        LLAMA_FLASH_ATTN_TYPE_AUTO
        LLAMA_FLASH_ATTN_TYPE_DISABLED
        LLAMA_FLASH_ATTN_TYPE_ENABLED

    enum llama_split_mode:
        LLAMA_SPLIT_MODE_NONE
        LLAMA_SPLIT_MODE_LAYER
        LLAMA_SPLIT_MODE_ROW

    enum llama_load_mode:
        LLAMA_LOAD_MODE_NONE
        LLAMA_LOAD_MODE_MMAP
        LLAMA_LOAD_MODE_MLOCK
        LLAMA_LOAD_MODE_MMAP_MLOCK

    ctypedef struct llama_model_params:
        ggml_backend_dev_t *devices
        int32_t n_gpu_layers
        llama_split_mode split_mode
        llama_load_mode load_mode
        int32_t main_gpu
        cbool vocab_only
        cbool check_tensors

    ctypedef struct llama_context_params:
        uint32_t n_ctx
        uint32_t n_batch
        uint32_t n_ubatch
        uint32_t n_seq_max
        int32_t n_threads
        int32_t n_threads_batch
        llama_pooling_type pooling_type
        llama_attention_type attention_type
        llama_flash_attn_type flash_attn_type
        cbool embeddings
        cbool offload_kqv
        cbool no_perf
        cbool kv_unified

    const char *llama_version()
    void llama_backend_init() except +
    const char *llama_print_system_info() except +
    size_t llama_max_parallel_sequences()

    llama_model_params llama_model_default_params()
    void llama_model_free(llama_model *model)
    const llama_vocab *llama_model_get_vocab(const llama_model *model)
    int32_t llama_model_n_ctx_train(const llama_model *model)
    int32_t llama_model_n_embd(const llama_model *model)
    int32_t llama_model_n_embd_out(const llama_model *model)
    int32_t llama_model_n_layer(const llama_model *model)
    int32_t llama_model_n_head(const llama_model *model)
    uint32_t llama_model_n_cls_out(const llama_model *model)
    const char *llama_model_cls_label(const llama_model *model, uint32_t i)
    int32_t llama_model_meta_count(const llama_model *model)
    int32_t llama_model_meta_key_by_index(
        const llama_model *model, int32_t i, char *buf, size_t size)
    int32_t llama_model_meta_val_str_by_index(
        const llama_model *model, int32_t i, char *buf, size_t size)
    int32_t llama_model_desc(const llama_model *model, char *buf, size_t size)
    uint64_t llama_model_size(const llama_model *model)
    uint64_t llama_model_n_params(const llama_model *model)
    const char *llama_model_chat_template(const llama_model *model, const char *name)
    cbool llama_model_has_encoder(const llama_model *model)
    cbool llama_model_has_decoder(const llama_model *model)

    llama_vocab_type llama_get_vocab_type "llama_vocab_type"(const llama_vocab *vocab)
    int32_t llama_vocab_n_tokens(const llama_vocab *vocab)
    llama_token llama_vocab_bos(const llama_vocab *vocab)
    llama_token llama_vocab_eos(const llama_vocab *vocab)
    llama_token llama_vocab_sep(const llama_vocab *vocab)
    llama_token llama_vocab_pad(const llama_vocab *vocab)
    llama_token llama_vocab_mask(const llama_vocab *vocab)
    cbool llama_vocab_get_add_bos(const llama_vocab *vocab)
    cbool llama_vocab_get_add_eos(const llama_vocab *vocab)
    cbool llama_vocab_get_add_sep(const llama_vocab *vocab)
    cbool llama_vocab_is_control(const llama_vocab *vocab, llama_token token)
    int32_t llama_token_to_piece(
        const llama_vocab *vocab, llama_token token, char *buf, int32_t length, int32_t lstrip,
        cbool special) except +
    int32_t llama_detokenize(
        const llama_vocab *vocab, const llama_token *tokens, int32_t n_tokens, char *text,
        int32_t text_len_max, cbool remove_special, cbool unparse_special) except +

    llama_context_params llama_context_default_params()
    uint32_t llama_n_ctx(const llama_context *ctx)
    uint32_t llama_n_ctx_seq(const llama_context *ctx)
    uint32_t llama_n_batch(const llama_context *ctx)
    uint32_t llama_n_ubatch(const llama_context *ctx)
    uint32_t llama_n_seq_max(const llama_context *ctx)
    int32_t llama_n_threads_batch(llama_context *ctx)
    llama_memory_t llama_get_memory(const llama_context *ctx)
    cbool llama_get_causal_attn(const llama_context *ctx)


cdef extern from "ggml.h" nogil:
    enum ggml_log_level:
        GGML_LOG_LEVEL_DEBUG
        GGML_LOG_LEVEL_INFO
        GGML_LOG_LEVEL_WARN
        GGML_LOG_LEVEL_ERROR

    enum ggml_type:
        GGML_TYPE_F32
        GGML_TYPE_F16
        GGML_TYPE_Q8_0
        GGML_TYPE_BF16
        GGML_TYPE_I8
        GGML_TYPE_F64

    enum: GGML_MAX_N_THREADS

    ctypedef void (*ggml_to_float_t)(const void *x, float *y, int64_t k)

    ctypedef struct ggml_type_traits:
        int64_t blck_size
        ggml_to_float_t to_float

    const ggml_type_traits *ggml_get_type_traits(ggml_type type)
    size_t ggml_row_size(ggml_type type, int64_t ne)


cdef extern from "gguf.h" nogil:
    ctypedef struct gguf_context
    ctypedef struct gguf_init_params:
        cbool no_alloc

    enum gguf_type:
        GGUF_TYPE_UINT16
        GGUF_TYPE_UINT32
        GGUF_TYPE_FLOAT32
        GGUF_TYPE_STRING
        GGUF_TYPE_ARRAY

    gguf_context *gguf_init_from_file(const char *fname, gguf_init_params params) except +
    void gguf_free(gguf_context *ctx)
    int64_t gguf_get_n_tensors(const gguf_context *ctx)
    const char *gguf_get_tensor_name(const gguf_context *ctx, int64_t tensor_id)
    const char *ggml_type_name(ggml_type type)
    ggml_type gguf_get_tensor_type(const gguf_context *ctx, int64_t tensor_id)
    size_t gguf_get_tensor_size(const gguf_context *ctx, int64_t tensor_id)
    size_t gguf_get_data_offset(const gguf_context *ctx)
    size_t gguf_get_tensor_offset(const gguf_context *ctx, int64_t tensor_id)
    int64_t gguf_find_key(const gguf_context *ctx, const char *key)
    int64_t gguf_find_tensor(const gguf_context *ctx, const char *name)
    gguf_type gguf_get_kv_type(const gguf_context *ctx, int64_t key_id)
    gguf_type gguf_get_arr_type(const gguf_context *ctx, int64_t key_id)
    uint16_t gguf_get_val_u16(const gguf_context *ctx, int64_t key_id)
    uint32_t gguf_get_val_u32(const gguf_context *ctx, int64_t key_id)
    float gguf_get_val_f32(const gguf_context *ctx, int64_t key_id)
    const char *gguf_get_val_str(const gguf_context *ctx, int64_t key_id)
    size_t gguf_get_arr_n(const gguf_context *ctx, int64_t key_id)
    const char *gguf_get_arr_str(const gguf_context *ctx, int64_t key_id, size_t i)

# All declarations of llamacrab's own C++ code. Only here.
from libc.stdint cimport int32_t, int64_t, uint8_t
from libcpp cimport bool as cbool
from libcpp.map cimport map as cppmap
from libcpp.memory cimport unique_ptr
from libcpp.string cimport string
from libcpp.vector cimport vector

from libllama cimport (
    llama_context,
    llama_context_params,
    llama_model,
    llama_model_params,
    llama_token,
    llama_vocab,
)


cdef extern from "<string_view>" namespace "std" nogil:
    cppclass string_view:
        string_view()
        string_view(const char *data, size_t size)
        const char *data()
        size_t size()


cdef extern from "native/log.hpp" namespace "llamacrab" nogil:
    ctypedef void (*log_sink)(int level, const char *line) noexcept
    void log_install(log_sink sink)
    void log_set_threshold(int level)
    string log_take_errors() except +
    void log_context_warnings(cbool wanted)


cdef extern from "native/thread_pool.hpp" namespace "llamacrab" nogil:
    cppclass thread_pool:
        thread_pool(size_t max_helpers) except +


cdef extern from "native/testing/check_thread_pool.hpp" namespace "llamacrab" nogil:
    int check_thread_pool(const vector[int] &sizes) except +


cdef extern from "kernels/kernels.hpp" namespace "llamacrab::kernels" nogil:
    enum class cpu_backend:
        ggml
        llamacrab
        int8

    const char *active_kernels "llamacrab::kernels::active_name"()
    cbool have_int8()
    cbool have_bf16()
    cbool can_pack(int ggml_type)
    cbool prefer_kernels "llamacrab::kernels::preferred_over_ggml"()
    void install_kernels "llamacrab::kernels::install"() except +


cdef extern from "kernels/testing/compare_with_ggml.hpp" namespace "llamacrab::kernels" nogil:
    cppclass field_value:
        vector[int] numbers
        string word

    string complaint_about_backend() except +
    double compare_with_ggml(const string &kind, const cppmap[string, field_value] &fields) except +


cdef extern from "native/llama_guard.hpp" namespace "llamacrab" nogil:
    void asserts_install()


cdef extern from "core/load_model.hpp" namespace "llamacrab" nogil:
    llama_model *load_model(
        const char *path, llama_model_params params, cpu_backend backend,
        int &n_int8_matrices) except +


cdef extern from "native/tokenization.hpp" namespace "llamacrab" nogil:
    ctypedef vector[llama_token] token_vector

    cbool tokenize(const llama_vocab *vocab, string_view text, cbool parse_special,
                   cbool decompose, token_vector &out) except +

    enum class tokenize_status:
        ok
        too_long
        no_room
        empty
        unsplittable

    enum class truncate_side:
        none
        end
        start
        middle

    int64_t n_leading_kept(truncate_side side, int64_t room)

    cppclass tokenization:
        const llama_vocab *vocab
        token_vector prefix_ids
        token_vector suffix_ids
        string prefix_text
        string suffix_text
        int32_t limit
        int32_t shift
        truncate_side truncate
        cbool parse_special
        cbool decompose
        tokenize_status apply(string_view text, token_vector &out, int64_t &n_tokens) except +
        token_vector common() except +

    cppclass source:
        string_view bytes
        cbool is_ids

    cppclass tokenized:
        token_vector tokens
        vector[size_t] ends
        tokenize_status status
        int64_t n_tokens

    tokenized tokenize_texts(const tokenization &rules, const vector[source] &texts, size_t budget,
                             thread_pool &helpers) except +


cdef extern from "native/job.hpp" namespace "llamacrab" nogil:
    enum class failure_kind:
        none
        decode
        no_room
        no_memory
        numerical
        thrown
        closed
        cancelled

    enum class norm_kind:
        none
        p
        max
        int16

    cppclass failure:
        failure_kind kind
        int32_t code
        int64_t index
        string message

    cppclass waiter:
        cbool sleep(int64_t microseconds)

    cppclass job:
        job() except +
        norm_kind norm
        double p
        int32_t width
        cbool dedup
        cbool may_be_zero
        token_vector shared
        cbool watched
        uint8_t *done
        waiter event

    cppclass item:
        job *owner
        int64_t index
        size_t first
        int32_t n_tokens
        float *row
        int32_t n_rows

    cppclass chunk:
        chunk() except +
        token_vector tokens
        vector[item] items


cdef extern from "native/queue.hpp" namespace "llamacrab" nogil:
    cppclass limits:
        int32_t pack_tokens
        int32_t pack_min
        int64_t queue_tokens


cdef extern from "native/decoder.hpp" namespace "llamacrab" nogil:
    enum class fault_kind:
        none
        decode_error
        no_memory
        throws
        not_finite
        no_hidden_rows

    cppclass token_batch:
        token_batch(int32_t capacity) except +
        void clear()
        void add(const int32_t *ids, int32_t n_tokens, int32_t first_pos, int32_t seq_id)
        int32_t n_tokens()
        int32_t token(int32_t i)
        int32_t pos(int32_t i)
        int32_t seq_id(int32_t i)

    cppclass decoder:
        @staticmethod
        unique_ptr[decoder] make(llama_model *model, llama_context_params params,
                                 cbool headless) except +
        llama_context *context()
        failure decode(const token_batch &batch) except +
        const float *sequence_row(int32_t seq_id) except +
        const float *token_row(int32_t index) except +
        void clear_memory() except +
        int64_t n_headless
        int64_t n_heads
        cbool watch_heads


cdef extern from "native/scheduler.hpp" namespace "llamacrab" nogil:
    cppclass worker_stats:
        int64_t n_packs
        int64_t n_texts
        int64_t n_tokens
        double wait_seconds
        double decode_seconds
        double copy_seconds

    cppclass pack_record:
        int32_t worker
        int32_t n_texts
        int32_t n_tokens
        int32_t n_threads
        double seconds
        double wait_seconds
        double decode_seconds
        double copy_seconds
        int64_t queued_tokens

    cppclass scheduler:
        scheduler(limits bounds) except +
        void add_worker(decoder &computes, int32_t pack_tokens, int32_t pack_texts,
                        int32_t n_spare_threads) except +
        cbool has_room(job &j, int64_t n_tokens, cbool wait) except +
        void give_up_place(job &j) except +
        cbool admit(job &j, unique_ptr[chunk] texts) except +
        cbool seal(job &j, void *on_done_data) except +
        cbool finished(job &j) except +
        int64_t n_done(job &j) except +
        void cancel(job &j) except +
        void await_quiet(job &j) except +
        failure failure_of(job &j) except +
        void *next_finished() except +
        void close() except +
        void set_limits(limits bounds) except +
        limits get_limits() except +
        int64_t queued_tokens() except +
        int64_t queued_texts() except +
        vector[worker_stats] stats() except +
        vector[pack_record] recent_packs() except +
        vector[pack_record] next_packs(int64_t &n_seen) except +
        void add_tokenize_seconds(double seconds) except +
        double tokenize_seconds() except +
        void inject(fault_kind kind, int64_t after, int64_t times) except +

// The best that a plain loop over llama.cpp does: texts sorted by length, packed under a token
// budget of the caller's choice, a context and a thread each. No queue, no Python.
//
//   loop MODEL TEXTS CONTEXTS THREADS PACK_TOKENS FLASH_ATTN
//
// TEXTS holds a text a line. After loading, each line on standard input makes it compute all of
// them once and print the seconds that took, tokenizing included. A line other than "go" names a
// file that then gets the vectors, as they lie in memory.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iostream>
#include <string>
#include <thread>
#include <vector>

#include "llama.h"

using ids = std::vector<llama_token>;

static ids tokenize(const llama_vocab * vocab, const std::string & text) {
    ids out(text.size() + 8);
    const int n =
        llama_tokenize(vocab, text.data(), text.size(), out.data(), out.size(), true, false);
    out.resize(std::min(n, 512));
    return out;
}

int main(int argc, char ** argv) {
    if (argc != 7) {
        fprintf(stderr, "loop MODEL TEXTS CONTEXTS THREADS PACK_TOKENS FLASH_ATTN\n");
        return 2;
    }
    const int n_contexts = atoi(argv[3]), n_threads = atoi(argv[4]), budget = atoi(argv[5]);
    llama_log_set([](ggml_log_level, const char *, void *) {}, nullptr);
    llama_backend_init();
    llama_model * model = llama_model_load_from_file(argv[1], llama_model_default_params());
    const llama_vocab * vocab = llama_model_get_vocab(model);
    const int width = llama_model_n_embd_out(model);

    std::vector<std::string> texts;
    std::ifstream file(argv[2]);
    for (std::string line; std::getline(file, line);) {
        texts.push_back(line);
    }
    std::vector<llama_context *> contexts;
    for (int i = 0; i < n_contexts; ++i) {
        auto params = llama_context_default_params();
        params.n_ctx = 512;
        params.n_batch = std::max(512, budget);
        params.n_ubatch = params.n_batch;
        params.n_seq_max = 64;
        params.n_threads = n_threads;
        params.n_threads_batch = n_threads;
        params.embeddings = true;
        params.kv_unified = true;
        params.no_perf = true;
        params.flash_attn_type =
            atoi(argv[6]) ? LLAMA_FLASH_ATTN_TYPE_ENABLED : LLAMA_FLASH_ATTN_TYPE_DISABLED;
        contexts.push_back(llama_init_from_model(model, params));
    }
    std::vector<float> rows(texts.size() * width);

    for (std::string go; std::getline(std::cin, go);) {
        const auto start = std::chrono::steady_clock::now();
        std::vector<ids> tokens(texts.size());
        {
            std::atomic<size_t> next{0};
            std::vector<std::thread> threads;
            for (int i = 0; i < n_contexts * n_threads; ++i) {
                threads.emplace_back([&] {
                    for (size_t t; (t = next++) < texts.size();) {
                        tokens[t] = tokenize(vocab, texts[t]);
                    }
                });
            }
            for (auto & t : threads) {
                t.join();
            }
        }
        std::vector<size_t> order(texts.size());
        for (size_t i = 0; i < order.size(); ++i) {
            order[i] = i;
        }
        std::stable_sort(order.begin(), order.end(),
                         [&](size_t a, size_t b) { return tokens[a].size() > tokens[b].size(); });
        std::vector<std::pair<size_t, size_t>> packs;
        for (size_t i = 0; i < order.size();) {
            size_t n = 0, j = i;
            while (j < order.size() && j - i < 64 &&
                   (j == i || n + tokens[order[j]].size() <= size_t(budget))) {
                n += tokens[order[j++]].size();
            }
            packs.emplace_back(i, j);
            i = j;
        }
        std::atomic<size_t> next{0};
        std::vector<std::thread> threads;
        for (llama_context * context : contexts) {
            threads.emplace_back([&, context] {
                llama_batch batch = llama_batch_init(std::max(512, budget), 0, 1);
                for (size_t p; (p = next++) < packs.size();) {
                    batch.n_tokens = 0;
                    for (size_t k = packs[p].first; k < packs[p].second; ++k) {
                        const ids & text = tokens[order[k]];
                        for (size_t pos = 0; pos < text.size(); ++pos) {
                            const int at = batch.n_tokens++;
                            batch.token[at] = text[pos];
                            batch.pos[at] = pos;
                            batch.n_seq_id[at] = 1;
                            batch.seq_id[at][0] = k - packs[p].first;
                            batch.logits[at] = 1;
                        }
                    }
                    if (llama_decode(context, batch)) {
                        abort();
                    }
                    for (size_t k = packs[p].first; k < packs[p].second; ++k) {
                        const float * row = llama_get_embeddings_seq(context, k - packs[p].first);
                        float sum = 0;
                        for (int e = 0; e < width; ++e) {
                            sum += row[e] * row[e];
                        }
                        for (int e = 0; e < width; ++e) {
                            rows[order[k] * width + e] = row[e] / std::sqrt(sum);
                        }
                    }
                }
                llama_batch_free(batch);
            });
        }
        for (auto & t : threads) {
            t.join();
        }
        const std::chrono::duration<double> taken = std::chrono::steady_clock::now() - start;
        if (go != "go") {
            std::ofstream(go, std::ios::binary)
                .write(reinterpret_cast<const char *>(rows.data()), rows.size() * sizeof(float));
        }
        printf("%.6f\n", taken.count());
        fflush(stdout);
    }
}

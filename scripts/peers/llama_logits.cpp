// What llama.cpp makes of a GGUF: logits of token ids, or the token ids of a text.
//   llama_logits MODEL.gguf N [THREADS] < int32 token ids, in samples of N > float32 logits [samples, N, vocabulary]
//   llama_logits MODEL.gguf 0 < text > int32 token ids
#include "llama.h"
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

static void quiet(ggml_log_level level, const char * text, void *) {
    if (level == GGML_LOG_LEVEL_ERROR) fputs(text, stderr);
}

int main(int argc, char ** argv) {
    if (argc < 3) return 2;
    const int n = atoi(argv[2]);
    const int threads = argc > 3 ? atoi(argv[3]) : 1;
    llama_log_set(quiet, nullptr);
    llama_backend_init();
    llama_model_params mp = llama_model_default_params();
    mp.vocab_only = n == 0;
    mp.use_extra_bufts = false;  // the weights as they are, not repacked for other kernels
    llama_model * model = llama_model_load_from_file(argv[1], mp);
    if (!model) return 1;
    const llama_vocab * vocab = llama_model_get_vocab(model);
    if (n == 0) {
        std::string text;
        char part[65536];
        for (size_t got; (got = fread(part, 1, sizeof part, stdin)) > 0;) text.append(part, got);
        std::vector<llama_token> ids(text.size() + 8);
        const int count = llama_tokenize(vocab, text.data(), text.size(), ids.data(), ids.size(), false, false);
        if (count < 0) return 1;
        fwrite(ids.data(), sizeof(llama_token), count, stdout);
        return 0;
    }
    llama_context_params cp = llama_context_default_params();
    cp.n_ctx = cp.n_batch = cp.n_ubatch = n;
    cp.n_threads = cp.n_threads_batch = threads;
    cp.type_k = cp.type_v = GGML_TYPE_F32;
    cp.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_DISABLED;
    llama_context * context = llama_init_from_model(model, cp);
    if (!context) return 1;
    const int words = llama_vocab_n_tokens(vocab);
    std::vector<llama_token> ids(n);
    llama_batch batch = llama_batch_init(n, 0, 1);
    while (fread(ids.data(), sizeof(llama_token), n, stdin) == (size_t) n) {
        llama_memory_clear(llama_get_memory(context), true);
        batch.n_tokens = n;
        for (int i = 0; i < n; ++i) {
            batch.token[i] = ids[i];
            batch.pos[i] = i;
            batch.n_seq_id[i] = 1;
            batch.seq_id[i][0] = 0;
            batch.logits[i] = 1;
        }
        if (llama_decode(context, batch)) return 1;
        fwrite(llama_get_logits(context), sizeof(float), (size_t) n * words, stdout);
    }
    llama_free(context);
    llama_model_free(model);
    return 0;
}

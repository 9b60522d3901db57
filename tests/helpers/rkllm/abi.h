/* The structures of librkllmrt.so by RKLLM_LAYOUT: 120 (1.2.0), 121 (1.2.1 to 1.2.3) or 130 (1.3.0).
 *
 * Written from the published layouts, and asserted byte for byte below, apart from what Headstart asserts of its
 * own structures: the two were written separately, so that a mistake in one shows against the other. */
#ifndef STANDIN_ABI_H
#define STANDIN_ABI_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifndef RKLLM_LAYOUT
#error "compile with -DRKLLM_LAYOUT=120, 121 or 130"
#endif

typedef void *LLMHandle;
typedef enum { RUN_NORMAL, RUN_WAITING, RUN_FINISH, RUN_ERROR } LLMCallState;

typedef struct {
    int32_t base_domain_id;
    int8_t embed_flash;
    int8_t enabled_cpus_num;
    uint32_t enabled_cpus_mask;
#if RKLLM_LAYOUT == 120
    uint8_t reserved[106];
#else
    uint8_t n_batch;
    int8_t use_cross_attn;
    uint8_t reserved[104];
#endif
} RKLLMExtendParam;

typedef struct {
    const char *model_path;
    int32_t max_context_len;
    int32_t max_new_tokens;
    int32_t top_k;
    int32_t n_keep;
    float top_p;
    float temperature;
    float repeat_penalty;
    float frequency_penalty;
    float presence_penalty;
    int32_t mirostat;
    float mirostat_tau;
    float mirostat_eta;
    bool skip_special_token;
#if RKLLM_LAYOUT == 130
    bool ignore_eos_token;
    bool is_async;
#else
    bool is_async;
    const char *img_start;
    const char *img_end;
    const char *img_content;
#endif
    RKLLMExtendParam extend_param;
} RKLLMParam;

typedef struct {
    float *embed;
    size_t n_tokens;
} RKLLMEmbedInput;

typedef struct {
    int32_t *input_ids;
    size_t n_tokens;
} RKLLMTokenInput;

#if RKLLM_LAYOUT == 120
#define MULTIMODAL_BYTES 24
#elif RKLLM_LAYOUT == 121
#define MULTIMODAL_BYTES 48
#else
#define MULTIMODAL_BYTES 144
#endif

typedef struct {
#if RKLLM_LAYOUT != 120
    const char *role;
    bool enable_thinking;
#endif
    int32_t input_type;
    union {
        const char *prompt_input;
        RKLLMEmbedInput embed_input;
        RKLLMTokenInput token_input;
        struct {
            void *parts[MULTIMODAL_BYTES / 8];
        } multimodal_input;
    } content;
} RKLLMInput;

typedef struct {
    int save_prompt_cache;
    const char *prompt_cache_path;
} RKLLMPromptCacheParam;

typedef struct {
    int32_t top_k;
    float top_p;
    float temperature;
    float repeat_penalty;
    float frequency_penalty;
    float presence_penalty;
    int32_t mirostat;
    float mirostat_tau;
    float mirostat_eta;
} RKLLMSamplingParam;

typedef struct {
    int32_t mode;
    void *lora_params;
    RKLLMPromptCacheParam *prompt_cache_params;
#if RKLLM_LAYOUT == 130
    RKLLMSamplingParam *sampling_params;
#endif
    int keep_history;
#if RKLLM_LAYOUT == 130
    int32_t max_new_tokens;
#endif
} RKLLMInferParam;

typedef struct {
    const float *values;
    int width;
    int num_tokens;
} RKLLMRows;

typedef struct {
    float prefill_time_ms;
    int prefill_tokens;
    float generate_time_ms;
    int generate_tokens;
    float memory_usage_mb;
} RKLLMPerfStat;

typedef struct {
    const char *text;
    int32_t token_id;
    RKLLMRows last_hidden_layer;
    RKLLMRows logits;
#if RKLLM_LAYOUT != 120
    RKLLMPerfStat perf;
#endif
} RKLLMResult;

#if RKLLM_LAYOUT == 120
typedef void (*LLMResultCallback)(RKLLMResult *, void *, LLMCallState);
#else
typedef int (*LLMResultCallback)(RKLLMResult *, void *, LLMCallState);
#endif

typedef struct {
    LLMResultCallback result_callback;
    void *result_userdata;
    void *tokenizer_callback;
    void *tokenizer_userdata;
    void *embed_callback;
    void *embed_userdata;
} RKLLMCallback;

#define SIZE(type, bytes) _Static_assert(sizeof(type) == (bytes), "size of " #type)
#define AT(type, field, bytes) _Static_assert(offsetof(type, field) == (bytes), #type "." #field)

SIZE(void *, 8);
SIZE(size_t, 8);
SIZE(LLMCallState, 4);
SIZE(RKLLMExtendParam, 120);
AT(RKLLMExtendParam, base_domain_id, 0);
AT(RKLLMExtendParam, embed_flash, 4);
AT(RKLLMExtendParam, enabled_cpus_num, 5);
AT(RKLLMExtendParam, enabled_cpus_mask, 8);
#if RKLLM_LAYOUT == 120
AT(RKLLMExtendParam, reserved, 12);
#else
AT(RKLLMExtendParam, n_batch, 12);
AT(RKLLMExtendParam, use_cross_attn, 13);
AT(RKLLMExtendParam, reserved, 14);
#endif

AT(RKLLMParam, model_path, 0);
AT(RKLLMParam, max_context_len, 8);
AT(RKLLMParam, max_new_tokens, 12);
AT(RKLLMParam, top_k, 16);
AT(RKLLMParam, n_keep, 20);
AT(RKLLMParam, top_p, 24);
AT(RKLLMParam, temperature, 28);
AT(RKLLMParam, repeat_penalty, 32);
AT(RKLLMParam, frequency_penalty, 36);
AT(RKLLMParam, presence_penalty, 40);
AT(RKLLMParam, mirostat, 44);
AT(RKLLMParam, mirostat_tau, 48);
AT(RKLLMParam, mirostat_eta, 52);
AT(RKLLMParam, skip_special_token, 56);
#if RKLLM_LAYOUT == 130
SIZE(RKLLMParam, 184);
AT(RKLLMParam, ignore_eos_token, 57);
AT(RKLLMParam, is_async, 58);
AT(RKLLMParam, extend_param, 60);
#else
SIZE(RKLLMParam, 208);
AT(RKLLMParam, is_async, 57);
AT(RKLLMParam, img_start, 64);
AT(RKLLMParam, img_end, 72);
AT(RKLLMParam, img_content, 80);
AT(RKLLMParam, extend_param, 88);
#endif

#if RKLLM_LAYOUT == 120
SIZE(RKLLMInput, 32);
AT(RKLLMInput, input_type, 0);
AT(RKLLMInput, content, 8);
#else
SIZE(RKLLMInput, RKLLM_LAYOUT == 121 ? 64 : 160);
AT(RKLLMInput, role, 0);
AT(RKLLMInput, enable_thinking, 8);
AT(RKLLMInput, input_type, 12);
AT(RKLLMInput, content, 16);
#endif
AT(RKLLMTokenInput, n_tokens, 8);

SIZE(RKLLMPromptCacheParam, 16);
AT(RKLLMPromptCacheParam, save_prompt_cache, 0);
AT(RKLLMPromptCacheParam, prompt_cache_path, 8);

AT(RKLLMInferParam, mode, 0);
AT(RKLLMInferParam, lora_params, 8);
AT(RKLLMInferParam, prompt_cache_params, 16);
#if RKLLM_LAYOUT == 130
SIZE(RKLLMInferParam, 40);
AT(RKLLMInferParam, sampling_params, 24);
AT(RKLLMInferParam, keep_history, 32);
AT(RKLLMInferParam, max_new_tokens, 36);
#else
SIZE(RKLLMInferParam, 32);
AT(RKLLMInferParam, keep_history, 24);
#endif

SIZE(RKLLMSamplingParam, 36);
AT(RKLLMSamplingParam, top_k, 0);
AT(RKLLMSamplingParam, top_p, 4);
AT(RKLLMSamplingParam, temperature, 8);
AT(RKLLMSamplingParam, repeat_penalty, 12);
AT(RKLLMSamplingParam, frequency_penalty, 16);
AT(RKLLMSamplingParam, presence_penalty, 20);
AT(RKLLMSamplingParam, mirostat, 24);
AT(RKLLMSamplingParam, mirostat_tau, 28);
AT(RKLLMSamplingParam, mirostat_eta, 32);

AT(RKLLMResult, text, 0);
AT(RKLLMResult, token_id, 8);
AT(RKLLMResult, last_hidden_layer, 16);
AT(RKLLMResult, logits, 32);
#if RKLLM_LAYOUT == 120
SIZE(RKLLMResult, 48);
#else
SIZE(RKLLMResult, 72);
AT(RKLLMResult, perf, 48);
#endif
SIZE(RKLLMPerfStat, 20);
AT(RKLLMPerfStat, prefill_time_ms, 0);
AT(RKLLMPerfStat, prefill_tokens, 4);
AT(RKLLMPerfStat, generate_time_ms, 8);
AT(RKLLMPerfStat, generate_tokens, 12);
AT(RKLLMPerfStat, memory_usage_mb, 16);

SIZE(RKLLMCallback, 48);
AT(RKLLMCallback, result_callback, 0);
AT(RKLLMCallback, result_userdata, 8);
AT(RKLLMCallback, tokenizer_callback, 16);
AT(RKLLMCallback, tokenizer_userdata, 24);
AT(RKLLMCallback, embed_callback, 32);
AT(RKLLMCallback, embed_userdata, 40);

#endif

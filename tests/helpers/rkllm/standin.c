/* A stand-in for librkllmrt.so, for tests. It has no model and no NPU: it speaks the runtime's protocol, and is
 * strict about it where the real one would corrupt memory or go on silently. It proves that Headstart keeps to
 * the protocol as it is known, and nothing about the hardware.
 *
 * A model is a file of lines: RKLLM-STANDIN, geometry=LAYERSxHEADSxDIM, weights=ANYTHING, ctx=N. The "KV cell" of a
 * token is a hash of the weights and of all tokens up to it, and what comes next is a function of the last cell:
 * reusing a wrong cell, or one of another model, changes the text.
 *
 * Switches, as key=value with commas between, in RKLLM_STANDIN, or in the file that RKLLM_STANDIN_FILE names,
 * which is read again at every call:
 *   init=fail|crash  template=fail  load=fail|crash  release=fail  run=fail|error|crash  decode=crash
 *   save=skip|partial|crash  reuse=none  abort=lost (before the prefill's end)  abort=slow
 *   late=MS (FINISH so long after rkllm_run returned; "never": not at all)  prefill_ms=MS  decode_ms=MS (a token)
 *   leave=MS (what the run's thread takes after the callback of FINISH)
 *   utf8=1 (characters of several tokens)  split=1 (their bytes as they come)  eos=shown (the end token, too)
 */
#define _GNU_SOURCE
#include "abi.h"

#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#ifndef RKLLM_VERSION
#error "compile with -DRKLLM_VERSION=\"1.2.3\""
#endif

#define EXPORT __attribute__((visibility("default")))
#define ALIVE 0x524b4c4d
#define MAX_CONTEXT 16384
#define FILE_MAGIC 0x6767736e
#define FILE_VERSION 9
#define POISON 0xA5

EXPORT const char rkllm_sdk_version[] = "RKLLM SDK (version: " RKLLM_VERSION ", a stand-in for tests)";

/* The tokenizer: as headstart.toyspec has it. */
#define N_BYTES 256
static const char *MERGES[] = {"\n\n", "  ", "th", "the", "er", "in", "ing", "us", "def", "\ndef"};
static const char *CONTROL[] = {"<s>", "<|im_start|>", "<|im_end|>", "</s>"};
#define COUNT(array) ((int)(sizeof(array) / sizeof(array[0])))
#define END_TOKEN (N_BYTES + COUNT(MERGES) + 2)
#define N_VOCAB (N_BYTES + COUNT(MERGES) + COUNT(CONTROL))
static const char LETTERS[] = "etaoinshrdlucmfwypvbgkjqxz  \n";

typedef struct {
    uint32_t shape[3];
    int ctx;
    uint32_t weights;
} Model;

typedef struct {
    int n;
    int32_t tokens[MAX_CONTEXT];
    uint32_t cells[MAX_CONTEXT];
} Memory;

typedef struct {
    uint32_t alive;
    Model model;
    RKLLMParam param;
    RKLLMSamplingParam sampling;
    LLMResultCallback callback;
    void *callback_userdata;
    char *system, *prefix, *postfix;
    Memory memory;
    bool cache_loaded, aborted_early;
    pthread_mutex_t lock;
    pthread_cond_t changed;
    pthread_t thread;
    bool started, running, prefilling, aborted, done;
    /* One run's. */
    RKLLMInferParam *infer;
    RKLLMSamplingParam run_sampling;
    void *userdata;
    int32_t prompt[MAX_CONTEXT];
    int n_prompt, max_new;
    RKLLMResult result;
    char text[16];
    bool keep_history;
} Handle;

static int refuse(const char *why) {
    fprintf(stderr, "rkllm stand-in: %s\n", why);
    return -1;
}

static void die(const char *why) {
    refuse(why);
    raise(SIGSEGV);
}

#define REQUIRE(condition, why)                                                                                     \
    if (!(condition)) return refuse(why)

/* ---- switches ---- */

static bool switch_in(const char *switches, const char *key, char value[32]) {
    size_t size = strlen(key);
    for (const char *at = switches; at && *at; at = strchr(at, ','), at = at ? at + 1 : NULL) {
        if (strncmp(at, key, size) == 0 && at[size] == '=') {
            size_t length = strcspn(at + size + 1, ",\n");
            length = length < 31 ? length : 31;
            memcpy(value, at + size + 1, length);
            value[length] = 0;
            return true;
        }
    }
    return false;
}

static bool get_switch(const char *key, char value[32]) {
    const char *path = getenv("RKLLM_STANDIN_FILE");
    FILE *file = path ? fopen(path, "r") : NULL;
    if (file) {
        char content[1024];
        content[fread(content, 1, sizeof content - 1, file)] = 0;
        fclose(file);
        if (switch_in(content, key, value)) return true;
    }
    return switch_in(getenv("RKLLM_STANDIN"), key, value);
}

static bool is_set(const char *key, const char *wanted) {
    char value[32];
    return get_switch(key, value) && strcmp(value, wanted) == 0;
}

static double number(const char *key, double otherwise) {
    char value[32];
    return get_switch(key, value) ? atof(value) : otherwise;
}

static void wait_ms(double ms) {
    if (ms > 0) usleep((useconds_t)(ms * 1000));
}

static double now_ms(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1e3 + now.tv_nsec / 1e6;
}

/* ---- the "model" ---- */

static uint32_t hashed(uint32_t hash, const void *data, size_t size) {
    const uint8_t *bytes = data;
    for (size_t i = 0; i < size; i++) {
        hash ^= bytes[i];
        for (int bit = 0; bit < 8; bit++) hash = hash >> 1 ^ (hash & 1 ? 0xEDB88320u : 0);
    }
    return hash * 0x9E3779B1u ^ hash >> 15;
}

static size_t cell_bytes(const Model *model) {
    return (size_t)model->shape[0] * 2 * model->shape[1] * model->shape[2] * 2;
}

static int read_model(const char *path, Model *model) {
    char content[4096], *line;
    FILE *file = fopen(path, "rb");
    REQUIRE(file, "the model can't be opened");
    content[fread(content, 1, sizeof content - 1, file)] = 0;
    fclose(file);
    REQUIRE(strncmp(content, "RKLLM-STANDIN", 13) == 0, "the model is not one of the stand-in's");
    REQUIRE((line = strstr(content, "geometry=")), "the model names no geometry");
    REQUIRE(sscanf(line, "geometry=%ux%ux%u", &model->shape[0], &model->shape[1], &model->shape[2]) == 3,
            "the model's geometry can't be read");
    REQUIRE(cell_bytes(model) >= 4, "the model's geometry has no room for a cell");
    REQUIRE((line = strstr(content, "weights=")), "the model names no weights");
    model->weights = hashed(1, line, strcspn(line, "\n"));
    model->ctx = MAX_CONTEXT;
    if ((line = strstr(content, "ctx="))) model->ctx = atoi(line + 4);
    return 0;
}

static int matching(const char *text, int *size) {
    int found = (uint8_t)*text;
    *size = 1;
    for (int i = 0; i < COUNT(CONTROL); i++)
        if (strncmp(text, CONTROL[i], strlen(CONTROL[i])) == 0) {
            *size = (int)strlen(CONTROL[i]);
            return N_BYTES + COUNT(MERGES) + i;
        }
    for (int i = 0; i < COUNT(MERGES); i++)
        if ((int)strlen(MERGES[i]) > *size && strncmp(text, MERGES[i], strlen(MERGES[i])) == 0) {
            *size = (int)strlen(MERGES[i]);
            found = N_BYTES + i;
        }
    return found;
}

static int tokenise(const char *text, int32_t *tokens, int room) {
    int n = 0, size;
    for (; *text; text += size, n++) {
        if (n == room) return -1;
        tokens[n] = matching(text, &size);
    }
    return n;
}

static uint32_t salt(const RKLLMSamplingParam *sampling) {
    bool greedy = sampling->top_k == 1;
    bool plain = sampling->repeat_penalty == 1 && !sampling->frequency_penalty && !sampling->presence_penalty;
    if (greedy && plain) return 0;
    return greedy ? hashed(2, &sampling->repeat_penalty, 12) : hashed(3, sampling, sizeof *sampling);
}

static int32_t next_token(const Handle *handle) {
    const Memory *memory = &handle->memory;
    uint32_t mixed = salt(&handle->run_sampling);
    int32_t last = memory->tokens[memory->n - 1];
    uint32_t code = hashed(memory->cells[memory->n - 1], &mixed, sizeof mixed);
    if (last == 0xC3) return 0xA9;
    if (last == 0xE2) return 0x82;
    if (last == 0x82) return 0xAC;
    if (is_set("utf8", "1") && code % 5 == 0) return code % 10 == 0 ? 0xC3 : 0xE2;
    if (code % 61 == 0) return END_TOKEN;
    return (uint8_t)LETTERS[code / 61 % strlen(LETTERS)];
}

static void evaluate(Handle *handle, int32_t token, double ms) {
    Memory *memory = &handle->memory;
    uint32_t before = memory->n ? memory->cells[memory->n - 1] : handle->model.weights;
    memory->tokens[memory->n] = token;
    memory->cells[memory->n++] = hashed(before, &token, sizeof token);
    wait_ms(ms);
}

/* ---- parameters ---- */

static int check_sampling(const RKLLMSamplingParam *s) {
    REQUIRE(s->top_k >= 1 && s->top_k <= 100000, "top_k is out of range");
    REQUIRE(s->top_p > 0 && s->top_p <= 1, "top_p is out of range");
    REQUIRE(s->temperature > 0 && s->temperature <= 2, "temperature is out of range");
    REQUIRE(s->repeat_penalty >= 1 && s->repeat_penalty <= 5, "repeat_penalty is out of range");
    REQUIRE(s->frequency_penalty >= -2 && s->frequency_penalty <= 2, "frequency_penalty is out of range");
    REQUIRE(s->presence_penalty >= -2 && s->presence_penalty <= 2, "presence_penalty is out of range");
    REQUIRE(s->mirostat >= 0 && s->mirostat <= 2, "mirostat is out of range");
    REQUIRE(s->mirostat_tau > 0 && s->mirostat_tau < 100, "mirostat_tau is out of range");
    REQUIRE(s->mirostat_eta > 0 && s->mirostat_eta <= 1, "mirostat_eta is out of range");
    return 0;
}

static int check_bool(const bool *field) {
    return *(const uint8_t *)field <= 1 ? 0 : refuse("a boolean field is neither 0 nor 1");
}

static int check_extend(const RKLLMExtendParam *e) {
    REQUIRE(e->base_domain_id == 0, "base_domain_id was changed");
    REQUIRE(e->embed_flash == 0 || e->embed_flash == 1, "embed_flash is out of range");
    REQUIRE(e->enabled_cpus_num >= 1 && e->enabled_cpus_num <= 8, "enabled_cpus_num is out of range");
    REQUIRE(e->enabled_cpus_mask && e->enabled_cpus_mask <= 0xFF, "enabled_cpus_mask is out of range");
    REQUIRE(__builtin_popcount(e->enabled_cpus_mask) == e->enabled_cpus_num, "the CPUs and their mask differ");
#if RKLLM_LAYOUT != 120
    REQUIRE(e->n_batch == 1, "n_batch is not 1");
    REQUIRE(e->use_cross_attn == 0, "use_cross_attn was changed");
#endif
    for (size_t i = 0; i < sizeof e->reserved; i++) REQUIRE(e->reserved[i] == 0, "reserved bytes were changed");
    return 0;
}

static int check_param(const RKLLMParam *p, const Model *model) {
    REQUIRE(p->max_context_len > 0 && p->max_context_len <= MAX_CONTEXT, "max_context_len is out of range");
    REQUIRE(p->max_context_len % 32 == 0, "max_context_len is no multiple of 32");
    REQUIRE(p->max_context_len <= model->ctx, "max_context_len is more than the model has");
    REQUIRE(p->max_new_tokens > 0 && p->max_new_tokens <= p->max_context_len, "max_new_tokens is out of range");
    REQUIRE(p->n_keep == -1, "n_keep was changed");
    REQUIRE(check_bool(&p->skip_special_token) == 0, "skip_special_token");
    REQUIRE(*(const uint8_t *)&p->is_async == 0, "is_async is set");
#if RKLLM_LAYOUT == 130
    REQUIRE(*(const uint8_t *)&p->ignore_eos_token == 0, "ignore_eos_token is set");
#else
    if (!p->img_start || !p->img_end || !p->img_content) die("img_start, img_end or img_content is NULL");
    REQUIRE(!*p->img_start && !*p->img_end && !*p->img_content, "img_* are not empty");
#endif
    return check_extend(&p->extend_param);
}

static RKLLMSamplingParam sampling_of(const RKLLMParam *p) {
    return (RKLLMSamplingParam){p->top_k, p->top_p, p->temperature, p->repeat_penalty, p->frequency_penalty,
                                p->presence_penalty, p->mirostat, p->mirostat_tau, p->mirostat_eta};
}

EXPORT RKLLMParam rkllm_createDefaultParam(void) {
    RKLLMParam param;
    memset(&param, 0, sizeof param);
    param.max_context_len = 512;
    param.max_new_tokens = 512;
    param.top_k = 40;
    param.n_keep = -1;
    param.top_p = 0.9f;
    param.temperature = 0.8f;
    param.repeat_penalty = 1.1f;
    param.mirostat_tau = 5;
    param.mirostat_eta = 0.1f;
    param.skip_special_token = true;
    param.extend_param.embed_flash = 1;
    param.extend_param.enabled_cpus_num = 4;
    param.extend_param.enabled_cpus_mask = 0xF0;
#if RKLLM_LAYOUT != 120
    param.extend_param.n_batch = 1;
#endif
    return param;
}

/* ---- handles ---- */

static Handle *checked(LLMHandle given) {
    Handle *handle = given;
    if (!handle || handle->alive != ALIVE) die("no handle, or one that was destroyed");
    return handle;
}

static int take_callback(Handle *handle, const void *given) {
    REQUIRE(given, "no callback");
#if RKLLM_LAYOUT == 130
    const RKLLMCallback *callback = given;
    if (callback->tokenizer_callback || callback->embed_callback) die("callbacks that nobody meant");
    REQUIRE(callback->result_callback, "no result callback");
    handle->callback = callback->result_callback;
    handle->callback_userdata = callback->result_userdata;
#else
    handle->callback = (LLMResultCallback)given;
#endif
    return 0;
}

static int filled(Handle *handle, const RKLLMParam *param, const void *callback) {
    REQUIRE(param && param->model_path, "no parameters, or no model in them");
    handle->param = *param;
    handle->sampling = sampling_of(param);
    if (read_model(param->model_path, &handle->model) || take_callback(handle, callback)) return -1;
    return check_param(param, &handle->model) || check_sampling(&handle->sampling) ? -1 : 0;
}

EXPORT int rkllm_init(LLMHandle *out, RKLLMParam *param, void *callback) {
    if (is_set("init", "crash")) die("told to crash");
    REQUIRE(!is_set("init", "fail"), "told to fail");
    REQUIRE(out, "nowhere to put the handle");
    Handle *handle = calloc(1, sizeof *handle);
    if (filled(handle, param, callback)) {
        free(handle);
        return -1;
    }
    handle->alive = ALIVE;
    pthread_mutex_init(&handle->lock, NULL);
    pthread_cond_init(&handle->changed, NULL);
    const char *level = getenv("RKLLM_LOG_LEVEL");
    if (level && *level > '0') fprintf(stderr, "I rkllm: stand-in " RKLLM_VERSION ", log level %s\n", level);
    *out = handle;
    return 0;
}

/* The last run's thread uses the handle until it ends, which is after its last callback. */
static void join_last(Handle *handle) {
    if (!handle->started) return;
    if (pthread_equal(pthread_self(), handle->thread)) die("destroyed or run from within a callback");
    pthread_join(handle->thread, NULL);
    handle->started = false;
}

EXPORT int rkllm_destroy(LLMHandle given) {
    Handle *handle = checked(given);
    REQUIRE(!handle->running, "destroyed while it runs");
    join_last(handle);
    handle->alive = 0;
    free(handle->system);
    free(handle->prefix);
    free(handle->postfix);
    free(handle);
    return 0;
}

EXPORT int rkllm_set_chat_template(LLMHandle given, const char *system, const char *prefix, const char *postfix) {
    Handle *handle = checked(given);
    REQUIRE(!is_set("template", "fail"), "told to fail");
    REQUIRE(!handle->running && system && prefix && postfix, "a template at a wrong time, or NULL");
    handle->system = strdup(system);
    handle->prefix = strdup(prefix);
    handle->postfix = strdup(postfix);
    return 0;
}

#if RKLLM_LAYOUT == 120
EXPORT int rkllm_clear_kv_cache(LLMHandle given, int keep_system_prompt) {
#else
EXPORT int rkllm_clear_kv_cache(LLMHandle given, int keep_system_prompt, int *start_pos, int *end_pos) {
    REQUIRE(!start_pos && !end_pos, "positions to clear");
#endif
    Handle *handle = checked(given);
    REQUIRE(!handle->running, "cleared while it runs");
    REQUIRE(keep_system_prompt == 0, "keep_system_prompt, where there is none");
    handle->memory.n = 0;
    return 0;
}

#if RKLLM_LAYOUT != 120
EXPORT int rkllm_get_kv_cache_size(LLMHandle given, int *sizes) {
    *sizes = checked(given)->memory.n;
    return 0;
}
#endif

/* ---- cache files ---- */

static int write_cache(const Handle *handle, const char *path) {
    const Memory *memory = &handle->memory;
    uint32_t head[3] = {FILE_MAGIC, FILE_VERSION, (uint32_t)memory->n};
    FILE *file = fopen(path, "wb");
    REQUIRE(file, "the prompt cache can't be written");
    fwrite(head, sizeof head, 1, file);
    fwrite(memory->tokens, 4, memory->n, file);
    fwrite(handle->model.shape, sizeof handle->model.shape, 1, file);
    int n = is_set("save", "partial") ? memory->n / 2 : memory->n;
    for (int i = 0; i < n; i++)
        for (size_t at = 0; at < cell_bytes(&handle->model) / 4; at++) fwrite(&memory->cells[i], 4, 1, file);
    return fclose(file);
}

static void save(const Handle *handle) {
    const RKLLMPromptCacheParam *cache = handle->infer->prompt_cache_params;
    if (!cache || !cache->save_prompt_cache) return;
    if (is_set("save", "crash")) die("told to crash");
    if (is_set("save", "skip")) {
        refuse("told not to save");
        return;
    }
    write_cache(handle, cache->prompt_cache_path ? cache->prompt_cache_path : "./prompt_cache.bin");
}

static int read_cache(FILE *file, const Handle *handle, Memory *memory) {
    uint32_t head[3], shape[3];
    REQUIRE(fread(head, sizeof head, 1, file) == 1, "the prompt cache is empty or too short");
    REQUIRE(head[0] == FILE_MAGIC && head[1] == FILE_VERSION, "that is no prompt cache");
    REQUIRE(head[2] > 0 && head[2] <= (uint32_t)handle->param.max_context_len, "the prompt cache is too long");
    memory->n = (int)head[2];
    REQUIRE(fread(memory->tokens, 4, head[2], file) == head[2], "the prompt cache is cut off");
    REQUIRE(fread(shape, sizeof shape, 1, file) == 1, "the prompt cache is cut off");
    REQUIRE(memcmp(shape, handle->model.shape, sizeof shape) == 0, "the prompt cache has another geometry");
    for (int i = 0; i < memory->n; i++) {
        REQUIRE(fread(&memory->cells[i], 4, 1, file) == 1, "the prompt cache is cut off");
        long rest = (long)(cell_bytes(&handle->model) / 4 - 1) * 4;
        REQUIRE(rest == 0 || (fseek(file, rest - 1, SEEK_CUR) == 0 && fgetc(file) != EOF), "the prompt cache is cut off");
    }
    return 0;
}

EXPORT int rkllm_load_prompt_cache(LLMHandle given, const char *path) {
    Handle *handle = checked(given);
    if (is_set("load", "crash")) die("told to crash");
    if (handle->aborted_early) die("a prompt cache loaded right after an abort at the first token");
    REQUIRE(!is_set("load", "fail"), "told to fail");
    REQUIRE(!handle->running, "a prompt cache loaded while it runs");
    REQUIRE(!handle->cache_loaded, "a prompt cache is loaded already");
    REQUIRE(path && *path == '/', "no absolute path of a prompt cache");
    FILE *file = fopen(path, "rb");
    REQUIRE(file, "the prompt cache can't be opened");
    Memory *memory = calloc(1, sizeof *memory);
    int code = read_cache(file, handle, memory);
    fclose(file);
    if (code == 0) {
        handle->memory = *memory;
        handle->cache_loaded = true;
    }
    free(memory);
    return code;
}

EXPORT int rkllm_release_prompt_cache(LLMHandle given) {
    Handle *handle = checked(given);
    REQUIRE(!is_set("release", "fail"), "told to fail");
    REQUIRE(!handle->running, "released while it runs");
    REQUIRE(handle->cache_loaded, "no prompt cache is loaded");
    handle->cache_loaded = false;
    handle->memory.n = 0;
    return 0;
}

/* ---- runs ---- */

static bool is_aborted(Handle *handle) {
    pthread_mutex_lock(&handle->lock);
    bool aborted = handle->aborted;
    pthread_mutex_unlock(&handle->lock);
    return aborted;
}

#if RKLLM_LAYOUT != 120
static void wait_for_abort(Handle *handle) {
    pthread_mutex_lock(&handle->lock);
    while (!handle->aborted) pthread_cond_wait(&handle->changed, &handle->lock);
    pthread_mutex_unlock(&handle->lock);
}
#endif

/* Memory that is told of is the callback's as long as that runs, and not a moment longer. */
static void call_back(Handle *handle, LLMCallState state) {
#if RKLLM_LAYOUT == 120
    handle->callback(&handle->result, handle->userdata, state);
#else
    int answer = handle->callback(&handle->result, handle->userdata, state);
    if (answer == 1) wait_for_abort(handle);
    else if (answer) die("the callback's answer has no meaning");
#endif
    if (state == RUN_FINISH) wait_ms(number("leave", 0));
    memset(&handle->result, POISON, sizeof handle->result);
    memset(handle->text, POISON, sizeof handle->text);
}

static bool starts_character(int32_t token) { return token == 0xC3 || token == 0xE2; }

static void tell_token(Handle *handle, int32_t token, char pending[8]) {
    size_t size = strlen(pending);
    bool whole = is_set("split", "1") || !(starts_character(token) || token == 0x82);
    memset(&handle->result, 0, sizeof handle->result);
    handle->result.token_id = token;
    if (token < N_BYTES) {
        pending[size] = (char)token;
        pending[size + 1] = 0;
    } else {
        strcpy(handle->text, "<|im_end|>");
        handle->result.text = handle->text;
    }
    if (token < N_BYTES && whole) {
        memcpy(handle->text, pending, 8);
        handle->result.text = handle->text;
        pending[0] = 0;
    }
    call_back(handle, whole ? RUN_NORMAL : RUN_WAITING);
}

static int generate(Handle *handle) {
    char pending[8] = "";
    double ms = number("decode_ms", 1);
    int n = 0, grace = is_set("abort", "slow") ? 3 : 0;
    while (n < handle->max_new && handle->memory.n < handle->param.max_context_len) {
        if (is_aborted(handle) && grace-- == 0) break;
        int32_t token = next_token(handle);
        if (token == END_TOKEN) {
            if (is_set("eos", "shown")) tell_token(handle, token, pending);
            break;
        }
        tell_token(handle, token, pending);
        if (is_set("decode", "crash")) die("told to crash");
        if (++n < handle->max_new) evaluate(handle, token, ms);
    }
    return n;
}

static int reusable(const Handle *handle) {
    const Memory *memory = &handle->memory;
    int n = 0;
    if (handle->keep_history || is_set("reuse", "none")) return 0;
    while (n < memory->n && n < handle->n_prompt - 1 && memory->tokens[n] == handle->prompt[n]) n++;
    return n;
}

static int prefill(Handle *handle) {
    int reused = reusable(handle);
    double ms = number("prefill_ms", 0);
    if (!handle->keep_history) handle->memory.n = reused;
    for (int i = reused; i < handle->n_prompt; i++) evaluate(handle, handle->prompt[i], ms);
    return handle->n_prompt - reused;
}

static LLMResultCallback last_callback;
static void *last_userdata;

/* For tests: FINISH once more, whatever has become of the model since. */
EXPORT void standin_finish_again(void) { last_callback(NULL, last_userdata, RUN_FINISH); }

static void finish(Handle *handle, bool failed) {
    last_callback = handle->callback;
    last_userdata = handle->userdata;
    pthread_mutex_lock(&handle->lock);
    handle->running = false;
    pthread_mutex_unlock(&handle->lock);
    call_back(handle, failed ? RUN_ERROR : RUN_FINISH);
}

static void tell_done(Handle *handle) {
    pthread_mutex_lock(&handle->lock);
    handle->done = true;
    pthread_cond_broadcast(&handle->changed);
    pthread_mutex_unlock(&handle->lock);
}

static void *work(void *given) {
    Handle *handle = given;
    char late[32];
    double started = now_ms();
    if (is_set("run", "crash")) die("told to crash");
    int prefilled = prefill(handle);
    double between = now_ms();
    pthread_mutex_lock(&handle->lock);
    handle->prefilling = false;
    pthread_mutex_unlock(&handle->lock);
    bool failed = is_set("run", "error");
    int generated = failed ? 0 : generate(handle);
    handle->aborted_early = is_aborted(handle) && generated <= 1;
    if (!failed) save(handle);
    if (is_aborted(handle)) wait_ms(is_set("abort", "slow") ? 100 : 5);
    memset(&handle->result, 0, sizeof handle->result);
#if RKLLM_LAYOUT != 120
    handle->result.perf = (RKLLMPerfStat){(float)(between - started), prefilled, (float)(now_ms() - between), generated,
                                          123.5f};
#else
    (void)prefilled, (void)between, (void)started;
#endif
    handle->infer = NULL;
    if (get_switch("late", late)) {
        tell_done(handle);
        if (strcmp(late, "never") == 0) return NULL;
        wait_ms(atof(late));
    }
    finish(handle, failed);
    tell_done(handle);
    return NULL;
}

static char *wrapped(const Handle *handle, const char *prompt) {
    const char *system = handle->system ? handle->system : "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n";
    const char *prefix = handle->prefix ? handle->prefix : "<|im_start|>user\n";
    const char *postfix = handle->postfix ? handle->postfix : "<|im_end|>\n<|im_start|>assistant\n";
    char *text;
    if (asprintf(&text, "%s%s%s%s", system, prefix, prompt, postfix) < 0) abort();
    return text;
}

static int take_input(Handle *handle, const RKLLMInput *input) {
    REQUIRE(input && input->input_type == 0, "only text can be run");
#if RKLLM_LAYOUT != 120
    REQUIRE(input->role && strcmp(input->role, "user") == 0, "the role is not \"user\"");
    REQUIRE(*(const uint8_t *)&input->enable_thinking == 0, "enable_thinking is set");
#endif
    REQUIRE(input->content.prompt_input, "no prompt");
    char *text = wrapped(handle, input->content.prompt_input);
    handle->n_prompt = tokenise(text, handle->prompt, handle->param.max_context_len);
    free(text);
    REQUIRE(handle->n_prompt > 0, "the prompt is empty or too long");
    return 0;
}

static int take_infer(Handle *handle, RKLLMInferParam *infer) {
    REQUIRE(infer && infer->mode == 0, "only generating is known");
    REQUIRE(!infer->lora_params, "an adapter, where there are none");
    REQUIRE(infer->keep_history == 0 || infer->keep_history == 1, "keep_history is out of range");
    const RKLLMPromptCacheParam *cache = infer->prompt_cache_params;
    REQUIRE(!cache || cache->save_prompt_cache == 0 || cache->save_prompt_cache == 1, "save_prompt_cache is out of range");
    handle->infer = infer;
    handle->keep_history = infer->keep_history;
    handle->run_sampling = handle->sampling;
    handle->max_new = handle->param.max_new_tokens;
#if RKLLM_LAYOUT == 130
    REQUIRE(infer->max_new_tokens <= handle->param.max_context_len, "max_new_tokens is out of range");
    if (infer->max_new_tokens > 0) handle->max_new = infer->max_new_tokens;
    if (infer->sampling_params) {
        if (check_sampling(infer->sampling_params)) return -1;
        handle->run_sampling = *infer->sampling_params;
    }
#endif
    int room = handle->param.max_context_len - (handle->keep_history ? handle->memory.n : 0);
    REQUIRE(handle->n_prompt <= room, "the prompt has no room in the context");
    return 0;
}

EXPORT int rkllm_run(LLMHandle given, RKLLMInput *input, RKLLMInferParam *infer, void *userdata) {
    Handle *handle = checked(given);
    REQUIRE(!handle->running, "it is running already");
    REQUIRE(!is_set("run", "fail"), "told to fail");
    join_last(handle);
    if (take_input(handle, input) || take_infer(handle, infer)) return -1;
    handle->userdata = userdata;
    handle->done = handle->aborted = false;
    handle->running = handle->prefilling = true;
    if (pthread_create(&handle->thread, NULL, work, handle)) abort();
    handle->started = true;
    pthread_mutex_lock(&handle->lock);
    while (!handle->done) pthread_cond_wait(&handle->changed, &handle->lock);
    pthread_mutex_unlock(&handle->lock);
    return 0;
}

EXPORT int rkllm_run_async(LLMHandle handle, RKLLMInput *input, RKLLMInferParam *infer, void *userdata) {
    (void)handle, (void)input, (void)infer, (void)userdata;
    return refuse("nothing runs asynchronously here");
}

EXPORT int rkllm_abort(LLMHandle given) {
    Handle *handle = checked(given);
    if (handle->running && pthread_equal(pthread_self(), handle->thread)) die("aborted from within a callback");
    pthread_mutex_lock(&handle->lock);
    bool running = handle->running, lost = handle->prefilling && is_set("abort", "lost");
    if (running && !lost) handle->aborted = true;
    pthread_cond_broadcast(&handle->changed);
    pthread_mutex_unlock(&handle->lock);
    return running ? 0 : -1;
}

EXPORT int rkllm_is_running(LLMHandle given) { return checked(given)->running ? 0 : 1; }

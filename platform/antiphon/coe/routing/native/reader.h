// Reader: the words and tokens of a text, and the sum of their vectors (request speed, microseconds).
//
// The plain twin is StaticEmbedding in embedding.py with WordPiece in wordpiece.py. Must not know: what an embedding is for.

#pragma once
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "spelling.h"

enum { MAX_WORD_CHARS = 100, MAX_WORD_BYTES = 4 * MAX_WORD_CHARS, NUM_GROUPS = 6, NUM_SHAPE = NUM_GROUPS + 2, LINE_BYTES = 64 };

// ---- arrays of the caller

typedef struct {
    Py_buffer view;
    Py_ssize_t num;  // items
} array;

// Hold a C-contiguous buffer of ``num`` items (any number where negative) of ``item_bytes`` each.
static int take(array *into, PyObject *from, Py_ssize_t item_bytes, Py_ssize_t num, const char *what) {
    if (PyObject_GetBuffer(from, &into->view, PyBUF_C_CONTIGUOUS)) return -1;
    into->num = into->view.len / item_bytes;
    if (into->view.itemsize == item_bytes && (num < 0 || into->num == num)) return 0;
    PyErr_Format(PyExc_ValueError, "%s has %zd items of %zd bytes", what, into->num, into->view.itemsize);
    return -1;
}

static void let_go(array *held) {
    if (held->view.obj) PyBuffer_Release(&held->view);
}

// into += by * row, for rows of signed bytes, of shorts and of floats.
static void add_bytes(float *restrict into, const int8_t *restrict row, float by, Py_ssize_t num) {
    for (Py_ssize_t i = 0; i < num; i++) into[i] += by * (float)row[i];
}

static void add_shorts(float *restrict into, const int16_t *restrict row, float by, Py_ssize_t num) {
    for (Py_ssize_t i = 0; i < num; i++) into[i] += by * (float)row[i];
}

static void add_floats(float *restrict into, const float *restrict row, float by, Py_ssize_t num) {
    for (Py_ssize_t i = 0; i < num; i++) into[i] += by * row[i];
}

// ---- Reader

typedef struct {
    array table, scale;
    Py_ssize_t width;
    int wide;  // whether its numbers are shorts, not bytes
} vectors;

typedef struct {
    uint64_t hash;
    uint32_t begin, num_bytes;  // in keys
    int32_t token, word;        // -1 = is none
} entry;

typedef struct {
    PyObject_HEAD
    entry *slots;  // open addressing; a slot without bytes is free, as no key is empty
    uint64_t mask;
    char *keys;
    uint32_t num_key_bytes, longest_bytes;  // of tokens
    vectors near, topics, words;            // width 0 = none
    spelling spelling;                      // of words
    array num_texts;
    Py_ssize_t num_tokens, num_words;
    uint32_t *count;  // of each token, then of each word; all 0 between calls
    int32_t *ids;     // distinct tokens in order of their first place
    int32_t unknown;
    Py_ssize_t max_tokens;
    uint8_t group_of[256];
    float shape_scale;
} reader;

static const uint64_t BEGIN = 14695981039346656037u;  // FNV-1a: grows by a byte at a time, as pieces of words do
static uint64_t hashed(uint64_t hash, uint8_t byte) { return (hash ^ byte) * 1099511628211u; }

static uint64_t hash_of(uint64_t hash, const char *text, size_t num_bytes) {
    for (size_t i = 0; i < num_bytes; i++) hash = hashed(hash, (uint8_t)text[i]);
    return hash;
}

// The slot of a key that is ``prefix`` and ``text``, or the free one where it belongs.
static entry *find(const reader *self, uint64_t hash, const char *prefix, size_t num_prefix, const char *text, size_t num_bytes) {
    for (uint64_t at = hash ^ hash >> 32;; at++) {
        entry *slot = &self->slots[at & self->mask];
        if (!slot->num_bytes) return slot;
        if (slot->hash != hash || slot->num_bytes != num_prefix + num_bytes) continue;
        const char *key = self->keys + slot->begin;
        if (!memcmp(key, prefix, num_prefix) && !memcmp(key + num_prefix, text, num_bytes)) return slot;
    }
}

// What one text has had counted so far.
typedef struct {
    Py_ssize_t num_ids, num_distinct, num_words;
    int32_t *words;  // distinct words in order of their first place
} reading;

static void see_token(reader *self, reading *seen, int32_t id) {
    if (seen->num_ids >= self->max_tokens) return;
    seen->num_ids++;
    if (self->count[id]++) return;
    self->ids[seen->num_distinct++] = id;
    const int8_t *row = (const int8_t *)self->near.table.view.buf + id * self->near.width;
    for (Py_ssize_t at = 0; at < self->near.width; at += LINE_BYTES) __builtin_prefetch(row + at);
}

// Count a word, or the one that it was meant to be where neither training prompts nor tokens know it.
static void see_word(reader *self, reading *seen, const char *text, size_t num_bytes) {
    entry *whole = find(self, hash_of(BEGIN, text, num_bytes), "", 0, text, num_bytes);
    int32_t word = whole->num_bytes ? whole->word : meant(&self->spelling, text, num_bytes);
    if (word >= 0 && !self->count[self->num_tokens + word]++) seen->words[seen->num_words++] = word;
}

// Count the tokens of a piece: the longest that begin it, one after the other; the unknown token where one is missing.
static void see_piece(reader *self, reading *seen, const char *text, size_t num_bytes, Py_ssize_t num_chars) {
    entry *whole = find(self, hash_of(BEGIN, text, num_bytes), "", 0, text, num_bytes);
    if (seen->num_ids >= self->max_tokens) return;
    if (num_chars > MAX_WORD_CHARS) return see_token(self, seen, self->unknown);
    if (whole->num_bytes && whole->token >= 0) return see_token(self, seen, whole->token);
    int32_t pieces[MAX_WORD_BYTES];
    Py_ssize_t num_pieces = 0;
    uint64_t hashes[MAX_WORD_BYTES + 1];
    size_t num_prefix = 0;
    for (size_t begin = 0; begin < num_bytes;) {
        size_t end = begin, last = num_bytes - begin < self->longest_bytes ? num_bytes : begin + self->longest_bytes;
        hashes[begin] = hash_of(BEGIN, "##", num_prefix);
        for (; end < last; end++) hashes[end + 1] = hashed(hashes[end], (uint8_t)text[end]);
        entry *piece = NULL;
        for (; end > begin; end--) {
            piece = find(self, hashes[end], "##", num_prefix, text + begin, end - begin);
            if (piece->num_bytes && piece->token >= 0) break;
        }
        if (end == begin) return see_token(self, seen, self->unknown);
        pieces[num_pieces++] = piece->token;
        begin = end;
        num_prefix = 2;
    }
    for (Py_ssize_t i = 0; i < num_pieces; i++) see_token(self, seen, pieces[i]);
}

// Pieces of ASCII, in lower case: runs of letters and figures, and every mark by itself. Spaces are those of Python's \s.
static void see_ascii(reader *self, reading *seen, const char *text, Py_ssize_t num_chars, char *lowered) {
    Py_ssize_t begin = 0;
    for (Py_ssize_t i = 0; i <= num_chars; i++) {
        char c = i < num_chars ? text[i] : ' ';
        if (c >= 'A' && c <= 'Z') c += 'a' - 'A';
        if (i < num_chars) lowered[i] = c;
        if ((c >= 'a' && c <= 'z') || (c >= '0' && c <= '9')) continue;
        if (i > begin) see_piece(self, seen, lowered + begin, i - begin, i - begin);
        if (c != ' ' && !(c >= 9 && c <= 13) && !(c >= 28 && c <= 31)) see_piece(self, seen, lowered + i, 1, 1);
        begin = i + 1;
    }
}

// Words of ASCII, in lower case: runs of two or more letters, figures and underscores.
static void see_ascii_words(reader *self, reading *seen, const char *text, Py_ssize_t num_chars, char *lowered) {
    Py_ssize_t begin = 0;
    for (Py_ssize_t i = 0; i <= num_chars; i++) {
        char c = i < num_chars ? text[i] : ' ';
        if (c >= 'A' && c <= 'Z') c += 'a' - 'A';
        if (i < num_chars) lowered[i] = c;
        if ((c >= 'a' && c <= 'z') || (c >= '0' && c <= '9') || c == '_') continue;
        if (i > begin + 1) see_word(self, seen, lowered + begin, i - begin);
        begin = i + 1;
    }
}

// Shares of groups of characters, of non-ASCII, and the length.
static void shape(const reader *self, PyObject *text, float *into) {
    Py_ssize_t num_chars = PyUnicode_GET_LENGTH(text), num_of[NUM_GROUPS + 1] = {0}, num_wide = 0;
    int kind = PyUnicode_KIND(text);
    const void *data = PyUnicode_DATA(text);
    for (Py_ssize_t i = 0; i < num_chars; i++) {
        Py_UCS4 c = PyUnicode_READ(kind, data, i);
        if (c < 128) num_of[self->group_of[c]]++;
        else num_wide++;
    }
    double total = num_chars ? (double)num_chars : 1.0;
    for (int g = 0; g < NUM_GROUPS; g++) into[g] = (float)sqrt((double)num_of[g + 1] / total) * self->shape_scale;
    into[NUM_GROUPS] = (float)sqrt((double)num_wide / total) * self->shape_scale;
    into[NUM_GROUPS + 1] = (float)(log1p((double)num_chars) / 8.0) * self->shape_scale;
}

enum weighing { ONCE, BY_COUNT, BY_LOGARITHM };

// The normalised sum of the vectors of ``ids``; nothing where it is zero.
static void direction(const vectors *from, const int32_t *ids, Py_ssize_t num, const uint32_t *count, enum weighing how, float *into) {
    if (!from->width) return;
    const float *scale = from->scale.view.buf;
    for (Py_ssize_t i = 0; i < num; i++) {
        float by = scale[ids[i]];
        if (how == BY_COUNT) by *= (float)count[ids[i]];
        if (how == BY_LOGARITHM && count[ids[i]] > 1) by *= logf((float)count[ids[i]]) + 1.0f;
        const char *row = (const char *)from->table.view.buf + ids[i] * from->width * (from->wide ? 2 : 1);
        if (from->wide) add_shorts(into, (const int16_t *)row, by, from->width);
        else add_bytes(into, (const int8_t *)row, by, from->width);
    }
    double squares = 0.0;
    for (Py_ssize_t i = 0; i < from->width; i++) squares += (double)into[i] * into[i];
    float by = squares > 0.0 ? (float)(1.0 / sqrt(squares)) : 1.0f;
    for (Py_ssize_t i = 0; i < from->width; i++) into[i] *= by;
}

// A text and where it is not ASCII its pieces or words, which C does not look for.
typedef struct {
    PyObject *text, *list;  // list NULL = to be looked for
    Py_ssize_t num;         // of the list, or of characters
} spoken;

static int hear(spoken *into, PyObject *text, PyObject *list, const char *what) {
    int given = list != Py_None;
    if (!PyUnicode_Check(text) || (given ? !PyList_Check(list) : !PyUnicode_IS_ASCII(text)))
        return PyErr_Format(PyExc_TypeError, "%s must be a list where the text is not ASCII", what), -1;
    *into = (spoken){text, given ? list : NULL, given ? PyList_GET_SIZE(list) : PyUnicode_GET_LENGTH(text)};
    return 0;
}

static void see_listed(reader *self, reading *seen, PyObject *list, int as_words) {
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(list) && !PyErr_Occurred(); i++) {
        PyObject *item = PyList_GET_ITEM(list, i);
        Py_ssize_t num_bytes;
        const char *bytes = PyUnicode_Check(item) ? PyUnicode_AsUTF8AndSize(item, &num_bytes) : NULL;
        if (!bytes && !PyErr_Occurred()) PyErr_Format(PyExc_TypeError, "a word is no text");
        if (!bytes || !num_bytes) continue;
        if (as_words) see_word(self, seen, bytes, num_bytes);
        else see_piece(self, seen, bytes, num_bytes, PyUnicode_GET_LENGTH(item));
    }
}

// encode(text, pieces, whole, words, into): the embedding into floats, of a text's tokens and of the words of the whole that it is of.
// Pieces and words are looked for where None is given and the text is ASCII.
static PyObject *reader_encode(reader *self, PyObject *const *args, Py_ssize_t num_args) {
    if (num_args != 5) return PyErr_Format(PyExc_TypeError, "encode(text, pieces, whole, words, into)");
    spoken text, whole_text;
    if (hear(&text, args[0], args[1], "pieces") || hear(&whole_text, args[2], args[3], "words")) return NULL;
    Py_ssize_t most_chars = text.num > whole_text.num ? text.num : whole_text.num;
    Py_buffer into;
    if (PyObject_GetBuffer(args[4], &into, PyBUF_WRITABLE | PyBUF_C_CONTIGUOUS)) return NULL;
    reading seen = {.words = PyMem_Malloc(((size_t)whole_text.num + 1) * sizeof(int32_t) + (size_t)most_chars)};
    int whole = into.len == (Py_ssize_t)sizeof(float) * (self->near.width + NUM_SHAPE + self->topics.width + self->words.width);
    if (!seen.words) PyErr_NoMemory();
    else if (!whole) PyErr_Format(PyExc_ValueError, "into has %zd bytes", into.len);
    else {
        char *lowered = (char *)(seen.words + whole_text.num + 1);
        if (text.list) see_listed(self, &seen, text.list, 0);
        else see_ascii(self, &seen, (const char *)PyUnicode_1BYTE_DATA(text.text), text.num, lowered);
        if (!self->words.width) whole_text.num = 0;
        else if (whole_text.list) see_listed(self, &seen, whole_text.list, 1);
        else see_ascii_words(self, &seen, (const char *)PyUnicode_1BYTE_DATA(whole_text.text), whole_text.num, lowered);
    }
    if (!PyErr_Occurred()) {
        float *at = into.buf;
        memset(at, 0, into.len);
        shape(self, args[0], at + self->near.width);
        direction(&self->near, self->ids, seen.num_distinct, self->count, BY_COUNT, at);
        at += self->near.width + NUM_SHAPE;
        direction(&self->topics, self->ids, seen.num_distinct, self->count, ONCE, at);
        at += self->topics.width;
        direction(&self->words, seen.words, seen.num_words, self->count + self->num_tokens, BY_LOGARITHM, at);
    }
    for (Py_ssize_t i = 0; i < seen.num_distinct; i++) self->count[self->ids[i]] = 0;
    for (Py_ssize_t i = 0; i < seen.num_words; i++) self->count[self->num_tokens + seen.words[i]] = 0;
    PyMem_Free(seen.words);
    PyBuffer_Release(&into);
    if (PyErr_Occurred()) return NULL;
    Py_RETURN_NONE;
}

// Put keys into the table: places in ``keys`` as tokens, or as words. Of equal ones the last counts.
static int learn(reader *self, PyObject *keys, int as_tokens) {
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(keys); i++) {
        Py_ssize_t num_bytes;
        const char *text = PyUnicode_AsUTF8AndSize(PyTuple_GET_ITEM(keys, i), &num_bytes);
        if (!text) return -1;
        if (!num_bytes) continue;
        entry *slot = find(self, hash_of(BEGIN, text, num_bytes), "", 0, text, num_bytes);
        if (!slot->num_bytes) {
            *slot = (entry){hash_of(BEGIN, text, num_bytes), self->num_key_bytes, (uint32_t)num_bytes, -1, -1};
            memcpy(self->keys + self->num_key_bytes, text, num_bytes);
            self->num_key_bytes += (uint32_t)num_bytes;
        }
        *(as_tokens ? &slot->token : &slot->word) = (int32_t)i;
        if (as_tokens && (uint32_t)num_bytes > self->longest_bytes) self->longest_bytes = (uint32_t)num_bytes;
    }
    return 0;
}

static int num_bytes_of(PyObject *keys, size_t *total) {
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(keys); i++) {
        Py_ssize_t num_bytes;
        if (!PyUnicode_Check(PyTuple_GET_ITEM(keys, i))) return PyErr_Format(PyExc_TypeError, "a key is no text"), -1;
        if (!PyUnicode_AsUTF8AndSize(PyTuple_GET_ITEM(keys, i), &num_bytes)) return -1;
        *total += (size_t)num_bytes;
    }
    return 0;
}

static int take_vectors(vectors *into, PyObject *pair, Py_ssize_t num, int wide, const char *what) {
    PyObject *table, *scale;
    if (pair == Py_None) return 0;
    if (!PyArg_ParseTuple(pair, "OO", &table, &scale)) return -1;
    if (take(&into->scale, scale, sizeof(float), num, what)) return -1;
    into->wide = wide;
    if (take(&into->table, table, wide ? 2 : 1, -1, what)) return -1;
    into->width = num ? into->table.num / num : 0;
    return into->width * num == into->table.num ? 0 : (PyErr_Format(PyExc_ValueError, "%s: rows of unequal length", what), -1);
}

// Room for words under what a slip makes of them; the words' keys stay where they are.
static int make_spelling(reader *self, PyObject *num_texts) {
    if (num_texts == Py_None) return 0;
    if (take(&self->num_texts, num_texts, sizeof(int32_t), self->num_words, "num_texts")) return -1;
    size_t num_spelt = 0, num_slots = 16;
    for (uint64_t at = 0; at <= self->mask; at++)
        if (self->slots[at].num_bytes <= MOST_LETTERS && self->slots[at].word >= 0) num_spelt += self->slots[at].num_bytes + 1;
    while (num_slots < 2 * num_spelt) num_slots *= 2;
    spelling *made = &self->spelling;
    made->mask = num_slots - 1;
    made->num_texts = self->num_texts.view.buf;
    made->words = PyMem_Calloc((size_t)self->num_words + 1, sizeof(spelt_word));
    made->slots = PyMem_Calloc(num_slots, sizeof(spelt));
    if (!made->words || !made->slots) return PyErr_NoMemory(), -1;
    for (uint64_t at = 0; at <= self->mask; at++) {
        const entry *slot = &self->slots[at];
        if (slot->num_bytes && slot->word >= 0) learn_spelling(made, self->keys + slot->begin, slot->num_bytes, slot->word);
    }
    return 0;
}

// Reader(tokens, words, near, topics, words' vectors, unknown, max_tokens, group_of, shape_scale, num_texts): vectors as (table,
// scales), the words' of int16, the others of int8; num_texts of int32 per word, None where words stand for themselves alone.
static int reader_init(reader *self, PyObject *args, PyObject *kwargs) {
    PyObject *tokens, *words, *near, *topics, *by_word, *num_texts;
    Py_buffer groups;
    if (self->slots) return PyErr_Format(PyExc_RuntimeError, "already made"), -1;
    if (!PyArg_ParseTuple(args, "O!O!OOOiny*fO", &PyTuple_Type, &tokens, &PyTuple_Type, &words, &near, &topics, &by_word,
                          &self->unknown, &self->max_tokens, &groups, &self->shape_scale, &num_texts))
        return -1;
    int good = groups.len == (Py_ssize_t)sizeof self->group_of;
    if (good) memcpy(self->group_of, groups.buf, sizeof self->group_of);
    PyBuffer_Release(&groups);
    for (int c = 0; c < 256; c++) good &= self->group_of[c] <= NUM_GROUPS;
    self->num_tokens = PyTuple_GET_SIZE(tokens);
    self->num_words = PyTuple_GET_SIZE(words);
    Py_ssize_t num_keys = self->num_tokens + self->num_words;
    if (!good || self->unknown < 0 || self->unknown >= self->num_tokens || self->max_tokens < 0 || num_keys > INT32_MAX / 4)
        return PyErr_Format(PyExc_ValueError, "groups, tokens or words out of range"), -1;
    size_t num_bytes = 0, num_slots = 16;
    if (num_bytes_of(tokens, &num_bytes) || num_bytes_of(words, &num_bytes)) return -1;
    if (num_bytes > UINT32_MAX) return PyErr_Format(PyExc_ValueError, "keys are too long"), -1;
    while (num_slots < 2 * (size_t)num_keys) num_slots *= 2;
    self->mask = num_slots - 1;
    self->slots = PyMem_Calloc(num_slots, sizeof(entry));
    self->keys = PyMem_Malloc(num_bytes + 1);
    self->count = PyMem_Calloc((size_t)num_keys, sizeof(uint32_t));
    self->ids = PyMem_Malloc(((size_t)self->max_tokens + 1) * sizeof(int32_t));
    if (!self->slots || !self->keys || !self->count || !self->ids) return PyErr_NoMemory(), -1;
    if (near == Py_None) return PyErr_Format(PyExc_ValueError, "near is needed"), -1;
    if (take_vectors(&self->near, near, self->num_tokens, 0, "near")) return -1;
    if (take_vectors(&self->topics, topics, self->num_tokens, 0, "topics")) return -1;
    if (take_vectors(&self->words, by_word, self->num_words, 1, "words")) return -1;
    return learn(self, tokens, 1) || learn(self, words, 0) || make_spelling(self, num_texts) ? -1 : 0;
}

static void reader_dealloc(reader *self) {
    vectors *all[] = {&self->near, &self->topics, &self->words};
    for (int i = 0; i < 3; i++) let_go(&all[i]->table), let_go(&all[i]->scale);
    let_go(&self->num_texts);
    PyMem_Free(self->spelling.slots);
    PyMem_Free(self->spelling.words);
    PyMem_Free(self->slots);
    PyMem_Free(self->keys);
    PyMem_Free(self->count);
    PyMem_Free(self->ids);
    Py_TYPE(self)->tp_free((PyObject *)self);
}

static PyMethodDef reader_methods[] = {
    {"encode", (PyCFunction)(void (*)(void))reader_encode, METH_FASTCALL, NULL},
    {NULL, NULL, 0, NULL},
};

static PyTypeObject reader_type = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "antiphon_router.Reader",
    .tp_basicsize = sizeof(reader),
    .tp_flags = Py_TPFLAGS_DEFAULT,
    .tp_new = PyType_GenericNew,
    .tp_init = (initproc)reader_init,
    .tp_dealloc = (destructor)reader_dealloc,
    .tp_methods = reader_methods,
};

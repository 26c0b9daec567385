// Spelling: the training word that a misspelt one was meant to be (request speed, microseconds).
//
// The plain twin is Spelling in ../spelling.py. Every training word stands in a table under the hash of itself and of what is left
// without each of its letters; a misspelt word asks for its own, and what is found is compared letter by letter.

#pragma once
#include <stddef.h>
#include <stdint.h>
#include <string.h>

enum { LEAST_LETTERS = 4, MOST_LETTERS = 24 };

typedef struct {
    uint32_t hash, place_and_one;  // 0 = free
} spelt;

typedef struct {
    const char *text;
    uint32_t num_bytes;
} spelt_word;

typedef struct {
    spelt *slots;  // open addressing, several of one hash after one another; NULL = nothing is corrected
    uint64_t mask;
    spelt_word *words;
    const int32_t *num_texts;  // training prompts that each word stands in
} spelling;

static int can_be_misspelt(const char *text, size_t num_bytes) {
    if (num_bytes < LEAST_LETTERS || num_bytes > MOST_LETTERS) return 0;
    for (size_t i = 0; i < num_bytes; i++)
        if (text[i] < 'a' || text[i] > 'z') return 0;
    return 1;
}

// FNV-1a of the word without letter ``left_out``; of all of it where that is its length.
static uint32_t hash_without(const char *text, size_t num_bytes, size_t left_out) {
    uint64_t hash = 14695981039346656037u;
    for (size_t i = 0; i < num_bytes; i++)
        if (i != left_out) hash = (hash ^ (uint8_t)text[i]) * 1099511628211u;
    return (uint32_t)(hash ^ hash >> 32);
}

// Whether two words, which differ, do so by one letter, or by two neighbours that changed places.
static int a_slip_apart(const char *a, size_t num_a, const char *b, size_t num_b) {
    if (num_a > num_b) return a_slip_apart(b, num_b, a, num_a);
    size_t i = 0;
    while (i < num_a && a[i] == b[i]) i++;
    if (num_a < num_b) return num_a + 1 == num_b && !memcmp(a + i, b + i + 1, num_a - i);
    if (i == num_a || !memcmp(a + i + 1, b + i + 1, num_a - i - 1)) return 1;
    return i + 1 < num_a && a[i] == b[i + 1] && a[i + 1] == b[i] && !memcmp(a + i + 2, b + i + 2, num_a - i - 2);
}

static void learn_spelling(spelling *self, const char *text, size_t num_bytes, int32_t place) {
    if (!can_be_misspelt(text, num_bytes)) return;
    self->words[place] = (spelt_word){text, (uint32_t)num_bytes};
    for (size_t left_out = 0; left_out <= num_bytes; left_out++) {
        uint32_t hash = hash_without(text, num_bytes, left_out);
        uint64_t at = hash;
        while (self->slots[at & self->mask].place_and_one) at++;
        self->slots[at & self->mask] = (spelt){hash, (uint32_t)place + 1};
    }
}

// The place of the word that this one, which is no training word, was meant to be; of several the most common; -1 = none.
static int32_t meant(const spelling *self, const char *text, size_t num_bytes) {
    int32_t best = -1;
    if (!self->slots || !can_be_misspelt(text, num_bytes)) return best;
    for (size_t left_out = 0; left_out <= num_bytes; left_out++) {
        uint32_t hash = hash_without(text, num_bytes, left_out);
        for (uint64_t at = hash; self->slots[at & self->mask].place_and_one; at++) {
            if (self->slots[at & self->mask].hash != hash) continue;
            int32_t place = (int32_t)self->slots[at & self->mask].place_and_one - 1;
            if (best >= 0 && self->num_texts[place] < self->num_texts[best]) continue;
            if (best >= 0 && self->num_texts[place] == self->num_texts[best] && place >= best) continue;
            if (a_slip_apart(text, num_bytes, self->words[place].text, self->words[place].num_bytes)) best = place;
        }
    }
    return best;
}

// One end of a shared-memory link: publishing, taking and giving back slots with acquire/release ordering (hot).
//
// Each direction has a ring of entries (sender -> receiver) and a ring of returns (receiver -> sender), single producer and
// single consumer each. A word is (sequence number << 16) | slot; sequence numbers start at 1, so that a consumer that has
// taken k words finds either the word of lap k + 1 (new) or what it took a lap ago (nothing new). Anything else is damage.
//
// Sleeping: an end stores its sleep flags, then looks once more; the other end publishes, then reads the flags. The full
// fences between the two steps mean that one of them sees the other, so no wake-up is lost.
//
// Must not know: what slots hold, or how a sleeper is woken. The Python twin of this file is lane.py's _PythonLane.

#include <stdatomic.h>
#include <stdint.h>
#include <time.h>

enum { NOTHING = -1, CORRUPT = -2 };
enum { SLEEPS_FOR_MESSAGE = 1, SLEEPS_FOR_SLOT = 2 };

typedef struct {
    _Atomic uint64_t word;
    uint64_t num_bytes;
    uint8_t rest_of_line[48];
} entry;

typedef struct {
    entry *out;                    // what this end publishes
    entry *in;                     // what the peer publishes
    _Atomic uint64_t *given;       // slots of the peer that this end gives back
    _Atomic uint64_t *back;        // slots of this end that the peer gives back
    _Atomic uint32_t *my_sleep;
    _Atomic uint32_t *peer_sleep;
    uint64_t num_slots;
    uint64_t num_out, num_in, num_given, num_back;  // words so far; only this end touches them
    uint64_t starved;              // this end lacks a slot: one that comes back counts as pending
} lane;

static int64_t look(const _Atomic uint64_t *word, uint64_t taken, uint64_t num_slots) {
    uint64_t value = atomic_load_explicit((_Atomic uint64_t *)word, memory_order_acquire);
    uint64_t seq = value >> 16;
    if (seq == taken + 1) {
        uint64_t slot = value & 0xFFFF;
        return slot < num_slots ? (int64_t)slot : CORRUPT;
    }
    uint64_t a_lap_ago = taken >= num_slots ? taken + 1 - num_slots : 0;
    return seq == a_lap_ago && (seq || !value) ? NOTHING : CORRUPT;
}

static int asleep(lane *l, uint32_t flag) {
    atomic_thread_fence(memory_order_seq_cst);
    return (atomic_load_explicit(l->peer_sleep, memory_order_relaxed) & flag) != 0;
}

// Send a slot; 1 when the peer sleeps and must be woken.
int lane_publish(lane *l, uint32_t slot, uint64_t num_bytes) {
    entry *e = &l->out[l->num_out % l->num_slots];
    e->num_bytes = num_bytes;
    atomic_store_explicit(&e->word, ++l->num_out << 16 | slot, memory_order_release);
    return asleep(l, SLEEPS_FOR_MESSAGE);
}

// The next message as (num_bytes << 16) | slot, or NOTHING, or CORRUPT.
int64_t lane_next(lane *l) {
    entry *e = &l->in[l->num_in % l->num_slots];
    int64_t slot = look(&e->word, l->num_in, l->num_slots);
    if (slot < 0) return slot;
    if (e->num_bytes >> 46) return CORRUPT;
    l->num_in++;
    return (int64_t)(e->num_bytes << 16) | slot;
}

// Give a slot back to the peer; 1 when the peer sleeps for want of one.
int lane_give(lane *l, uint32_t slot) {
    _Atomic uint64_t *word = &l->given[l->num_given % l->num_slots];
    atomic_store_explicit(word, ++l->num_given << 16 | slot, memory_order_release);
    return asleep(l, SLEEPS_FOR_SLOT);
}

// A slot of this end that came back, or NOTHING, or CORRUPT.
int64_t lane_back(lane *l) {
    int64_t slot = look(&l->back[l->num_back % l->num_slots], l->num_back, l->num_slots);
    if (slot >= 0) l->num_back++;
    return slot;
}

// 1 when lane_next, or lane_back for a starved end, has something other than NOTHING to say.
int lane_pending(lane *l) {
    if (look(&l->in[l->num_in % l->num_slots].word, l->num_in, l->num_slots) != NOTHING) return 1;
    return l->starved && look(&l->back[l->num_back % l->num_slots], l->num_back, l->num_slots) != NOTHING;
}

void lane_park(lane *l) {
    atomic_store_explicit(
        l->my_sleep, SLEEPS_FOR_MESSAGE | (l->starved ? SLEEPS_FOR_SLOT : 0), memory_order_relaxed);
    atomic_thread_fence(memory_order_seq_cst);
}

void lane_unpark(lane *l) { atomic_store_explicit(l->my_sleep, 0, memory_order_relaxed); }

// Spin on several lanes until one is pending (1) or the time is up (0). Called without the GIL.
int lanes_spin(lane **lanes, uint32_t num_lanes, uint64_t nanoseconds) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    uint64_t end = (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec + nanoseconds;
    for (;;) {
        for (int turn = 0; turn < 16; turn++) {
            for (uint32_t i = 0; i < num_lanes; i++)
                if (lane_pending(lanes[i])) return 1;
#if defined(__x86_64__) || defined(__i386__)
            __builtin_ia32_pause();
#elif defined(__aarch64__)
            __asm__ volatile("yield");
#endif
        }
        clock_gettime(CLOCK_MONOTONIC, &now);
        if ((uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec >= end) return 0;
    }
}

// One end of a shared-memory link: publishing, taking and giving back slots with acquire/release ordering (hot).
//
// Each direction has a ring of entries (sender -> receiver) and a ring of returns (receiver -> sender), single producer and
// single consumer each. A word is (sequence number << 16) | slot; sequence numbers start at 1, so that a consumer that has
// taken k words finds either word k + 1 (new) or what it took a lap ago (nothing new). Anything else is damage.
//
// Sleeping: an end stores its sleep flags, then looks once more; the other end publishes, then reads the flags. The full
// fences between the two steps mean that one of them sees the other, so no wake-up is lost.
//
// Must not know: what slots hold, or how a sleeper is woken. The Python twin of this file is PythonControlChannel in channel.py.

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <string.h>
#include <time.h>

enum { NOTHING = -1, CORRUPT = -2 };
enum { SLEEPS_FOR_MESSAGE = 1, SLEEPS_FOR_SLOT = 2 };
enum { HEADER_BYTES = 64 };
enum { ALONE_NS = 50000 };

typedef struct {
    _Atomic uint64_t word;
    uint64_t num_bytes;
    uint8_t rest_of_line[48];
} entry;

typedef struct {
    PyObject_HEAD
    Py_buffer memory;               // the segment, held until close
    entry *out;                     // what this end publishes
    entry *in;                      // what the peer publishes
    _Atomic uint64_t *given;        // slots of the peer that this end gives back
    _Atomic uint64_t *back;         // slots of this end that the peer gives back
    _Atomic uint32_t *my_sleep;
    _Atomic uint32_t *peer_sleep;
    uint8_t *headers;               // of this end's slots
    uint64_t num_slots;             // 0 once closed
    uint64_t num_out, num_in, num_given, num_back;  // words so far; only this end touches them
    int starved;                    // this end lacks a slot: one that comes back counts as pending
} channel;

static int64_t look(_Atomic uint64_t *word, uint64_t taken, uint64_t num_slots) {
    uint64_t value = atomic_load_explicit(word, memory_order_acquire);
    uint64_t seq = value >> 16;
    if (seq == taken + 1) {
        uint64_t slot = value & 0xFFFF;
        return slot < num_slots ? (int64_t)slot : CORRUPT;
    }
    uint64_t a_lap_ago = taken >= num_slots ? taken + 1 - num_slots : 0;
    return seq == a_lap_ago && (seq || !value) ? NOTHING : CORRUPT;
}

static PyObject *asleep(channel *self, uint32_t flag) {
    atomic_thread_fence(memory_order_seq_cst);
    return PyBool_FromLong(atomic_load_explicit(self->peer_sleep, memory_order_relaxed) & flag);
}

static int is_pending(channel *self) {
    uint64_t n = self->num_slots;
    if (!n) return 0;
    if (look(&self->in[self->num_in % n].word, self->num_in, n) != NOTHING) return 1;
    return self->starved && look(&self->back[self->num_back % n], self->num_back, n) != NOTHING;
}

// publish(slot, header, num_bytes) -> bool: send a slot; True when the peer sleeps and must be woken.
static PyObject *channel_publish(channel *self, PyObject *const *args, Py_ssize_t num_args) {
    if (num_args != 3) return PyErr_Format(PyExc_TypeError, "publish(slot, header, num_bytes)");
    uint64_t slot = PyLong_AsUnsignedLongLong(args[0]), num_bytes = PyLong_AsUnsignedLongLong(args[2]);
    if (PyErr_Occurred()) return NULL;
    if (slot >= self->num_slots) return PyErr_Format(PyExc_ValueError, "no such slot");
    Py_buffer header;
    if (PyObject_GetBuffer(args[1], &header, PyBUF_SIMPLE)) return NULL;
    int fits = header.len == HEADER_BYTES;
    if (fits) memcpy(self->headers + slot * HEADER_BYTES, header.buf, HEADER_BYTES);
    PyBuffer_Release(&header);
    if (!fits) return PyErr_Format(PyExc_ValueError, "a header has %d bytes", HEADER_BYTES);
    entry *e = &self->out[self->num_out % self->num_slots];
    e->num_bytes = num_bytes;
    atomic_store_explicit(&e->word, ++self->num_out << 16 | slot, memory_order_release);
    return asleep(self, SLEEPS_FOR_MESSAGE);
}

// next() -> int: the next message as (num_bytes << 16) | slot, or NOTHING, or CORRUPT.
static PyObject *channel_next(channel *self, PyObject *unused) {
    if (!self->num_slots) return PyLong_FromLong(NOTHING);
    entry *e = &self->in[self->num_in % self->num_slots];
    int64_t slot = look(&e->word, self->num_in, self->num_slots);
    if (slot < 0) return PyLong_FromLongLong(slot);
    if (e->num_bytes >> 46) return PyLong_FromLong(CORRUPT);
    self->num_in++;
    return PyLong_FromLongLong((int64_t)(e->num_bytes << 16) | slot);
}

// give(slot) -> bool: give a slot back to the peer; True when the peer sleeps for want of one.
static PyObject *channel_give(channel *self, PyObject *arg) {
    uint64_t slot = PyLong_AsUnsignedLongLong(arg);
    if (PyErr_Occurred()) return NULL;
    if (slot >= self->num_slots) return PyErr_Format(PyExc_ValueError, "no such slot");
    _Atomic uint64_t *word = &self->given[self->num_given % self->num_slots];
    atomic_store_explicit(word, ++self->num_given << 16 | slot, memory_order_release);
    return asleep(self, SLEEPS_FOR_SLOT);
}

// back() -> int: a slot of this end that came back, or NOTHING, or CORRUPT.
static PyObject *channel_back(channel *self, PyObject *unused) {
    if (!self->num_slots) return PyLong_FromLong(NOTHING);
    int64_t slot = look(&self->back[self->num_back % self->num_slots], self->num_back, self->num_slots);
    if (slot >= 0) self->num_back++;
    return PyLong_FromLongLong(slot);
}

// starve(bool): whether a slot that comes back counts as pending.
static PyObject *channel_starve(channel *self, PyObject *arg) {
    self->starved = PyObject_IsTrue(arg);
    Py_RETURN_NONE;
}

// pending() -> bool: True when next, or back for a starved end, has something other than NOTHING to say.
static PyObject *channel_pending(channel *self, PyObject *unused) { return PyBool_FromLong(is_pending(self)); }

// park(): announce sleep.
static PyObject *channel_park(channel *self, PyObject *unused) {
    if (self->num_slots) {
        uint32_t flags = SLEEPS_FOR_MESSAGE | (self->starved ? SLEEPS_FOR_SLOT : 0);
        atomic_store_explicit(self->my_sleep, flags, memory_order_relaxed);
        atomic_thread_fence(memory_order_seq_cst);
    }
    Py_RETURN_NONE;
}

// unpark(): take it back.
static PyObject *channel_unpark(channel *self, PyObject *unused) {
    if (self->num_slots) atomic_store_explicit(self->my_sleep, 0, memory_order_relaxed);
    Py_RETURN_NONE;
}

// close(): let go of the memory; afterwards there is nothing, for ever.
static PyObject *channel_close(channel *self, PyObject *unused) {
    self->num_slots = 0;
    PyBuffer_Release(&self->memory);
    Py_RETURN_NONE;
}

static void channel_dealloc(channel *self) {
    PyBuffer_Release(&self->memory);
    Py_TYPE(self)->tp_free((PyObject *)self);
}

// ControlChannel(memory, num_slots, out, in, given, back, my_sleep, peer_sleep, headers): byte offsets into memory.
static int channel_init(channel *self, PyObject *args, PyObject *kwargs) {
    PyObject *memory;
    unsigned long long n, out, in, given, back, mine, peers, headers;
    if (self->memory.obj) return PyErr_Format(PyExc_RuntimeError, "already open"), -1;
    if (!PyArg_ParseTuple(args, "OKKKKKKKK", &memory, &n, &out, &in, &given, &back, &mine, &peers, &headers)) return -1;
    if (PyObject_GetBuffer(memory, &self->memory, PyBUF_WRITABLE)) return -1;
    uint64_t size = self->memory.len;
    if (!n || n > 0xFFFF || n * 64 > size || out > size - n * 64 || in > size - n * 64 || given > size - n * 8 ||
        back > size - n * 8 || mine > size - 4 || peers > size - 4 || headers > size - n * HEADER_BYTES ||
        (out | in | given | back | mine | peers) % 8)
        return PyErr_Format(PyExc_ValueError, "offsets outside of the memory"), -1;
    uint8_t *base = self->memory.buf;
    self->out = (entry *)(base + out);
    self->in = (entry *)(base + in);
    self->given = (_Atomic uint64_t *)(base + given);
    self->back = (_Atomic uint64_t *)(base + back);
    self->my_sleep = (_Atomic uint32_t *)(base + mine);
    self->peer_sleep = (_Atomic uint32_t *)(base + peers);
    self->headers = base + headers;
    self->num_slots = n;
    return 0;
}

static PyMethodDef channel_methods[] = {
    {"publish", (PyCFunction)(void (*)(void))channel_publish, METH_FASTCALL, NULL},
    {"next", (PyCFunction)channel_next, METH_NOARGS, NULL},
    {"give", (PyCFunction)channel_give, METH_O, NULL},
    {"back", (PyCFunction)channel_back, METH_NOARGS, NULL},
    {"starve", (PyCFunction)channel_starve, METH_O, NULL},
    {"pending", (PyCFunction)channel_pending, METH_NOARGS, NULL},
    {"park", (PyCFunction)channel_park, METH_NOARGS, NULL},
    {"unpark", (PyCFunction)channel_unpark, METH_NOARGS, NULL},
    {"close", (PyCFunction)channel_close, METH_NOARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static PyTypeObject channel_type = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "antiphon_channel.ControlChannel",
    .tp_basicsize = sizeof(channel),
    .tp_flags = Py_TPFLAGS_DEFAULT,
    .tp_new = PyType_GenericNew,
    .tp_init = (initproc)channel_init,
    .tp_dealloc = (destructor)channel_dealloc,
    .tp_methods = channel_methods,
};

static uint64_t nanoseconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

// spin(channels, seconds) -> bool: without the GIL, until one of a tuple of channels is pending (True) or the time is up (False).
// After ALONE_NS it offers the processor to others at every turn: where the peer shares it, spinning must not keep it waiting.
static PyObject *spin(PyObject *module, PyObject *args) {
    PyObject *channels;
    double seconds;
    if (!PyArg_ParseTuple(args, "O!d", &PyTuple_Type, &channels, &seconds)) return NULL;
    Py_ssize_t num_channels = PyTuple_GET_SIZE(channels);
    for (Py_ssize_t i = 0; i < num_channels; i++)
        if (!Py_IS_TYPE(PyTuple_GET_ITEM(channels, i), &channel_type)) return PyErr_Format(PyExc_TypeError, "not a ControlChannel");
    int found = 0;
    Py_BEGIN_ALLOW_THREADS
    uint64_t start = nanoseconds(), now = start, end = start + (uint64_t)(seconds > 0 ? seconds * 1e9 : 0);
    do {
        for (int turn = 0; turn < 16 && !found; turn++) {
            for (Py_ssize_t i = 0; i < num_channels; i++) found |= is_pending((channel *)PyTuple_GET_ITEM(channels, i));
#if defined(__x86_64__) || defined(__i386__)
            __builtin_ia32_pause();
#elif defined(__aarch64__)
            __asm__ volatile("yield");
#endif
        }
        if (found) break;
        if (now - start > ALONE_NS) sched_yield();
        now = nanoseconds();
    } while (now < end);
    Py_END_ALLOW_THREADS
    return PyBool_FromLong(found);
}

static PyMethodDef module_methods[] = {{"spin", spin, METH_VARARGS, NULL}, {NULL, NULL, 0, NULL}};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "antiphon_channel", NULL, -1, module_methods};

PyMODINIT_FUNC PyInit_antiphon_channel(void) {
    if (PyType_Ready(&channel_type)) return NULL;
    PyObject *made = PyModule_Create(&module);
    if (made) PyModule_AddObjectRef(made, "ControlChannel", (PyObject *)&channel_type);
    return made;
}

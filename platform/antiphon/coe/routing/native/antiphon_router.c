// The fast path of a routing decision: a text's embedding (reader.h), and what the heads say of it (request speed, microseconds).
//
// Objects hold the arrays they were made with and work under the GIL; scratch belongs to a call wherever Python may run within it.
// The plain twins are StaticEmbedding in embedding.py, and Ready in assessment.py: the same words, tokens and order, and the same
// numbers up to the rounding of sums, which differs between any two processors' libraries too.
//
// Must not know: policies, experts, where a text comes from.

#include "reader.h"

static const double MAX_LOGIT = 30.0;
static const float TIE = 1e-6f;  // of the plain router's scores: experts this near to its best are its pick too

typedef struct {
    PyObject_HEAD
    array weights, bias, table, means, plain;  // [D, H], [H], [F, M + C], [M], [F, M] or nothing
    array centres, centre_bias;                // [F, K], [F]
    Py_ssize_t D, H, F, K, M, X, general;
    int words;  // whether there is a word head
    int32_t *from, *to;  // of each row of weights, outside of which it is zero
    float cooling, trust;
    double hold, strange_hold, word_share, weight, bias_of_gate, caution, caution_below;
} heads;

// exp(x - the largest x), in place, and its sum.
static float raised(float *x, Py_ssize_t num, float by, float top) {
    float total = 0.0f;
    for (Py_ssize_t i = 0; i < num; i++) total += x[i] = expf((x[i] - top) * by);
    return total;
}

static float largest(const float *x, Py_ssize_t num) {
    float top = x[0];
    for (Py_ssize_t i = 1; i < num; i++) top = x[i] > top ? x[i] : top;
    return top;
}

static PyObject *as_list(const float *x, Py_ssize_t num) {
    PyObject *list = PyList_New(num);
    for (Py_ssize_t i = 0; list && i < num; i++) {
        PyObject *item = PyFloat_FromDouble(x[i]);
        if (item) PyList_SET_ITEM(list, i, item);
        else Py_CLEAR(list);
    }
    return list;
}

// The gate's signal of what the heads found: log p(as one of the classes) / p(as any), or the energy without any directions.
static double heads_signal(const heads *self, const float *found, float *scratch_F) {
    const float *along = found + self->F + self->M, *centre = self->centres.view.buf, *logits = found;
    float square = 0.0f;
    if (self->K) {
        for (Py_ssize_t k = 0; k < self->K; k++) square += along[k] * along[k];
        for (Py_ssize_t f = 0; f < self->F; f++, centre += self->K) {
            float dot = 0.0f;
            for (Py_ssize_t k = 0; k < self->K; k++) dot += along[k] * centre[k];
            scratch_F[f] = dot + ((const float *)self->centre_bias.view.buf)[f];
        }
        logits = scratch_F;
    }
    float top = largest(logits, self->F), sum = 0.0f;
    for (Py_ssize_t f = 0; f < self->F; f++) sum += expf(logits[f] - top);
    return log((double)sum) + (double)top - 0.5 * (double)square;
}

// assess(embedding, threshold) -> (p(category), expected scores, leads, familiarity)
static PyObject *heads_assess(heads *self, PyObject *const *args, Py_ssize_t num_args) {
    if (num_args != 2) return PyErr_Format(PyExc_TypeError, "assess(embedding, threshold)");
    double threshold = PyFloat_AsDouble(args[1]);
    if (PyErr_Occurred()) return NULL;
    array embedding = {0};
    int taken = take(&embedding, args[0], sizeof(float), self->D, "embedding");
    Py_ssize_t F = self->F, M = self->M;
    float *found = PyMem_Malloc((size_t)(self->H + self->X + 2 * M + F) * sizeof(float)), *mixed = found + self->H;
    if (!found) PyErr_NoMemory();
    else if (!taken) {
        memcpy(found, self->bias.view.buf, self->H * sizeof(float));
        const float *row = self->weights.view.buf, *x = embedding.view.buf;
        for (Py_ssize_t d = 0; d < self->D; d++, row += self->H)
            if (x[d] != 0.0f) add_floats(found + self->from[d], row + self->from[d], x[d], self->to[d] - self->from[d]);
    }
    let_go(&embedding);
    if (taken || !found) return PyMem_Free(found), NULL;
    double signal = heads_signal(self, found, mixed + self->X + 2 * M);
    float sum = raised(found, F, self->cooling, largest(found, F));
    float by = (float)((1.0 - self->word_share) / (double)sum);
    for (Py_ssize_t f = 0; f < F; f++) found[f] *= by;
    float *word = found + F + M + self->K;
    if (self->words) {
        by = (float)(1.0 / (double)raised(word, F, 1.0f, largest(word, F)));
        for (Py_ssize_t f = 0; f < F; f++) found[f] += (float)self->word_share * (word[f] *= by);
    }
    memset(mixed, 0, self->X * sizeof(float));
    for (Py_ssize_t f = 0; f < F; f++) add_floats(mixed, (const float *)self->table.view.buf + f * self->X, found[f], self->X);
    for (Py_ssize_t m = 0; m < M; m++) mixed[m] += found[F + m];
    double logit = self->weight * signal + self->bias_of_gate;
    logit = logit > MAX_LOGIT ? MAX_LOGIT : logit < -MAX_LOGIT ? -MAX_LOGIT : logit;
    double familiarity = 1.0 / (1.0 + exp(-logit));
    double strange = familiarity < self->caution_below ? 1.0 - familiarity / self->caution_below : 0.0;
    float *plain = mixed + self->X, *leads = plain + M;
    memset(leads, 0, M * sizeof(float));
    if (self->plain.num) {
        memset(plain, 0, M * sizeof(float));
        for (Py_ssize_t f = 0; f < F; f++) add_floats(plain, (const float *)self->plain.view.buf + f * M, word[f], M);
        float most = largest(plain, M) - TIE, lead = (float)(strange > 0.0 ? self->strange_hold : self->hold);
        for (Py_ssize_t m = 0; m < M; m++) leads[m] = plain[m] < most ? lead : 0.0f;
    }
    const float *mean = self->means.view.buf;
    if (familiarity < threshold)
        for (Py_ssize_t m = 0; m < M; m++) mixed[m] = mean[m] + self->trust * (mixed[m] - mean[m]);
    if (self->caution != 0.0 && strange > 0.0) {
        float lead = (float)(self->caution * strange);
        for (Py_ssize_t m = 0; m < M; m++) leads[m] += m == self->general ? 0.0f : lead;
    }
    PyObject *categories = as_list(mixed + M, self->X - M), *scores = as_list(mixed, M), *asked = as_list(leads, M);
    PyMem_Free(found);
    if (categories && scores && asked) return Py_BuildValue("(NNNd)", categories, scores, asked, familiarity);
    Py_XDECREF(categories);
    Py_XDECREF(scores);
    Py_XDECREF(asked);
    return NULL;
}

// Heads(weights, bias, table, means, plain, centres, centre_bias, general, words, hold, strange_hold, word_share, cooling, trust, weight, bias of the gate,
//       caution, caution_below)
static int heads_init(heads *self, PyObject *args, PyObject *kwargs) {
    PyObject *weights, *bias, *table, *means, *plain, *centres, *centre_bias;
    if (self->from) return PyErr_Format(PyExc_RuntimeError, "already made"), -1;
    if (!PyArg_ParseTuple(args, "OOOOOOOnpdddffdddd", &weights, &bias, &table, &means, &plain, &centres, &centre_bias, &self->general, &self->words,
                          &self->hold, &self->strange_hold, &self->word_share, &self->cooling, &self->trust, &self->weight, &self->bias_of_gate,
                          &self->caution, &self->caution_below))
        return -1;
    const Py_ssize_t item = sizeof(float);
    if (take(&self->weights, weights, item, -1, "weights") || take(&self->bias, bias, item, -1, "bias") ||
        take(&self->table, table, item, -1, "table") || take(&self->means, means, item, -1, "means") ||
        take(&self->plain, plain, item, -1, "plain") || take(&self->centres, centres, item, -1, "centres") ||
        take(&self->centre_bias, centre_bias, item, -1, "centre_bias"))
        return -1;
    self->H = self->bias.num;
    self->M = self->means.num;
    self->F = self->centre_bias.num;
    self->K = self->F > 0 ? self->centres.num / self->F : 0;
    if (self->F < 1 || self->M < 1 || self->centres.num != self->F * self->K ||
        self->H != self->M + self->F * (self->words ? 2 : 1) + self->K || self->weights.num % self->H ||
        self->table.num % self->F || self->table.num / self->F < self->M || (self->word_share && !self->words) ||
        (self->plain.num && (!self->words || self->plain.num != self->F * self->M)))
        return PyErr_Format(PyExc_ValueError, "heads don't fit each other"), -1;
    self->D = self->weights.num / self->H;
    self->X = self->table.num / self->F;
    self->from = PyMem_Calloc((size_t)self->D + 1, sizeof(int32_t));
    self->to = PyMem_Calloc((size_t)self->D + 1, sizeof(int32_t));
    if (!self->from || !self->to) return PyErr_NoMemory(), -1;
    for (Py_ssize_t d = 0; d < self->D; d++) {
        const float *row = (const float *)self->weights.view.buf + d * self->H;
        Py_ssize_t from = 0, to = self->H;
        while (to > 0 && row[to - 1] == 0.0f) to--;
        while (from < to && row[from] == 0.0f) from++;
        self->from[d] = (int32_t)from;
        self->to[d] = (int32_t)to;
    }
    return 0;
}

static void heads_dealloc(heads *self) {
    let_go(&self->weights), let_go(&self->bias), let_go(&self->table), let_go(&self->means), let_go(&self->plain);
    let_go(&self->centres), let_go(&self->centre_bias);
    PyMem_Free(self->from);
    PyMem_Free(self->to);
    Py_TYPE(self)->tp_free((PyObject *)self);
}

// ---- module

static PyMethodDef heads_methods[] = {
    {"assess", (PyCFunction)(void (*)(void))heads_assess, METH_FASTCALL, NULL},
    {NULL, NULL, 0, NULL},
};

static PyTypeObject heads_type = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "antiphon_router.Heads",
    .tp_basicsize = sizeof(heads),
    .tp_flags = Py_TPFLAGS_DEFAULT,
    .tp_new = PyType_GenericNew,
    .tp_init = (initproc)heads_init,
    .tp_dealloc = (destructor)heads_dealloc,
    .tp_methods = heads_methods,
};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "antiphon_router", NULL, -1, NULL};

PyMODINIT_FUNC PyInit_antiphon_router(void) {
    if (PyType_Ready(&reader_type) || PyType_Ready(&heads_type)) return NULL;
    PyObject *made = PyModule_Create(&module);
    if (made) {
        PyModule_AddObjectRef(made, "Reader", (PyObject *)&reader_type);
        PyModule_AddObjectRef(made, "Heads", (PyObject *)&heads_type);
    }
    return made;
}

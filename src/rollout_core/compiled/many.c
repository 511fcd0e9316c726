/* Many tensors: where they lie, and whether each is what it has to be, by DLPack's C exchange API; and their bytes into one buffer.

   The structures are those of DLPack 1.3 (dlpack.h, github.com/dmlc/dlpack). */

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>
#include <string.h>

typedef struct {
    void *data;
    int32_t device_type, device_id;
    int32_t ndim;
    uint8_t code, bits;
    uint16_t lanes;
    int64_t *shape, *strides;
    uint64_t byte_offset;
} Tensor;

typedef int (*Describe)(void *object, Tensor *tensor);

/* What a row has to be: its dtype as code, bits and lanes, its number of dimensions, and where in `sizes` theirs begin. */
typedef struct {
    int32_t code, bits, lanes, ndim;
    int64_t first;
} Wanted;

/* What lies below is for others to look at: the address of a tensor whose storage was freed is its offset. */
static const int64_t LOW = (int64_t)1 << 33;

enum { AHEAD = 32, NEAR = 16, LINES = 4, LINE = 64 };

/* The memory of a row is far away, once there are thousands, and there is nothing else to do until it comes. */
static void prefetch(PyObject *rows, Py_ssize_t i, PyTypeObject *kind)
{
#if defined(__GNUC__)
    if (i + AHEAD < PyList_GET_SIZE(rows))
        __builtin_prefetch(PyList_GET_ITEM(rows, i + AHEAD));
    if (i + NEAR < PyList_GET_SIZE(rows) && Py_TYPE(PyList_GET_ITEM(rows, i + NEAR)) == kind) {
        /* torch keeps the pointer to its own structure behind the object's head. Were it elsewhere, this would be of no use, and
           do no harm: what is prefetched need not exist. */
        const char *inner = *(char *const *)(PyList_GET_ITEM(rows, i + NEAR) + 1);
        for (int line = 0; line < LINES; line++)
            __builtin_prefetch(inner + line * LINE);
    }
#endif
}

static int fits(const Tensor *tensor, const Wanted *wanted, const int64_t *sizes)
{
    if (tensor->code != wanted->code || tensor->bits != wanted->bits || tensor->lanes != wanted->lanes ||
        tensor->ndim != wanted->ndim)
        return 0;
    int64_t stride = 1;
    for (int32_t k = wanted->ndim - 1; k >= 0; k--) {
        int64_t size = sizes[wanted->first + k];
        if (tensor->shape[k] != size || (size != 1 && tensor->strides[k] != stride))
            return 0;
        stride *= size;
    }
    return 1;
}

static int is_wanted(Describe describe, PyObject *row, const Wanted *wanted, const int64_t *sizes, int32_t device_type,
                     int32_t device_id, int64_t *address)
{
    Tensor tensor;
    if (describe(row, &tensor))
        return 0;
    *address = (int64_t)(intptr_t)tensor.data + (int64_t)tensor.byte_offset;
    return tensor.device_type == device_type && tensor.device_id == device_id && *address >= LOW &&
           fits(&tensor, wanted, sizes);
}

/* How many rows of a list, from the first on, are contiguous tensors of one of two types, as wanted, on the device, and not lazily
   negated; their addresses go to `out`. `describe` is the exchange API's, `is_neg` torch.Tensor's. */
int64_t addresses(void *describe, PyObject *is_neg, PyObject *tensor_type, PyObject *parameter_type, PyObject *rows, int64_t count,
                  const Wanted *wanted, const int64_t *sizes, int32_t device_type, int32_t device_id, int64_t *out)
{
    int64_t i = 0;
    if (!PyList_CheckExact(rows))
        return 0;
    for (; i < count && i < PyList_GET_SIZE(rows); i++) {
        PyObject *row = PyList_GET_ITEM(rows, i);
        PyTypeObject *kind = Py_TYPE(row);
        if (kind != (PyTypeObject *)tensor_type && kind != (PyTypeObject *)parameter_type)
            break;
        prefetch(rows, i, kind);
        if (!is_wanted((Describe)describe, row, &wanted[i], sizes, device_type, device_id, &out[i]))
            break;
        Py_INCREF(row); /* the call may run what a mode of torch's adds to it */
        PyObject *negative = PyObject_CallOneArg(is_neg, row);
        Py_DECREF(row);
        Py_XDECREF(negative);
        if (negative != Py_False)
            break;
    }
    if (PyErr_Occurred() && PyErr_ExceptionMatches(PyExc_Exception))
        PyErr_Clear(); /* what is left, an interrupt, is the caller's */
    return i;
}

/* Copy `sizes[i]` bytes from `sources[i]` to `target + places[i]`. The interpreter's lock is not needed. */
void gather(const int64_t *sources, const int64_t *places, const int64_t *sizes, int64_t count, char *target)
{
    for (int64_t i = 0; i < count; i++) {
#if defined(__GNUC__)
        if (i + 1 < count)
            for (int line = 0; line < LINES; line++)
                __builtin_prefetch((const char *)(intptr_t)sources[i + 1] + line * LINE);
#endif
        memmove(target + places[i], (const void *)(intptr_t)sources[i], (size_t)sizes[i]);
    }
}

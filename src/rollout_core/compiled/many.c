/* Many tensors: where they lie, and whether each is what it has to be, by DLPack's C exchange API; and their bytes into one buffer.

   The structures are those of DLPack 1.3 (dlpack.h, github.com/dmlc/dlpack). Of Python exported functions are used, and the head
   of an object, which its stable ABI fixes, and no header: a compiler is more often there than the headers of the Python that runs. */

#include <stdint.h>
#include <stddef.h>

typedef struct Object {
    intptr_t references;
    struct Object *type;
} Object;
typedef intptr_t Size;

extern Size PyList_Size(Object *list);
extern Object *PyList_GetItem(Object *list, Size i); /* borrowed */
extern Object *PyObject_CallOneArg(Object *callable, Object *argument);
extern void Py_IncRef(Object *object);
extern void Py_DecRef(Object *object);
extern long long PyLong_AsLongLong(Object *number);
extern Object *PyErr_Occurred(void);
extern int PyErr_ExceptionMatches(Object *exception);
extern void PyErr_Clear(void);
extern Object *PyExc_Exception;
extern void *memmove(void *target, const void *source, size_t count);

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

enum { FAR = 48, AHEAD = 32, NEAR = 16, LINES = 4, LINE = 64 };

#if defined(__GNUC__)
static Object *row_of(Object *rows, Size i, Size count, const Object *kind)
{
    Object *row = i < count ? PyList_GetItem(rows, i) : NULL;
    return row && row->type == kind ? row : NULL;
}
#endif

/* The memory of a row is far away, once there are thousands, and there is nothing else to do until it comes: the object, the
   tensor that it points to behind its head, and the storage that this points to `storage` bytes from its beginning. */
static void prefetch(Object *rows, Size i, Size count, const Object *kind, int32_t storage)
{
#if defined(__GNUC__)
    if (i + FAR < count)
        __builtin_prefetch(PyList_GetItem(rows, i + FAR));
    Object *ahead = row_of(rows, i + AHEAD, count, kind);
    for (int line = 0; ahead && line < LINES; line++)
        __builtin_prefetch(*(char *const *)(ahead + 1) + line * LINE);
    Object *near = storage ? row_of(rows, i + NEAR, count, kind) : NULL;
    if (near)
        __builtin_prefetch(*(char *const *)(*(char *const *)(near + 1) + storage));
#else
    (void)rows, (void)i, (void)count, (void)kind, (void)storage;
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

static int is_wanted(Describe describe, Object *row, const Wanted *wanted, const int64_t *sizes, int32_t device_type,
                     int32_t device_id, int64_t *address)
{
    Tensor tensor;
    if (describe(row, &tensor))
        return 0;
    *address = (int64_t)(intptr_t)tensor.data + (int64_t)tensor.byte_offset;
    return tensor.device_type == device_type && tensor.device_id == device_id && fits(&tensor, wanted, sizes);
}

/* Whether a method of torch.Tensor's answers just this of a row. */
static int says(Object *method, Object *row, const Object *answer)
{
    Object *said = PyObject_CallOneArg(method, row);
    Py_DecRef(said); /* or NULL, which it allows */
    return said == answer;
}

/* Whether its address is no more than its offset, as that of a tensor is whose storage was freed. */
static int is_nowhere(Object *storage_offset, Object *row, const Wanted *wanted, int64_t address)
{
    Object *said = PyObject_CallOneArg(storage_offset, row);
    int64_t offset = said ? PyLong_AsLongLong(said) : -1;
    Py_DecRef(said);
    return offset < 0 || address <= offset * (wanted->bits * wanted->lanes / 8);
}

/* How many rows of a list, from the first on, are contiguous tensors of one of two types, as wanted, on the device, and not lazily
   negated, and have memory; their addresses go to `out`. `describe` is the exchange API's, `is_neg` and `storage_offset` are
   torch.Tensor's, `no` is Python's False. No memory lies below `low` that is not looked at. `storage`: see
   prefetch; 0 if it is not known. */
int64_t addresses(void *describe, Object *is_neg, Object *no, Object *storage_offset, Object *tensor_type, Object *parameter_type,
                  Object *rows, int64_t count, const Wanted *wanted, const int64_t *sizes, int32_t device_type, int32_t device_id,
                  int64_t low, int32_t storage, int64_t *out)
{
    int64_t i = 0;
    for (; i < count && i < PyList_Size(rows); i++) {
        Object *row = PyList_GetItem(rows, i);
        if (row->type != tensor_type && row->type != parameter_type)
            break;
        prefetch(rows, i, PyList_Size(rows), row->type, storage);
        if (!is_wanted((Describe)describe, row, &wanted[i], sizes, device_type, device_id, &out[i]))
            break;
        Py_IncRef(row); /* the calls may run what a mode of torch's adds to them */
        int plain = says(is_neg, row, no) && (out[i] >= low || !is_nowhere(storage_offset, row, &wanted[i], out[i]));
        Py_DecRef(row);
        if (!plain)
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

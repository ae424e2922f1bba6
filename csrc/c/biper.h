/* BiPer Engine for C: runs the networks of .biper files without Python and without PyTorch.
 *
 *     biper_model* model = NULL;
 *     if (biper_load("network.biper", NULL, &model) != BIPER_OK) {
 *       fprintf(stderr, "%s\n", biper_error());
 *       return 1;
 *     }
 *     biper_run(model, 1, &input, 1, &output, 1);
 *     biper_free(model);
 *
 * A file runs if its network is one native program, which `engine.save` of biper_engine writes into
 * it; of any other file, biper_load says why not. Answers have the bytes that Python's have.
 *
 * Every function may be called from several threads at once, also with one model. None of them ends
 * the process, and none writes to what it did not get to write to.
 */
#ifndef BIPER_H_
#define BIPER_H_

#include <stddef.h>
#include <stdint.h>

#if defined(__GNUC__)
#define BIPER_API __attribute__((visibility("default")))
#else
#define BIPER_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

#define BIPER_VERSION_MAJOR 0
#define BIPER_VERSION_MINOR 1
#define BIPER_VERSION_PATCH 0

/* The version of the library that is loaded, such as "0.1.0". */
BIPER_API const char* biper_version(void);

/* -- errors --------------------------------------------------------------------------------------
 */

typedef enum biper_status {
  BIPER_OK = 0,
  BIPER_ERROR_ARGUMENT = 1,   /* an argument of a call does not fit */
  BIPER_ERROR_READ = 2,       /* there is no such file, or it cannot be read */
  BIPER_ERROR_FORMAT = 3,     /* the file is truncated, edited, foreign, or of a later version */
  BIPER_ERROR_NO_PROGRAM = 4, /* the network of the file is not one native program */
  BIPER_ERROR_MEMORY = 5,     /* the system gives no more memory */
  BIPER_ERROR_INTERNAL = 6    /* a fault of this library */
} biper_status;

/* What went wrong in the last call of this thread that failed: a sentence, in memory that is valid
 * until the next call of this thread. Never null. */
BIPER_API const char* biper_error(void);

/* -- models --------------------------------------------------------------------------------------
 */

typedef struct biper_model biper_model;

/* Options of biper_load. Begin with `biper_options options = BIPER_OPTIONS;`. */
typedef struct biper_options {
  size_t size; /* of this structure */
  int64_t
      threads; /* that a call may use, at most 1024; 0: as many as this process has processors */
} biper_options;

#define BIPER_OPTIONS {sizeof(biper_options), 0}

/* Reads and checks a file. `options` may be null. Sets `*model`, to null where this fails. */
BIPER_API biper_status biper_load(const char* path, const biper_options* options,
                                  biper_model** model);

/* The same for a file in memory, which is only read during the call. */
BIPER_API biper_status biper_load_memory(const void* bytes, size_t size,
                                         const biper_options* options, biper_model** model);

/* Frees a model that no call uses any more; null is allowed. */
BIPER_API void biper_free(biper_model* model);

/* -- inputs and outputs --------------------------------------------------------------------------
 */

typedef enum biper_type {
  BIPER_FLOAT32 = 1,
  BIPER_BITS32 = 2 /* packed bits: channel c is bit c % 32 of word c / 32 of the last dimension */
} biper_type;

#define BIPER_MAX_RANK 16

/* A tensor of the network, for one image. In a call, the first size is multiplied by the batch.
 * Values lie in the order of the sizes, the last one innermost: images as [N, C, H, W]. */
typedef struct biper_tensor {
  const char* name; /* valid as long as the model */
  biper_type type;
  int32_t rank;
  int64_t sizes[BIPER_MAX_RANK];
  int64_t values; /* the product of the sizes; each is 4 bytes */
} biper_tensor;

BIPER_API int64_t biper_input_count(const biper_model* model);
BIPER_API int64_t biper_output_count(const biper_model* model);
BIPER_API biper_status biper_input(const biper_model* model, int64_t index, biper_tensor* tensor);
BIPER_API biper_status biper_output(const biper_model* model, int64_t index, biper_tensor* tensor);

/* Names of the classes; 0 or null where the file has none. */
BIPER_API int64_t biper_class_count(const biper_model* model);
BIPER_API const char* biper_class_name(const biper_model* model, int64_t index);

/* -- calls ---------------------------------------------------------------------------------------
 */

/* Memory of the caller, aligned to 4 bytes. */
typedef struct biper_buffer {
  void* data;
  int64_t values; /* that there is room for: batch * tensor.values */
} biper_buffer;

/* Runs the network on a batch of any size. Reads `inputs` and writes `outputs`, one for each input
 * and output of the network, which may not overlap. */
BIPER_API biper_status biper_run(const biper_model* model, int64_t batch,
                                 const biper_buffer* inputs, int64_t input_count,
                                 const biper_buffer* outputs, int64_t output_count);

/* An image of bytes, rows from top to bottom, the channels of a pixel side by side. */
typedef struct biper_image {
  const uint8_t* pixels;
  int64_t height, width;
  int64_t channels;  /* 1: grey, 3: red, green, blue */
  int64_t row_bytes; /* from one row to the next; 0: width * channels */
} biper_image;

/* Whether the file says how images become input. */
BIPER_API int biper_has_preprocessing(const biper_model* model);

/* Runs the network on images of any sizes: converts them to grey or colours, resizes, crops and
 * normalises each as the file says and as Python's biper_engine does. */
BIPER_API biper_status biper_run_images(const biper_model* model, int64_t batch,
                                        const biper_image* images, const biper_buffer* outputs,
                                        int64_t output_count);

/* Does the preparation alone: writes [batch, C, H, W] float32. */
BIPER_API biper_status biper_prepare_images(const biper_model* model, int64_t batch,
                                            const biper_image* images, const biper_buffer* input);

#ifdef __cplusplus
}
#endif

#endif /* BIPER_H_ */

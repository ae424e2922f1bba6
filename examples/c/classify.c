/* Classifies one raw image of float32 values, [C, H, W], with a .biper file:
 *
 *     classify network.biper image.raw
 */
#include <biper.h>
#include <stdio.h>
#include <stdlib.h>

static int fail(const char* what) {
  fprintf(stderr, "%s\n", what);
  return 1;
}

static int64_t best_of(const float* logits, int64_t count) {
  int64_t best = 0;
  for (int64_t i = 1; i < count; ++i) {
    if (logits[i] > logits[best]) best = i;
  }
  return best;
}

static int classify(const biper_model* model, FILE* file) {
  biper_tensor input, output;
  if (biper_input_count(model) != 1 || biper_output_count(model) != 1) {
    return fail("The network has several inputs or outputs.");
  }
  biper_input(model, 0, &input);
  biper_output(model, 0, &output);
  float* image = malloc((size_t)input.values * sizeof(float));
  float* logits = malloc((size_t)output.values * sizeof(float));
  int status = 1;
  if (image == NULL || logits == NULL) {
    fail("There is not enough memory.");
  } else if (fread(image, sizeof(float), (size_t)input.values, file) != (size_t)input.values) {
    fail("The image has too few values.");
  } else {
    const biper_buffer from = {image, input.values}, to = {logits, output.values};
    if (biper_run(model, 1, &from, 1, &to, 1) != BIPER_OK) {
      fail(biper_error());
    } else {
      const int64_t best = best_of(logits, output.values);
      const char* name = biper_class_name(model, best);
      printf("class %lld (%s): %.9g\n", (long long)best, name != NULL ? name : "no name",
             (double)logits[best]);
      status = 0;
    }
  }
  free(image);
  free(logits);
  return status;
}

int main(int count, char** words) {
  if (count != 3) return fail("Usage: classify FILE.biper IMAGE");
  biper_options options = BIPER_OPTIONS;
  options.threads = 1;
  biper_model* model = NULL;
  if (biper_load(words[1], &options, &model) != BIPER_OK) return fail(biper_error());
  FILE* file = fopen(words[2], "rb");
  int status = 1;
  if (file == NULL) {
    fail("The image cannot be opened.");
  } else {
    status = classify(model, file);
    fclose(file);
  }
  biper_free(model);
  return status;
}

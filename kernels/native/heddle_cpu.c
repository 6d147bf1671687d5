/* The decoder's operations for x86-64-v3 CPUs (AVX2, FMA): what torch does slowly or in many calls there. Knows pointers, no torch.
 *
 * Every row's result is a fixed sequence of operations that depends on this row's own inputs alone: not on how many rows share
 * the call, on the number of threads, or on masked keys between the visible ones. So a token's logits are bit for bit the same
 * alone, in a batch, in a chunk of a prompt or as a node of a draft tree.
 *
 * Types: `half` arguments are 1 for bfloat16 storage, 0 for float32; arithmetic is float32. Shape letters as in kernels/segments.py.
 */
#include "vectors.h"
#include "linear.c"
#include "rows.c"
#include "products.c"
#include "attention.c"
#include "lora.c"
#include "layers.c"
#include "move.c"
#include "draw.c"
#include "backward.c"
#include "attention_backward.c"
#include "lora_backward.c"

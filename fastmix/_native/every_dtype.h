/* Includes the file FM_TYPED once for each dtype: T is the stored type, A that of the arithmetic, F(name) the function's name for it, W(name) for A.
 * values(from, buffer, n) are n stored values as A; place(to, buffer) is where results as A go, and stored(to, buffer, n) rounds
 * them from there. With FM_ONLY_FLOAT32 float64 is left out. For float32 and float64 they are the memory itself, so the buffer is not used. */
#define T float
#define A float
#define F(name) name##_float32
#define W(name) name##_float32
#define values(from, buffer, n) ((void)(buffer), (from))
#define place(to, buffer) ((void)(buffer), (to))
#define stored(to, buffer, n) ((void)0)
#include FM_TYPED
#undef T
#undef A
#undef F
#undef W
#ifndef FM_ONLY_FLOAT32
#define T double
#define A double
#define F(name) name##_float64
#define W(name) name##_float64
#include FM_TYPED
#undef T
#undef A
#undef F
#undef W
#endif
#undef values
#undef place
#undef stored
#define A float
#define W(name) name##_float32
#define place(to, buffer) (buffer)
#define T fm_bf16
#define F(name) name##_bfloat16
#define values(from, buffer, n) (fm_widen_bf16(buffer, from, n), (const float *)(buffer))
#define stored(to, buffer, n) fm_round_bf16(to, buffer, n)
#include FM_TYPED
#undef T
#undef F
#undef values
#undef stored
#define T fm_fp16
#define F(name) name##_float16
#define values(from, buffer, n) (fm_widen_fp16(buffer, from, n), (const float *)(buffer))
#define stored(to, buffer, n) fm_round_fp16(to, buffer, n)
#include FM_TYPED
#undef T
#undef F
#undef values
#undef stored
#undef place
#undef A
#undef W
#undef FM_TYPED
#undef FM_ONLY_FLOAT32

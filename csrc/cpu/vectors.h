// Vector instructions that this machine may lack: the loader chooses among versions of a function.
#pragma once

// Put before a function or function template with plain loops; what it calls must be inline. Call
// it from the body of a parallel_for: a lambda itself gets no versions.
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__)
#define DCX_MULTIVERSION \
  __attribute__((flatten, target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define DCX_MULTIVERSION
#endif

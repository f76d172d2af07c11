// Optimizer steps on the active slices of all parameters: full parameters and their full state are
// read and written at the slice, in one pass. Arithmetic is that of torch's fused optimizers.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cmath>
#include <cstring>

#include "checks.h"
#include "cpu/floats.h"
#include "cpu/slice.h"
#include "cpu/vectors.h"

namespace dcx {
namespace {

using torch::headeronly::ScalarType;

constexpr int64_t GRAIN = 1 << 13;  // elements that are worth a thread

// --- SGD -----------------------------------------------------------------------------------------

enum SgdColumn : int64_t {
  SGD_PARAM = OWN, SGD_GRAD, SGD_PLAIN_END,
  BUFFER = SGD_PLAIN_END, FRESH, SGD_END  // with momentum
};

struct SgdSettings {
  double lr, momentum, undamped, weight_decay;
  bool nesterov, maximize;
};

template <class T, bool MOMENTUM>
struct Sgd {
  using C = computed<T>;
  C lr, momentum, undamped, weight_decay, sign;
  bool nesterov;
  T* param = nullptr;
  const T* grad = nullptr;
  T* buffer = nullptr;
  bool fresh = false;

  explicit Sgd(const SgdSettings& settings)
      : lr(C(settings.lr)),
        momentum(C(settings.momentum)),
        undamped(C(settings.undamped)),
        weight_decay(C(settings.weight_decay)),
        sign(settings.maximize ? C(-1) : C(1)),
        nesterov(settings.nesterov) {}

  Sgd at(Line line) const {
    Sgd bound = *this;
    bound.param = line.address<T>(SGD_PARAM);
    bound.grad = line.address<const T>(SGD_GRAD);
    if (MOMENTUM) {
      bound.buffer = line.address<T>(BUFFER);
      bound.fresh = line[FRESH] != 0;
    }
    return bound;
  }

  void operator()(const Pieces& pieces) const {
    each_piece(pieces, [this](int64_t place, int64_t element, int64_t inner) {
      update(param + place, grad + element, buffer + (MOMENTUM ? place : 0), inner);
    });
  }

  void update(T* __restrict p, const T* __restrict g, T* __restrict b, int64_t count) const {
    for (int64_t i = 0; i < count; ++i) {
      C value = load(p[i]);
      C step = load(g[i]) * sign;
      step = weight_decay != 0 ? step + weight_decay * value : step;  // not 0 * inf
      if (MOMENTUM) {
        C moved = fresh ? step : momentum * load(b[i]) + undamped * step;
        store(moved, b + i);
        step = nesterov ? step + momentum * moved : moved;
      }
      store(value - lr * step, p + i);
    }
  }
};

// --- AdamW ---------------------------------------------------------------------------------------

enum AdamwColumn : int64_t {
  PARAM = OWN, GRAD, AVERAGE, SQUARE, STEP_SIZE, CORRECTION, ADAMW_END,
  LARGEST = ADAMW_END, AMSGRAD_END
};

struct AdamwSettings {
  double decay, beta1, beta2, eps;  // decay: that of one step
  bool maximize;
};

template <class T, bool AMSGRAD>
struct Adamw {
  using C = computed<T>;
  C decay, rest1, beta2, rest2, eps, sign;
  T* param = nullptr;
  const T* grad = nullptr;
  T* average = nullptr;
  T* square = nullptr;
  T* largest = nullptr;
  C step_size = 0, correction = 0;

  explicit Adamw(const AdamwSettings& settings)
      : decay(C(settings.decay)),
        rest1(C(1 - settings.beta1)),
        beta2(C(settings.beta2)),
        rest2(C(1 - settings.beta2)),
        eps(C(settings.eps)),
        sign(settings.maximize ? C(-1) : C(1)) {}

  Adamw at(Line line) const {
    Adamw bound = *this;
    bound.param = line.address<T>(PARAM);
    bound.grad = line.address<const T>(GRAD);
    bound.average = line.address<T>(AVERAGE);
    bound.square = line.address<T>(SQUARE);
    bound.largest = AMSGRAD ? line.address<T>(LARGEST) : nullptr;
    bound.step_size = C(number(line[STEP_SIZE]));
    bound.correction = C(number(line[CORRECTION]));
    return bound;
  }

  static double number(int64_t bits) {
    double value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
  }

  void operator()(const Pieces& pieces) const {
    each_piece(pieces, [this](int64_t place, int64_t element, int64_t inner) {
      update(param + place, grad + element, average + place, square + place,
             largest + (AMSGRAD ? place : 0), inner);
    });
  }

  void update(T* __restrict p, const T* __restrict g, T* __restrict m, T* __restrict v,
              T* __restrict most, int64_t count) const {
    for (int64_t i = 0; i < count; ++i) {
      C value = load(p[i]), slope = load(g[i]) * sign;
      C first = load(m[i]), second = load(v[i]);
      value = decay != 0 ? value - decay * value : value;  // not 0 * inf
      // of the two ends, from the nearer one
      C way = slope - first;
      first = rest1 < C(0.5) ? first + rest1 * way : slope - (1 - rest1) * way;
      second = beta2 * second + rest2 * slope * slope;
      store(first, m + i);
      store(second, v + i);
      if (AMSGRAD) {
        C before = load(most[i]);
        second = second > before || second != second ? second : before;
        store(second, most + i);
      }
      C denominator = std::sqrt(second) / correction + eps;
      store(value - step_size * first / denominator, p + i);
    }
  }
};

// --- calls ---------------------------------------------------------------------------------------

template <class Rule>
DCX_MULTIVERSION void update(const Lines& lines, int64_t begin, int64_t end, const Rule& rule) {
  walk(lines, begin, end, rule);
}

template <template <class, bool> class Rule, bool VARIANT, class Settings>
void update_all(const Lines& lines, ScalarType dtype, const Settings& settings, const char* name) {
  auto run = [&](auto rule) {
    torch::stable::parallel_for(0, lines.elements(), GRAIN, [&](int64_t begin, int64_t end) {
      update(lines, begin, end, rule);
    });
  };
  switch (dtype) {
    case ScalarType::Float: return run(Rule<float, VARIANT>(settings));
    case ScalarType::Double: return run(Rule<double, VARIANT>(settings));
    case ScalarType::BFloat16: return run(Rule<BFloat16, VARIANT>(settings));
    case ScalarType::Half: return run(Rule<Float16, VARIANT>(settings));
    default: DCX_CHECK(false, name, "a floating-point dtype", int(dtype));
  }
}

void sgd_slices(const Tensor& table, ScalarType dtype, bool with_momentum, double lr,
                double momentum, double undamped, double weight_decay, bool nesterov,
                bool maximize) {
  const char* name = "sgd_slices";
  SgdSettings settings{lr, momentum, undamped, weight_decay, nesterov, maximize};
  if (with_momentum) {
    update_all<Sgd, true>(lines_of(table, SGD_END - OWN, name), dtype, settings, name);
  } else {
    update_all<Sgd, false>(lines_of(table, SGD_PLAIN_END - OWN, name), dtype, settings, name);
  }
}

void adamw_slices(const Tensor& table, ScalarType dtype, bool amsgrad, double decay, double beta1,
                  double beta2, double eps, bool maximize) {
  const char* name = "adamw_slices";
  AdamwSettings settings{decay, beta1, beta2, eps, maximize};
  if (amsgrad) {
    update_all<Adamw, true>(lines_of(table, AMSGRAD_END - OWN, name), dtype, settings, name);
  } else {
    update_all<Adamw, false>(lines_of(table, ADAMW_END - OWN, name), dtype, settings, name);
  }
}

}  // namespace
}  // namespace dcx

STABLE_TORCH_LIBRARY_IMPL(dcx_native, CPU, m) {
  m.impl("sgd_slices", TORCH_BOX(&dcx::sgd_slices));
  m.impl("adamw_slices", TORCH_BOX(&dcx::adamw_slices));
}

// A file of bindings says `const Bindings here([](py::module_& m) { m.def(...); });`.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <vector>

namespace py = pybind11;

struct Bindings {
  using Function = void (*)(py::module_&);
  explicit Bindings(Function function) { all().push_back(function); }
  static std::vector<Function>& all() {
    static std::vector<Function> functions;
    return functions;
  }
};

// Tensors come as addresses, None as 0.
template <typename T = void>
T* at(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

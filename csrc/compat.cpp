// What a newer compiler's standard library would import from a newer system, defined here: with it
// a library built anywhere runs wherever glibc 2.28 does (manylinux_2_28).

#include <new>
#include <sstream>

extern "C" {
// read by atomic counters; false means "threads may be running"
extern char __libc_single_threaded __attribute__((visibility("hidden")));
char __libc_single_threaded = 0;
}

namespace std {
void __throw_bad_array_new_length() { throw std::bad_array_new_length(); }
}  // namespace std

template class std::basic_stringstream<char>;
template class std::basic_ostringstream<char>;

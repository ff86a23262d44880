// Parameter blocks of ops: one X-macro line per field gives the C++ struct and the field table that the binding
// fills by name, so an op needs no binding code of its own.
#pragma once
#include <cstddef>
#include <cstdint>

// Functions that kernels of both compilers evaluate; static, so that no linker merges the copies of two instruction sets.
#if defined(__CUDACC__)
#define ENGINE_HD static __host__ __device__ __forceinline__
#else
#define ENGINE_HD static inline __attribute__((always_inline))
#endif

namespace engine {

enum class Kind : uint8_t { ptr, i32, i64, u64, f32 };

struct Field {
  const char* name;
  Kind kind;
  uint32_t offset;
};

template <class T> struct KindOf {
  static constexpr Kind value = Kind::ptr;
};  // every pointer
template <> struct KindOf<int32_t> {
  static constexpr Kind value = Kind::i32;
};
template <> struct KindOf<int64_t> {
  static constexpr Kind value = Kind::i64;
};
template <> struct KindOf<uint64_t> {
  static constexpr Kind value = Kind::u64;
};
template <> struct KindOf<float> {
  static constexpr Kind value = Kind::f32;
};

#define ENGINE_FIELD_MEMBER(type, name) type name;
#define ENGINE_FIELD_ENTRY(type, name) {#name, ::engine::KindOf<type>::value, offsetof(Self, name)},

// Defines `struct Name` with the listed fields and `Name##_fields`, their table.
#define ENGINE_PARAMS(Name, LIST)                        \
  struct Name {                                          \
    LIST(ENGINE_FIELD_MEMBER)                            \
  };                                                     \
  namespace fields_of_##Name {                           \
    using Self = Name;                                   \
    static constexpr Field table[] = {LIST(ENGINE_FIELD_ENTRY)}; \
  }

constexpr size_t kMaxParamBytes = 320;

}  // namespace engine

// Compiles what follows for the instructions named in TARGET; target_end.h ends that for clang.
#if defined(__clang__)
#define TARGET_PRAGMA(text) _Pragma(#text)
#define TARGET_PUSH(names) TARGET_PRAGMA(clang attribute push(__attribute__((target(names))), apply_to = function))
TARGET_PUSH(TARGET)
#else
#define TARGET_PRAGMA(text) _Pragma(#text)
#define TARGET_PUSH(names) TARGET_PRAGMA(GCC target(names))
TARGET_PUSH(TARGET)
#endif

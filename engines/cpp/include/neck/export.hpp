#pragma once

/// Marks what a shared library offers; everything else in it is hidden.
#if defined(__GNUC__)
#define NECK_API __attribute__((visibility("default")))
#else
#define NECK_API
#endif

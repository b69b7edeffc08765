# Finds TensorRT 10 and later or TensorRT-RTX, and the CUDA runtime: headers and one library each.
#
# Where it looks: TensorRT_ROOT, CUDAToolkit_ROOT (both also as environment variables), the system's folders. Each of
# NECK_TENSORRT_INCLUDE_DIR, NECK_TENSORRT_LIBRARY, NECK_CUDA_INCLUDE_DIR, NECK_CUDART_LIBRARY can be given instead.
# NECK_FLAVOR is tensorrt, rtx, or auto: TensorRT where it is found, else TensorRT-RTX.
#
# Makes TensorRT::TensorRT and TensorRT::cudart, and sets TensorRT_FLAVOR.

include(FindPackageHandleStandardArgs)

set(_neck_hints ${TensorRT_ROOT} $ENV{TensorRT_ROOT} ${TENSORRT_ROOT} $ENV{TENSORRT_ROOT})
set(_neck_cuda_hints ${CUDAToolkit_ROOT} $ENV{CUDAToolkit_ROOT} $ENV{CUDA_PATH} /usr/local/cuda)
set(_neck_libraries lib lib64 lib/x64 targets/x86_64-linux/lib targets/x86_64-linux-gnu/lib
                    targets/aarch64-linux-gnu/lib targets/sbsa-linux/lib lib/stubs lib64/stubs)

if(NECK_FLAVOR STREQUAL "rtx")
  set(_neck_names tensorrt_rtx libtensorrt_rtx.so.1)
elseif(NECK_FLAVOR STREQUAL "tensorrt")
  set(_neck_names nvinfer libnvinfer.so.11 libnvinfer.so.10)
else()
  set(_neck_names nvinfer libnvinfer.so.11 libnvinfer.so.10 tensorrt_rtx libtensorrt_rtx.so.1)
endif()

find_path(NECK_TENSORRT_INCLUDE_DIR NvInferRuntime.h HINTS ${_neck_hints} PATH_SUFFIXES include)
find_library(NECK_TENSORRT_LIBRARY NAMES ${_neck_names} HINTS ${_neck_hints} PATH_SUFFIXES ${_neck_libraries})
find_path(NECK_CUDA_INCLUDE_DIR cuda_runtime_api.h HINTS ${_neck_cuda_hints}
          PATH_SUFFIXES include targets/x86_64-linux/include)
find_library(NECK_CUDART_LIBRARY NAMES cudart libcudart.so.13 libcudart.so.12 HINTS ${_neck_cuda_hints}
             PATH_SUFFIXES ${_neck_libraries})

find_package_handle_standard_args(TensorRT
  REQUIRED_VARS NECK_TENSORRT_INCLUDE_DIR NECK_TENSORRT_LIBRARY NECK_CUDA_INCLUDE_DIR NECK_CUDART_LIBRARY
  REASON_FAILURE_MESSAGE "neck-engine needs the headers and libraries of TensorRT 10 or later (libnvinfer) or \
TensorRT-RTX, and of the CUDA runtime. Unpack NVIDIA's SDKs and set -DTensorRT_ROOT=... -DCUDAToolkit_ROOT=..., or build \
only the Triton client with -DNECK_BUILD_ENGINE=OFF")

if(TensorRT_FOUND)
  get_filename_component(_neck_library "${NECK_TENSORRT_LIBRARY}" NAME)
  if(_neck_library MATCHES "rtx" OR NECK_FLAVOR STREQUAL "rtx")
    set(TensorRT_FLAVOR rtx)
  else()
    set(TensorRT_FLAVOR tensorrt)
  endif()
  foreach(_neck_pair "TensorRT|TENSORRT_INCLUDE_DIR|TENSORRT_LIBRARY" "cudart|CUDA_INCLUDE_DIR|CUDART_LIBRARY")
    string(REPLACE "|" ";" _neck_parts "${_neck_pair}")
    list(GET _neck_parts 0 _neck_target)
    list(GET _neck_parts 1 _neck_include)
    list(GET _neck_parts 2 _neck_file)
    if(NOT TARGET TensorRT::${_neck_target})
      add_library(TensorRT::${_neck_target} INTERFACE IMPORTED)
      set_target_properties(TensorRT::${_neck_target} PROPERTIES
        INTERFACE_INCLUDE_DIRECTORIES "${NECK_${_neck_include}}"
        INTERFACE_LINK_LIBRARIES "${NECK_${_neck_file}}")
    endif()
  endforeach()
endif()
mark_as_advanced(NECK_TENSORRT_INCLUDE_DIR NECK_TENSORRT_LIBRARY NECK_CUDA_INCLUDE_DIR NECK_CUDART_LIBRARY)

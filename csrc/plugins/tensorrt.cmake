# The plugins tensorrt and tensorrt_rtx: one source, built for each library that is found. Both need a CUDA toolkit.
find_package(CUDAToolkit QUIET)
find_path(GREEDY_TENSORRT_INCLUDE NvInfer.h DOC "Directory of TensorRT's NvInfer.h")
find_library(GREEDY_TENSORRT_LIBRARY nvinfer DOC "TensorRT's libnvinfer")

# The pip package of TensorRT for RTX has a library without a plain name, and no headers. An isolated build of pip hides
# the environment's packages from sys.path, not from sysconfig.
set(GREEDY_TENSORRT_RTX_INCLUDE ${CMAKE_CURRENT_LIST_DIR}/rtx CACHE PATH
  "Directory of NvInfer.h of TensorRT for RTX; by default our own declaration of what is called")
if(NOT GREEDY_TENSORRT_RTX_LIBRARY)
  find_package(Python QUIET COMPONENTS Interpreter)
  if(Python_Interpreter_FOUND)
    execute_process(
      COMMAND ${Python_EXECUTABLE} -c "import site, sysconfig, sys
folders = [*sys.path, *(sysconfig.get_path(name) for name in ('purelib', 'platlib')), site.getusersitepackages()]
print(';'.join(folder + '/tensorrt_rtx_libs' for folder in folders))"
      OUTPUT_VARIABLE rtx_folders OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
  endif()
  find_library(GREEDY_TENSORRT_RTX_LIBRARY NAMES libtensorrt_rtx.so.1 tensorrt_rtx HINTS ${rtx_folders}
    DOC "libtensorrt_rtx of TensorRT for RTX")
endif()

# The toolkit's runtime is linked in: the plugin then opens where no CUDA is, and says that there is no GPU.
function(greedy_tensorrt name include library)
  greedy_plugin(${name} ${ARGN} csrc/plugins/tensorrt.cpp csrc/base/file.cpp)
  target_include_directories(greedy_${name} SYSTEM PRIVATE ${include})
  target_link_libraries(greedy_${name} PRIVATE ${library}
    $<IF:$<TARGET_EXISTS:CUDA::cudart_static>,CUDA::cudart_static,CUDA::cudart>)
  if(NOT GREEDY_SANITIZE)
    target_link_options(greedy_${name} PRIVATE LINKER:--no-undefined)
  endif()
  # Installed, it finds the library where it was built, and pip's beside the package. An editable installation does not
  # lie beside pip's packages, and CMake adds no link path that lies in the source tree, as .venv does.
  get_filename_component(folder ${library} DIRECTORY)
  set_target_properties(greedy_${name} PROPERTIES INSTALL_RPATH_USE_LINK_PATH ON
                        INSTALL_RPATH "$ORIGIN/../../tensorrt_rtx_libs$<$<BOOL:${GREEDY_EDITABLE}>:;${folder}>")
  set(plugins ${plugins} ${name} PARENT_SCOPE)
endfunction()

if(CUDAToolkit_FOUND AND GREEDY_TENSORRT_INCLUDE AND GREEDY_TENSORRT_LIBRARY)
  greedy_tensorrt(tensorrt ${GREEDY_TENSORRT_INCLUDE} ${GREEDY_TENSORRT_LIBRARY})
else()
  message(STATUS "TensorRT: no NvInfer.h, libnvinfer or CUDA toolkit; its plugin is not built")
endif()
if(CUDAToolkit_FOUND AND GREEDY_TENSORRT_RTX_LIBRARY)
  greedy_tensorrt(tensorrt_rtx ${GREEDY_TENSORRT_RTX_INCLUDE} ${GREEDY_TENSORRT_RTX_LIBRARY}
                  csrc/plugins/kernel_cache.cpp csrc/base/sha256.cpp)
  target_compile_definitions(greedy_tensorrt_rtx PRIVATE GREEDY_TENSORRT_RTX)
else()
  message(STATUS "TensorRT for RTX: no libtensorrt_rtx or CUDA toolkit; its plugin is not built")
endif()

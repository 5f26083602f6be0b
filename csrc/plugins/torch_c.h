// The C functions of libtorch that the aoti plugin uses, looked up by name.
#pragma once

#include <dlfcn.h>

#include <cstdint>
#include <cstdlib>
#include <fstream>
#include <string>
#include <utility>
#include <vector>

#include "greedy/plugin.h"
#include "guard.h"

namespace greedy::plugin {

using Tensor = void*;  // AtenTensorHandle

inline constexpr const char* kDtypes[] = {"float32", "float16", "bfloat16", "float8_e4m3fn",
                                          "int64"};  // of greedy_dtype

template <typename Function>
void look_up(void* library, const char* name, Function& out, int status) {
    out = reinterpret_cast<Function>(dlsym(library, name));
    if (!out) throw Failure(status, std::string("got no function ") + name + ", expected torch 2.11 or newer");
}

// The functions of libtorch that the plugin calls.
struct Torch {
    int32_t (*cpu)(), (*cuda)() = nullptr;
    int32_t (*dtypes[5])();  // in the order of greedy_dtype
    int32_t (*from_blob)(void*, int64_t, const int64_t*, const int64_t*, int64_t, int32_t, int32_t, int32_t, Tensor*);
    int32_t (*empty)(int64_t, const int64_t*, const int64_t*, int32_t, int32_t, int32_t, Tensor*);
    int32_t (*zero)(Tensor), (*remove)(Tensor), (*copy)(Tensor, Tensor, int32_t);
    int32_t (*data)(Tensor, void**), (*rank)(Tensor, int64_t*), (*dtype)(Tensor, int32_t*);
    int32_t (*sizes)(Tensor, int64_t**), (*strides)(Tensor, int64_t**);
    uint64_t (*abi_version)();  // 0xMMmmpp...: major, minor and patch in the upper three bytes

    explicit Torch(void* library) {
        constexpr int status = GREEDY_NO_BACKEND;
        look_up(library, "aoti_torch_device_type_cpu", cpu, status);
        look_up(library, "aoti_torch_device_type_cuda", cuda, status);
        look_up(library, "aoti_torch_abi_version", abi_version, status);
        for (int i = 0; i < 5; ++i)
            look_up(library, (std::string("aoti_torch_dtype_") + kDtypes[i]).c_str(), dtypes[i], status);
        look_up(library, "aoti_torch_create_tensor_from_blob", from_blob, status);
        look_up(library, "aoti_torch_empty_strided", empty, status);
        look_up(library, "aoti_torch_zero_", zero, status);
        look_up(library, "aoti_torch_delete_tensor_object", remove, status);
        look_up(library, "aoti_torch_copy_", copy, status);
        look_up(library, "aoti_torch_get_data_ptr", data, status);
        look_up(library, "aoti_torch_get_dim", rank, status);
        look_up(library, "aoti_torch_get_dtype", dtype, status);
        look_up(library, "aoti_torch_get_sizes", sizes, status);
        look_up(library, "aoti_torch_get_strides", strides, status);
    }
};

inline void check(int32_t code, const char* what) {
    if (code) throw Failure(GREEDY_FAILED, std::string(what) + " failed in torch");
}

// Strides of a contiguous tensor.
inline std::vector<int64_t> packed(const int64_t* sizes, int64_t rank) {
    std::vector<int64_t> strides(static_cast<size_t>(rank));
    int64_t step = 1;
    for (int64_t i = rank; i-- > 0; step *= sizes[i]) strides[static_cast<size_t>(i)] = step;
    return strides;
}

// A tensor handle that the destructor deletes, unless it is released to another owner.
class Owned {
  public:
    explicit Owned(const Torch& torch) : torch_(&torch) {}
    Owned(Owned&& other) noexcept : torch_(other.torch_), handle_(other.release()) {}
    Owned& operator=(Owned&&) = delete;
    ~Owned() {
        if (handle_) torch_->remove(handle_);
    }
    Tensor get() const { return handle_; }
    Tensor* out() { return &handle_; }
    Tensor release() {
        Tensor handle = handle_;
        handle_ = nullptr;
        return handle;
    }

  private:
    const Torch* torch_;
    Tensor handle_ = nullptr;
};

inline std::string beside_this() {
    Dl_info info;
    if (!dladdr(reinterpret_cast<const void*>(&greedy_plugin_get), &info) || !info.dli_fname) return ".";
    const std::string path = info.dli_fname;
    const size_t slash = path.rfind('/');
    return slash == std::string::npos ? "." : path.substr(0, slash);
}

// Directories that may hold torch's libraries: the named one alone; else the folder of this plugin, the torch that is
// installed beside the Python package (this is engine/lib), the lines of library_dirs.txt, and the system's search
// path.
inline std::vector<std::string> library_places(const char* library_dir) {
    const char* named = library_dir ? library_dir : std::getenv("GREEDY_LIBRARY_DIR");
    if (named && *named) return {std::string(named) + "/"};
    const std::string here = beside_this() + "/";
    std::vector<std::string> places = {here, here + "../../torch/lib/"};
    std::ifstream file(here + "library_dirs.txt");  // of an editable installation, written by setup.py
    for (std::string line; std::getline(file, line);)
        if (!line.empty()) places.push_back(line + "/");
    places.push_back("");
    return places;
}

inline void* load_library(const char* library_dir, const char* name) {
    std::string reason;
    for (const std::string& place : library_places(library_dir)) {
        if (void* library = dlopen((place + name).c_str(), RTLD_NOW | RTLD_GLOBAL)) return library;
        reason = dlerror();
    }
    throw Failure(GREEDY_NO_BACKEND,
                  std::string("got no ") + name + " (" + reason +
                      "), expected it in library_dir, GREEDY_LIBRARY_DIR, beside the Python package or in the "
                      "system's search path");
}

}  // namespace greedy::plugin

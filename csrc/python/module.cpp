// engine._C: the C interface as Python objects; users import engine/bundles/native.py. Frames are views of the core's
// own memory, and every call that computes lets other Python threads run.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "greedy/greedy.hpp"

namespace py = pybind11;

namespace {

struct Cancelled : std::runtime_error {
    using std::runtime_error::runtime_error;
};

void translate(const greedy::StatusError& error) {
    switch (error.status) {
        case GREEDY_NOT_FOUND:
            return PyErr_SetString(PyExc_FileNotFoundError, error.what());
        case GREEDY_NO_BACKEND:
            return PyErr_SetString(PyExc_ImportError, error.what());
        case GREEDY_NO_MEMORY:
            return PyErr_SetString(PyExc_MemoryError, error.what());
        case GREEDY_NOT_FINITE:
            return PyErr_SetString(PyExc_FloatingPointError, error.what());
        case GREEDY_FAILED:
            return PyErr_SetString(PyExc_RuntimeError, error.what());
        default:
            return PyErr_SetString(PyExc_ValueError, error.what());
    }
}

// `count` frames of a chunk from `frame` on as a read-only array [count, H, W, 3], which keeps them alive.
py::array view(greedy::Frame frame, py::ssize_t count) {
    const greedy_frame& first = *frame;
    const py::ssize_t width = first.width, height = first.height, stride = static_cast<py::ssize_t>(first.stride);
    const py::capsule owner(new greedy::Frame(std::move(frame)),
                            [](void* held) { delete static_cast<greedy::Frame*>(held); });
    py::array_t<std::uint8_t> array({count, height, width, py::ssize_t{3}},
                                    {height * stride, stride, py::ssize_t{3}, py::ssize_t{1}}, first.data, owner);
    array.attr("setflags")(py::arg("write") = false);
    return array;
}

// A session takes one thread at a time, so other threads wait their turn. set_prompt and cancel need no turn.
class PySession {
  public:
    PySession(const greedy::Bundle& bundle, std::uint64_t seed)
        : info(bundle.info()), session_(std::make_shared<greedy::Session>(bundle, seed)) {}

    const greedy_info info;

    template <typename Work>
    auto alone(Work&& work) {
        const py::gil_scoped_release released;
        const std::lock_guard<std::mutex> turn(turn_);
        return work(*open());
    }

    template <typename Work>
    void any_time(Work&& work) {
        const std::shared_ptr<greedy::Session> session = open();
        const py::gil_scoped_release released;
        work(*session);
    }

    // Returns a chunk whole: a cancel between its frames applies to the next chunk.
    py::array next_chunk() {
        greedy::Frame first = alone([](greedy::Session& session) {
            greedy::Frame frame = session.next_frame();
            bool cancelled = false;
            for (std::uint32_t left = frame->left; left > 0;) {
                try {
                    session.next_frame();
                    --left;
                } catch (const greedy::StatusError& error) {
                    if (error.status != GREEDY_CANCELLED) throw;
                    cancelled = true;
                }
            }
            if (cancelled) session.cancel();
            return frame;
        });
        const py::ssize_t count = py::ssize_t{first->left} + 1;
        return view(std::move(first), count);
    }

    py::array next_frame() {
        return view(alone([](greedy::Session& session) { return session.next_frame(); }), 1).attr("__getitem__")(0);
    }

    void close() {
        const py::gil_scoped_release released;
        const std::lock_guard<std::mutex> turn(turn_);
        const std::lock_guard<std::mutex> lock(mutex_);
        session_ = nullptr;
    }

  private:
    std::shared_ptr<greedy::Session> open() {
        const std::lock_guard<std::mutex> lock(mutex_);
        if (!session_) throw greedy::StatusError(GREEDY_INVALID, "stream: got a closed one, expected an open one");
        return session_;
    }

    std::mutex turn_, mutex_;
    std::shared_ptr<greedy::Session> session_;
};

template <typename T>
using Array = py::array_t<T, py::array::c_style | py::array::forcecast>;

// The core reads as many values as the bundle's sizes say, so arrays must have them. A negative size is any size.
void expect(const py::array& array, const char* what, const std::vector<py::ssize_t>& sizes) {
    const std::vector<py::ssize_t> shape(array.shape(), array.shape() + array.ndim());
    bool same = shape.size() == sizes.size();
    for (std::size_t i = 0; same && i < sizes.size(); ++i) same = sizes[i] < 0 || shape[i] == sizes[i];
    if (same) return;
    const auto text = [](const std::vector<py::ssize_t>& of) {
        std::string out;
        for (py::ssize_t size : of) out += (out.empty() ? "" : ", ") + (size < 0 ? "any" : std::to_string(size));
        return "[" + out + "]";
    };
    throw greedy::StatusError(GREEDY_INVALID, what + (": got " + text(shape)) + ", expected " + text(sizes));
}

std::unique_ptr<greedy::Bundle> open_bundle(const std::string& path, const std::optional<std::string>& backend,
                                            const std::optional<std::string>& plugin_dir,
                                            const std::optional<std::string>& library_dir, bool verify, int parallel) {
    greedy_settings settings;
    greedy_settings_init(&settings);
    settings.backend = backend ? backend->c_str() : nullptr;
    settings.plugin_dir = plugin_dir ? plugin_dir->c_str() : nullptr;
    settings.library_dir = library_dir ? library_dir->c_str() : nullptr;
    settings.verify = verify;
    settings.parallel = parallel;
    const py::gil_scoped_release released;
    return std::make_unique<greedy::Bundle>(path, &settings);
}

py::dict describe(const greedy::Bundle& bundle) {
    const greedy_info info = bundle.info();
    py::dict out;
    out["preset"] = info.preset, out["backend"] = info.backend, out["target"] = info.target;
    out["precision"] = info.precision, out["width"] = info.width, out["height"] = info.height, out["fps"] = info.fps;
    out["chunk_frames"] = info.chunk_frames, out["first_frames"] = info.first_frames;
    out["text_rows"] = info.text_rows, out["text_dim"] = info.text_dim;
    out["latent"] = py::make_tuple(info.latent_channels, info.latent_frames, info.latent_height, info.latent_width);
    return out;
}

}  // namespace

PYBIND11_MODULE(_C, module) {
    module.doc() = "The C++ core; see engine.bundles.native.";
    module.attr("version") = greedy_version();
    // Must come before the translator below, because a translator passes its exceptions to those registered earlier.
    py::register_exception<Cancelled>(module, "Cancelled", PyExc_RuntimeError);
    py::register_exception_translator([](std::exception_ptr pointer) {
        try {
            if (pointer) std::rethrow_exception(pointer);
        } catch (const greedy::StatusError& error) {
            if (error.status == GREEDY_CANCELLED)
                std::rethrow_exception(std::make_exception_ptr(Cancelled(error.what())));
            translate(error);
        }
    });

    py::class_<greedy::Bundle>(module, "Bundle")
        .def(py::init(&open_bundle), py::arg("path"), py::kw_only(), py::arg("backend") = py::none(),
             py::arg("plugin_dir") = py::none(), py::arg("library_dir") = py::none(), py::arg("verify") = true,
             py::arg("parallel") = 1)
        .def("info", &describe);

    py::class_<PySession>(module, "Session")
        .def(py::init<const greedy::Bundle&, std::uint64_t>(), py::arg("bundle"), py::arg("seed"))
        .def("set_prompt",
             [](PySession& self, const std::string& text, bool recommit) {
                 self.any_time([&](greedy::Session& session) { session.set_prompt(text, recommit); });
             })
        .def("set_prompt_tokens",
             [](PySession& self, const Array<std::int64_t>& ids, bool recommit) {
                 expect(ids, "prompt", {-1});
                 self.any_time([&](greedy::Session& session) {
                     session.set_prompt_tokens(ids.data(), static_cast<std::size_t>(ids.size()), recommit);
                 });
             })
        .def("set_prompt_embedding",
             [](PySession& self, const Array<float>& embedding, bool recommit) {
                 expect(embedding, "prompt", {self.info.text_rows, self.info.text_dim});
                 const auto rows = static_cast<std::size_t>(embedding.shape(0));
                 self.any_time(
                     [&](greedy::Session& session) { session.set_prompt_embedding(embedding.data(), rows, recommit); });
             })
        .def("push_frames",
             [](PySession& self, const Array<std::uint8_t>& rgb) {
                 expect(rgb, "push", {-1, self.info.height, self.info.width, 3});
                 self.alone([&](greedy::Session& session) {
                     session.push_frames(rgb.data(), static_cast<std::size_t>(rgb.shape(0)));
                 });
             })
        .def("push_latent",
             [](PySession& self, const Array<float>& latent) {
                 const greedy_info& info = self.info;
                 expect(latent, "push", {info.latent_channels, -1, info.latent_height, info.latent_width});
                 self.alone([&](greedy::Session& session) {
                     session.push_latent(latent.data(), static_cast<std::size_t>(latent.shape(1)));
                 });
             })
        .def("next_chunk", &PySession::next_chunk)
        .def("next_frame", &PySession::next_frame)
        .def("cancel", [](PySession& self) { self.any_time([](greedy::Session& session) { session.cancel(); }); })
        .def("flush", [](PySession& self) { self.alone([](greedy::Session& session) { session.flush(); }); })
        .def("close", &PySession::close);
}

// engine._C: the C interface as Python objects; users import engine/bundles/native.py. Frames are views of the core's
// own memory, and every call that computes lets other Python threads run.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <pthread.h>

#include <condition_variable>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "greedy/greedy.hpp"

namespace py = pybind11;

namespace {

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

class PySession;

// What the calls of this process share. It is never destroyed: a thread may be inside a call when the process exits.
struct Process {
    std::mutex mutex;
    std::condition_variable idle;
    int inside = 0;     // calls that run
    bool ends = false;  // the interpreter does, so no call may begin
    std::set<PySession*> sessions;
};
Process* process = new Process;
int forks = 0;  // by which this process descends from the one that imported the module

// A call of an object that was opened after `born` forks. The interpreter waits for it before it ends: a thread that
// came back to it later would be ended in the middle of C++.
class Call {
  public:
    explicit Call(int born) {
        if (born != forks)
            throw greedy::StatusError(GREEDY_INVALID, "process: got a fork of the one that opened the pipeline, "
                                                      "expected the same one");
        const std::lock_guard<std::mutex> lock(process->mutex);
        if (process->ends)
            throw greedy::StatusError(GREEDY_INVALID, "process: got a call while it ends, expected one before");
        ++process->inside;
    }
    ~Call() {
        const std::lock_guard<std::mutex> lock(process->mutex);
        if (--process->inside == 0) process->idle.notify_all();
    }
    Call(const Call&) = delete;
    Call& operator=(const Call&) = delete;
};

bool ended() {
    const std::lock_guard<std::mutex> lock(process->mutex);
    return process->ends;
}

// In a forked process nothing is freed that was opened before: threads that held its locks do not exist there.
template <typename Pointer>
void drop(Pointer& held, int born) {
    if (born != forks) new Pointer(std::move(held));
    held = nullptr;
}

// Lines that the core logs while it opens a bundle. Its sessions may log as long as they live.
struct Notes {
    std::mutex mutex;
    std::vector<std::string> lines;
    bool open = true;

    static void take(void* notes, int level, const char* text) {
        auto* self = static_cast<Notes*>(notes);
        const std::lock_guard<std::mutex> lock(self->mutex);
        if (self->open && level <= GREEDY_LOG_INFO) self->lines.emplace_back(text);
    }
};

struct PyBundle {
    std::shared_ptr<Notes> notes = std::make_shared<Notes>();  // outlives the bundle
    std::shared_ptr<greedy::Bundle> bundle;
    const int born = forks;

    ~PyBundle() { drop(bundle, born); }
};

// A session takes one thread at a time, so other threads wait their turn. set_prompt, change and cancel need no turn.
class PySession {
  public:
    PySession(const PyBundle& bundle, std::uint64_t seed)
        : info(bundle.bundle->info()), notes_(bundle.notes), bundle_(bundle.bundle), born_(bundle.born) {
        const Call call(born_);
        session_ = std::make_shared<greedy::Session>(*bundle_, seed);
        const std::lock_guard<std::mutex> lock(process->mutex);
        process->sessions.insert(this);
    }
    ~PySession() {
        {
            const std::lock_guard<std::mutex> lock(process->mutex);
            process->sessions.erase(this);
        }
        drop(session_, born_);
        drop(bundle_, born_);
    }
    PySession(const PySession&) = delete;
    PySession& operator=(const PySession&) = delete;

    const greedy_info info;

    template <typename Work>
    auto alone(Work&& work) {
        const Call call(born_);
        const py::gil_scoped_release released;
        const std::lock_guard<std::mutex> turn(turn_);
        return work(*open());
    }

    // Runs `work` beside a call of another thread.
    template <typename Work>
    void beside(Work&& work) {
        const Call call(born_);
        const py::gil_scoped_release released;
        work(*open());
    }

    // Returns the number of the prompt that `work` sets.
    template <typename Work>
    std::uint64_t prompt(Work&& work) {
        std::uint64_t number = 0;
        beside([&](greedy::Session& session) {
            const std::lock_guard<std::mutex> lock(prompts_mutex_);
            work(session);
            number = prompts_++;
        });
        return number;
    }

    // What is left of a chunk, or the next one, whole: a cancel between its frames applies to the next chunk.
    py::tuple next_chunk() {
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
        const auto index = first->index, chunk = first->chunk, prompt = first->prompt;
        return py::make_tuple(view(std::move(first), count), index, chunk, prompt);
    }

    // Any thread may call this. A closed session has nothing to cancel.
    void cancel() {
        if (born_ != forks) return;
        const std::lock_guard<std::mutex> lock(mutex_);
        if (session_) session_->cancel();
    }

    void close() {
        if (born_ != forks) return drop(session_, born_);
        if (ended()) return;
        const Call call(born_);
        const py::gil_scoped_release released;
        cancel();  // a call that runs ends
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

    std::shared_ptr<Notes> notes_;
    std::shared_ptr<greedy::Bundle> bundle_;
    const int born_;
    std::mutex turn_, mutex_, prompts_mutex_;
    std::uint64_t prompts_ = 0;
    std::shared_ptr<greedy::Session> session_;
};

// Before the interpreter ends: no call begins any more, those that run are cancelled and waited for.
void end() {
    const py::gil_scoped_release released;
    std::unique_lock<std::mutex> lock(process->mutex);
    process->ends = true;
    for (PySession* session : process->sessions) session->cancel();
    process->idle.wait(lock, [] { return process->inside == 0; });
}

// `__new__` alone would leave an object without its C++ half, and a call of it would crash.
void forbid_new(const py::handle& type) {
    auto* made = reinterpret_cast<PyTypeObject*>(type.ptr());
    made->tp_new = nullptr;
    PyType_Modified(made);
}

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

std::unique_ptr<PyBundle> open_bundle(const std::string& path, const std::optional<std::string>& backend,
                                      const std::optional<std::string>& plugin_dir,
                                      const std::optional<std::string>& library_dir, bool verify, int parallel) {
    auto made = std::make_unique<PyBundle>();
    greedy_settings settings;
    greedy_settings_init(&settings);
    settings.backend = backend ? backend->c_str() : nullptr;
    settings.plugin_dir = plugin_dir ? plugin_dir->c_str() : nullptr;
    settings.library_dir = library_dir ? library_dir->c_str() : nullptr;
    settings.verify = verify;
    settings.parallel = parallel;
    settings.log = &Notes::take;
    settings.log_cookie = made->notes.get();
    const Call call(made->born);
    const py::gil_scoped_release released;
    made->bundle = std::make_shared<greedy::Bundle>(path, &settings);
    const std::lock_guard<std::mutex> lock(made->notes->mutex);
    made->notes->open = false;
    return made;
}

py::dict describe(const PyBundle& bundle) {
    const greedy_info info = bundle.bundle->info();
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
    const py::object cancelled = py::module_::import("engine.runtime.streams").attr("Cancelled");
    module.attr("Cancelled") = cancelled;
    static PyObject* const cancelled_type = cancelled.inc_ref().ptr();
    py::register_exception_translator([](std::exception_ptr pointer) {
        try {
            if (pointer) std::rethrow_exception(pointer);
        } catch (const greedy::StatusError& error) {
            if (ended()) return PyErr_SetNone(PyExc_SystemExit);  // a thread that is left ends, quietly
            if (error.status == GREEDY_CANCELLED) return PyErr_SetString(cancelled_type, error.what());
            translate(error);
        }
    });
    pthread_atfork(nullptr, nullptr, [] {
        process = new Process;
        ++forks;
    });
    py::module_::import("atexit").attr("register")(py::cpp_function(&end));

    module.def("open_bundle", &open_bundle, py::arg("path"), py::kw_only(), py::arg("backend") = py::none(),
               py::arg("plugin_dir") = py::none(), py::arg("library_dir") = py::none(), py::arg("verify") = true,
               py::arg("parallel") = 1);
    py::class_<PyBundle> bundle(module, "Bundle");
    bundle.def("info", &describe)
        .def("notes", [](const PyBundle& self) { return self.notes->lines; })
        .def(
            "open",
            [](const PyBundle& self, std::uint64_t seed) { return std::make_unique<PySession>(self, seed); },
            py::arg("seed"));
    forbid_new(bundle);

    py::class_<PySession> session(module, "Session");
    session
        .def("set_prompt",
             [](PySession& self, const greedy::Session::Texts& texts, bool recommit, int transition) {
                 return self.prompt([&](greedy::Session& session) { session.set_prompt(texts, recommit, transition); });
             })
        .def("set_prompt_tokens",
             [](PySession& self, const Array<std::int64_t>& ids, bool recommit) {
                 expect(ids, "prompt", {-1});
                 return self.prompt([&](greedy::Session& session) {
                     session.set_prompt_tokens(ids.data(), static_cast<std::size_t>(ids.size()), recommit);
                 });
             })
        .def("set_prompt_embedding",
             [](PySession& self, const Array<float>& embedding, bool recommit, int transition) {
                 expect(embedding, "prompt", {self.info.text_rows, self.info.text_dim});
                 const auto rows = static_cast<std::size_t>(embedding.shape(0));
                 return self.prompt([&](greedy::Session& session) {
                     session.set_prompt_embedding(embedding.data(), rows, recommit, transition);
                 });
             })
        .def("change",
             [](PySession& self, std::optional<std::uint64_t> seed, const std::vector<std::vector<double>>& steps) {
                 self.beside([&](greedy::Session& session) { session.change(seed ? &*seed : nullptr, steps); });
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
        .def("cancel", &PySession::cancel)
        .def("flush", [](PySession& self) { self.alone([](greedy::Session& session) { session.flush(); }); })
        .def("close", &PySession::close);
    forbid_new(session);
}

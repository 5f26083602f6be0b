#include "core/contract.h"

#include <algorithm>
#include <set>
#include <utility>
#include <vector>

#include "base/error.h"

namespace greedy::core {
namespace {

using Tensors = std::vector<TensorSpec>;
using Graphs = std::map<std::string, GraphSpec>;

struct Expected {
    Tensors inputs, outputs;
    std::vector<std::string> caches = {};  // inputs that the graph writes
    bool ordered = false;                  // a VAE's caches are known by their place
};

void refuse(const std::string& where, const std::string& got, const std::string& expected) {
    fail(GREEDY_BAD_BUNDLE, where, got, expected);
}

const TensorSpec* find(const Tensors& tensors, const std::string& name) {
    const auto found = std::find_if(tensors.begin(), tensors.end(), [&](const auto& t) { return t.name == name; });
    return found == tensors.end() ? nullptr : &*found;
}

void check_side(const std::string& where, const Tensors& found, const Tensors& wanted, std::size_t in_order) {
    std::set<std::string> names;
    for (const TensorSpec& tensor : wanted) {
        const TensorSpec* got = find(found, tensor.name);
        if (!got) refuse(where, "no " + tensor.name, "it");
        names.insert(tensor.name);
    }
    for (const TensorSpec& tensor : found)
        if (names.count(tensor.name) == 0) refuse(where, "unknown tensor " + tensor.name, "only known ones");
    for (const TensorSpec& tensor : wanted) {
        const TensorSpec& got = *find(found, tensor.name);
        if (got.shape != tensor.shape || got.dtype != tensor.dtype)
            refuse(where + "." + tensor.name, got.text(), tensor.text());
    }
    for (std::size_t i = 0; i < in_order; ++i)
        if (found[i].name != wanted[i].name)
            refuse(where, found[i].name + " in the place of " + wanted[i].name, "the order of python -m export");
}

void check_graph(const std::string& where, const GraphSpec& graph, const Expected& expected) {
    check_side(where + ".inputs", graph.inputs, expected.inputs, expected.ordered ? expected.inputs.size() : 0);
    check_side(where + ".outputs", graph.outputs, expected.outputs, expected.ordered ? expected.outputs.size() : 1);
    std::set<std::string> written(graph.mutates.begin(), graph.mutates.end());
    for (const auto& alias : graph.aliases) written.insert(alias.second);
    const std::string at = where + (graph.aliases.empty() ? ".mutates" : ".aliases");
    const std::string all = "every cache of a pass, and no other input";
    for (const std::string& cache : expected.caches)
        if (written.erase(cache) == 0) refuse(at, cache + ", a cache that is not written", all);
    if (!written.empty()) refuse(at, *written.begin() + ", an input that no cache is", all);
}

class Contract {
  public:
    Contract(const Manifest& manifest, const Layout& layout, const Graphs& graphs, const std::string& where)
        : m_(manifest), config_(manifest.transformer), layout_(layout), graphs_(graphs), where_(where) {}

    void check() {
        check_names();
        const std::string first = layout_.passes.front().graph;
        const TensorSpec* latent = find(graphs_.at(first).inputs, "latent");
        const std::string at = where_ + "." + first + ".inputs.latent";
        for (const auto& [precision, dtype] : kFloats)
            if (m_.precision == precision) dtype_ = dtype;
        if (m_.precision == "fp8" || m_.precision == "int8") {  // any around them
            if (!latent) refuse(at, "none", "floats");
            dtype_ = latent->dtype;
            const auto same = [&](const auto& row) { return row.second == dtype_; };
            if (std::none_of(std::begin(kFloats), std::end(kFloats), same)) refuse(at, name_of(dtype_), "floats");
        }
        const std::int64_t rows = m_.text_rows;
        const TensorSpec text{"text_emb", {1, rows, config_.text_dim}, dtype_};
        const Shape sides{config_.layers, 1, rows, config_.heads, config_.head_dim};
        check_one("encode_text", {{{"ids", {1, rows}, DType::int64}, {"mask", {1, rows}, DType::int64}}, {text}});
        for (const RoleRing& ring : layout_.rings)
            check_one(std::string("prepare_text_") + ring.role,
                      {{text}, {{"text_k", sides, dtype_}, {"text_v", sides, dtype_}}});
        for (const PassKind& kind : layout_.passes) check_one(kind.graph, pass(kind));
        check_vae("vae_first", "vae_steady", true);
        check_vae("vae_encode_first", "vae_encode_steady", false);
    }

  private:
    void check_names() const {
        std::set<std::string> names = {"encode_text", "vae_first", "vae_steady", "vae_encode_first",
                                       "vae_encode_steady"};
        for (const RoleRing& ring : layout_.rings) names.insert(std::string("prepare_text_") + ring.role);
        for (const PassKind& kind : layout_.passes) names.insert(kind.graph);
        for (const std::string& name : names)
            if (graphs_.count(name) == 0) refuse(where_, "no " + name, "it");
        for (const auto& graph : graphs_)
            if (names.count(graph.first) == 0) refuse(where_, "unknown graph " + graph.first, "only known ones");
    }

    void check_one(const std::string& name, const Expected& expected) const {
        check_graph(where_ + "." + name, graphs_.at(name), expected);
    }

    // The tensors of a transformer's pass over one chunk.
    Expected pass(const PassKind& kind) const {
        const GraphSpec& graph = graphs_.at(kind.graph);
        const std::int64_t n = m_.preset.chunk * m_.tokens(), pairs = config_.head_dim / 2;
        const TensorSpec latent{
            "latent", {1, config_.in_channels, m_.preset.chunk, m_.latent_height(), m_.latent_width()}, dtype_};
        const Shape hidden{1, n, config_.dim()};
        Expected out;
        out.inputs = {latent, {"rope_cos", {n, pairs}, DType::float32}, {"rope_sin", {n, pairs}, DType::float32}};
        if (kind.timed) out.inputs.push_back({"t", {1}, DType::float32});
        if (kind.conditioned) out.inputs.push_back({"c_f", hidden, dtype_});
        const auto ring = std::find_if(layout_.rings.begin(), layout_.rings.end(),
                                       [&](const RoleRing& r) { return r.role == std::string(kind.role); });
        const std::vector<HeadGroup> groups = ring->groups(config_);
        for (const HeadGroup& group : groups)
            for (const char* name : {m_.names.start_row, m_.names.valid_rows})
                out.inputs.push_back({group.prefix + name, {1}, DType::int64});
        out.outputs.push_back(kind.hidden ? TensorSpec{"hidden", hidden, dtype_}
                                          : TensorSpec{"flow", latent.shape, dtype_});
        const TensorSpec* keys = find(graph.inputs, "k_0");
        const bool fp8 = groups.size() == 1 && keys && keys->dtype == DType::float8;
        const Shape text{1, m_.text_rows, config_.heads, config_.head_dim};
        for (const char* side : {"k", "v"})
            for (std::int64_t layer = 0; layer < config_.layers; ++layer) {
                const std::string name = side + ("_" + std::to_string(layer));
                out.inputs.push_back({"text_" + name, text, dtype_});
                for (const HeadGroup& group : groups) add_cache(out, graph, group, side, layer, fp8);
            }
        return out;
    }

    // A layer's keys or values of a group of heads, which the graph writes. A layer without such heads has none.
    void add_cache(Expected& out, const GraphSpec& graph, const HeadGroup& group, const std::string& side,
                   std::int64_t layer, bool fp8) const {
        const std::int64_t heads = group.heads[static_cast<std::size_t>(layer)], rows = group.slots * m_.tokens();
        if (heads == 0) return;
        const std::string name = group.prefix + side + "_" + std::to_string(layer);
        const Shape plain{1, rows, heads * config_.head_dim};
        const Shape across{1, heads, config_.head_dim, (rows + 15) / 16 * 16};  // V in FP8
        out.inputs.push_back({name, fp8 && side == "v" ? across : plain, fp8 ? DType::float8 : dtype_});
        out.caches.push_back(name);
        for (const auto& [output, input] : graph.aliases)
            if (input == name) out.outputs.push_back({output, out.inputs.back().shape, out.inputs.back().dtype});
    }

    // The caches of the following calls have the shapes that the first one gives.
    void check_vae(const std::string& first, const std::string& steady, bool decodes) const {
        const TensorSpec latent{"latent",
                                {1, config_.in_channels, 1, m_.latent_height(), m_.latent_width()},
                                decodes ? dtype_ : DType::float32};  // encoders give float32, whatever their weights are
        Tensors past, made;
        for (const TensorSpec& output : graphs_.at(first).outputs) {
            if (&output == &graphs_.at(first).outputs.front()) continue;
            const std::string name = "cache_" + std::to_string(past.size());
            past.push_back({name, output.shape, output.dtype});
            made.push_back({name + "_out", output.shape, output.dtype});
        }
        for (const std::string& name : {first, steady}) {
            const TensorSpec frames{"frames", {1, 3, name == first ? 1 : m_.temporal, m_.height, m_.width}, dtype_};
            Expected expected{{decodes ? latent : frames}, {decodes ? frames : latent}};
            if (name == steady) expected.inputs.insert(expected.inputs.end(), past.begin(), past.end());
            expected.outputs.insert(expected.outputs.end(), made.begin(), made.end());
            expected.ordered = true;
            check_one(name, expected);
        }
    }

    static constexpr std::pair<const char*, DType> kFloats[] = {
        {"fp32", DType::float32}, {"fp16", DType::float16}, {"bf16", DType::bfloat16}};

    const Manifest& m_;
    const TransformerConfig& config_;
    const Layout& layout_;
    const Graphs& graphs_;
    const std::string where_;
    DType dtype_ = DType::float32;  // of the stream
};

}  // namespace

void check_graphs(const Manifest& manifest, const Layout& layout, const std::string& where) {
    for (const auto& [name, backend] : manifest.backends)
        Contract(manifest, layout, backend.graphs, where + ".backends." + name + ".graphs").check();
}

}  // namespace greedy::core

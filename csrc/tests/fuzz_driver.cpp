// For compilers without libFuzzer: fuzz CORPUS SECONDS [SEED [KINDS [FILE]]] damages the corpus for so many seconds, or
// those of its files that begin with a letter of KINDS. The same seed gives the same inputs; FILE, if named, holds the
// input that is being tried.
#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <random>
#include <string>
#include <vector>

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size);

namespace {

std::string mutate(const std::vector<std::string>& corpus, std::mt19937_64& random) {
    const auto pick = [&](std::size_t below) { return below ? random() % below : 0; };
    static const std::string kTokens[] = {"0",
                                          "-1",
                                          "18446744073709551615",
                                          "9223372036854775808",
                                          "1e308",
                                          "[",
                                          "]",
                                          "{",
                                          "}",
                                          "\"",
                                          "null",
                                          "true",
                                          "\\u",
                                          "\xFF",
                                          "\\",
                                          ",",
                                          "4294967296",
                                          "../",
                                          "F32",
                                          "\0"};
    std::string text = corpus[pick(corpus.size())];
    for (std::size_t changes = 1 + pick(4); changes > 0 && text.size() > 1; --changes) {
        const std::size_t at = 1 + pick(text.size() - 1),
                          length = 1 + pick(std::min<std::size_t>(32, text.size() - at));
        switch (pick(7)) {
            case 0:
                text[at] = static_cast<char>(random());
                break;
            case 1:
                text[at] = static_cast<char>(text[at] ^ (1 << pick(8)));
                break;
            case 2:
                text.erase(at, length);
                break;
            case 3:
                text.insert(at, text.substr(1 + pick(text.size() - 1), length));
                break;
            case 4:
                text.replace(at, length, kTokens[pick(std::size(kTokens))]);
                break;
            case 5:
                for (std::size_t left = length; left > 0; --left) text += static_cast<char>(random());
                break;
            default: {
                const std::string& other = corpus[pick(corpus.size())];
                const std::size_t from = pick(other.size());
                text.replace(at, length, other.substr(from, length * 4));
            }
        }
    }
    return text;
}

}  // namespace

int main(int argc, char** argv) {
    if (argc < 3) return std::fprintf(stderr, "usage: fuzz CORPUS SECONDS [SEED [KINDS [FILE]]]\n"), 2;
    std::vector<std::filesystem::path> files(std::filesystem::directory_iterator(argv[1]), {});
    std::sort(files.begin(), files.end());
    std::vector<std::string> corpus;
    for (const auto& path : files) {
        std::ifstream file(path, std::ios::binary);
        std::string text(std::istreambuf_iterator<char>(file), {});
        if (argc < 5 || (!text.empty() && std::strchr(argv[4], text[0]))) corpus.push_back(std::move(text));
    }
    if (corpus.empty()) return std::fprintf(stderr, "%s: empty\n", argv[1]), 2;
    std::mt19937_64 random(argc > 3 ? std::strtoull(argv[3], nullptr, 10) : 0);
    const auto call = [](const std::string& text) {
        LLVMFuzzerTestOneInput(reinterpret_cast<const std::uint8_t*>(text.data()), text.size());
    };
    std::for_each(corpus.begin(), corpus.end(), call);
    const auto end = std::chrono::steady_clock::now() + std::chrono::duration<double>(std::atof(argv[2]));
    std::uint64_t inputs = 0;
    for (; std::chrono::steady_clock::now() < end; ++inputs) {
        const std::string text = mutate(corpus, random);
        if (argc > 5) {
            std::ofstream(argv[5], std::ios::binary) << text;
        }
        call(text);
    }
    std::printf("%zu files, %llu damaged inputs\n", corpus.size(), static_cast<unsigned long long>(inputs));
    return 0;
}
